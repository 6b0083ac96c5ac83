"""Right paths of drawn whole models with experts, judged as `verify` judges: none may be alarmed at.

A model is drawn with all its conventions: router recipe, groups, shared and residual MLPs, storage. In one of four the
experts of a pair have equal router weights, or weights apart by a few roundings, so that near-ties abound. Each of its
right paths is given ragged batches of prompts, with a decode step behind some; a pair is one prompt on one path.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..compiled.path import CompiledPath
from ..reference.path import ReferencePath
from ..spec.config import Storage
from ..spec.decoder import Decoder
from ..spec.weights import LayerWeights, MoeWeights, WeightSource
from .baseline import Baseline
from .case import RandomPicker
from .model_mutants import Changed
from .models import RandomSource, draw_moe_config
from .ops.layer import LAYER
from .paths import compare_paths
from .schedule import Schedule, generation

COMPUTE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BATCHES = 4
"""Batches of prompts for each path of a model: drawing and preparing it costs as much as one of them."""


@dataclass(slots=True)
class ModelCount:
    """What the right paths of a model were told."""

    pairs: int = 0
    rows: int = 0
    choices: int = 0
    route_ties: int = 0
    left_out: int = 0
    largest_ratio: float = 0.0
    alarms: list[str] = field(default_factory=list)


def judge_model(seed: int, compute: torch.dtype) -> ModelCount:
    """Draw a model by the seed, and judge its right paths."""
    pick = RandomPicker(seed)
    source = draw_source(pick, seed)
    storage = pick.choice(list(Storage))
    baseline = Baseline.of(source, storage=storage, compute=compute)
    seen = ModelCount()
    for name, path in right_paths(source, storage, compute).items():
        for _ in range(BATCHES):
            schedule, prompts = draw_batch(pick, source.config.vocabulary)
            found = compare_paths(baseline, path, schedule)
            seen.pairs += prompts
            seen.rows += found.rows
            seen.choices += found.choices
            seen.route_ties += len(found.route_ties)
            seen.left_out += found.left_out
            if found.holds:
                seen.largest_ratio = max(seen.largest_ratio, found.largest_ratio)
            else:
                seen.alarms.append(f"seed {seed}, {name}, {storage}, {compute}: {found.failures[0]}, in {schedule!r}")
    return seen


def right_paths(source: WeightSource, storage: Storage, compute: torch.dtype) -> Mapping[str, Decoder]:
    """The compiled path, uncompiled, with and without its choices, and the reference with sums in another order."""
    given: dict[str, Any] = {"storage": storage, "compute": compute}
    paths: dict[str, Decoder] = {
        "compiled": CompiledPath(source, mode="eager", routes=True, **given),
        "silent": CompiledPath(source, mode="eager", **given),
    }
    if compute is not torch.float64:  # its parts round to float32
        otherwise: Any = LAYER.variants["summed_otherwise"]
        paths["summed otherwise"] = ReferencePath(source, components=otherwise.keywords["components"], **given)
    return paths


def draw_source(pick: RandomPicker, seed: int) -> WeightSource:
    """A model with experts; in one of four, every second expert ties with the one before it, or nearly."""
    source = RandomSource(draw_moe_config(pick), seed)
    apart = pick.choice([None, None, None, None, None, None, 0.0, 1e-7])
    if apart is None:
        return source

    def layer(index: int, weights: LayerWeights) -> LayerWeights:
        if not isinstance(weights.mlp, MoeWeights):
            return weights
        return replace(weights, mlp=_tied(weights.mlp, 1 + apart))

    return Changed(source, layer=layer)


def _tied(weights: MoeWeights, factor: float) -> MoeWeights:
    """Every second expert has the router weights and biases of the one before it, times the factor."""

    def tied(value_E: Tensor) -> Tensor:
        value_E = value_E.clone()
        value_E[1::2] = value_E[::2] * factor
        return value_E

    router = weights.router
    bias_E = None if router.bias_N is None else tied(router.bias_N)
    choice_bias_E = None if weights.choice_bias_E is None else tied(weights.choice_bias_E)
    return replace(
        weights,
        router=replace(router, weight_NI=tied(router.weight_NI), bias_N=bias_E),
        choice_bias_E=choice_bias_E,
    )


def draw_batch(pick: RandomPicker, vocabulary: int) -> tuple[Schedule, int]:
    """One to three prompts of one to four tokens, every position judged, with a decode step behind half of them."""
    lengths = [pick.integer(1, 4) for _ in range(pick.integer(1, 3))]
    prompts = tuple(tuple(pick.integer(0, vocabulary - 1) for _ in range(length)) for length in lengths)
    return generation(prompts, pick.integer(1, 2)), len(prompts)
