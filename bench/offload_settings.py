"""Predictions of plans beside measurements: `python -m twinfer.bench.offload_settings FOLDER [SETTING...]`.

Stores are built in FOLDER where they are missing. For each setting a plan is made, and what computing takes is measured
as `twinfer offload plan` does, before prompts and steps are timed and after; the prediction is the mean of both. A disk
that others use changes its speed from one second to the next, so it is measured before, after, and twice between steps.
Where the batch is the plan's own, the compiled path with all weights in memory takes the same steps in turn.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import open_model
from ..compiled.path import CompiledPath
from ..offload.building import build
from ..offload.measuring import Speeds, best_batch, compute, measure, predict
from ..offload.path import OffloadPath
from ..offload.store import Store, open_store
from ..oracle.models import RandomSource
from ..spec.config import (
    Activation,
    AttentionConfig,
    Head,
    LayerConfig,
    MlpConfig,
    ModelConfig,
    NormConfig,
    NormKind,
    Storage,
)
from ..spec.counts import Component, count
from ..spec.decoder import Decoder, Sequences
from ..spec.weights import WeightSource

ROUNDS, STEPS = 3, 3
"""Speeds are measured before each round of steps, and after the last."""

MB = 10**6


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    model: str
    storage: Storage
    budget: int
    batch: int | None
    """None: the plan's own."""
    prompt: int = 64
    reserve: int = 128


SETTINGS = {
    "smollm2 int8, one sequence": Setting(model="smollm2", storage=Storage.INT8, budget=64 * MB, batch=1),
    "smollm2 int8, batch 8": Setting(model="smollm2", storage=Storage.INT8, budget=256 * MB, batch=8),
    "smollm2 int8, batch 16, caches on disk": Setting(model="smollm2", storage=Storage.INT8, budget=72 * MB, batch=16),
    "smollm2 float32, one sequence": Setting(model="smollm2", storage=Storage.FLOAT32, budget=128 * MB, batch=1),
    "smollm2 float32, batch 16": Setting(model="smollm2", storage=Storage.FLOAT32, budget=400 * MB, batch=16),
    "wide float32, one sequence": Setting(model="wide", storage=Storage.FLOAT32, budget=900 * MB, batch=1),
    "smollm2 float32, auto": Setting(
        model="smollm2", storage=Storage.FLOAT32, budget=4000 * MB, batch=None, prompt=8, reserve=32
    ),
    "wide float32, auto": Setting(
        model="wide", storage=Storage.FLOAT32, budget=4000 * MB, batch=None, prompt=4, reserve=24
    ),
}


def wide() -> ModelConfig:
    """Return 8 equal layers of 65 million weights each."""
    norm = NormConfig(kind=NormKind.RMS, epsilon=1e-5)
    layer = LayerConfig(
        norm=norm,
        attention=AttentionConfig(heads=16, kv_heads=4, head_size=128, scale=128**-0.5),
        mlp=MlpConfig(width=8192, activation=Activation.SILU, gated=True),
    )
    return ModelConfig(
        family="random",
        hidden=2048,
        vocabulary=16384,
        context=256,
        layers=(layer,) * 8,
        final_norm=norm,
        learned_positions=True,
        head=Head.UNTIED,
    )


def source_of(model: str) -> WeightSource:
    """Return a model's weights, by the name that a setting has."""
    if model == "wide":
        return RandomSource(wide(), 5)
    return open_model(model).source


def store_of(folder: Path, setting: Setting) -> tuple[Store, float | None]:
    """Return a setting's store, and the seconds that building it took if it was missing."""
    folder.mkdir(parents=True, exist_ok=True)
    place, begin_s = folder / f"{setting.model}-{setting.storage}", time.perf_counter()
    if place.exists():
        return open_store(place), None
    given: dict[str, Any] = {"model": {}, "files": {}, "identity": setting.model, "report": lambda line: None}
    build(source_of(setting.model), place, setting.storage, **given)
    return open_store(place), time.perf_counter() - begin_s


def run(folder: Path, setting: Setting) -> dict[str, Any]:
    """Predict and measure a setting."""
    store, _ = store_of(folder, setting)
    source = source_of(setting.model)
    path = OffloadPath(store, source.config, budget=setting.budget, report=_say)
    path.compile()
    given = setting.batch or best_batch(path, setting.reserve, 2**62)
    _say(f"batch {given}")
    computed = [compute(path, given, setting.reserve, setting.prompt)]
    plan = path.plan
    assert plan is not None
    peer = CompiledPath(source, storage=setting.storage, report=_say) if setting.batch is None else None
    decoders: list[Decoder] = [path, *([peer] if peer is not None else [])]
    measured: list[Speeds] = []
    states, prompt_s, step_s = _timed(decoders, setting, given, lambda: measured.append(measure(store, plan.slots)))
    computed.append(compute(path, given, setting.reserve, setting.prompt))
    speeds = Speeds(
        disk=fmean(each.disk for each in measured),
        memory=fmean(each.memory for each in measured),
        copies=fmean(each.copies for each in measured),
        gemm=fmean(each.gemm for each in measured),
        direct=measured[0].direct,
    )
    both = [predict(store, plan, speeds, *each) for each in computed]
    predicted = {
        name: fmean(getattr(each, name) for each in both)
        for name in ("step_s", "token_s", "prompt_token_s", "hiding_tokens")
    }
    measured_s = median(step_s[0])
    kv_bytes = plan.away_bytes * states // setting.reserve
    result = {
        "bytes": store.nbytes,
        "budget": setting.budget,
        "planned": plan.total_bytes,
        "batch": given,
        "away_layers": plan.away_layers,
        "predicted_step_s": predicted["step_s"],
        "measured_step_s": measured_s,
        "predicted_prompt_token_s": predicted["prompt_token_s"],
        "measured_prompt_token_s": prompt_s / (given * setting.prompt),
        "hiding_tokens": predicted["hiding_tokens"],
        "computing_s": [step.computing.total_s for step, _ in computed],
        "kv_s": [step.kv_s for step, _ in computed],
        "disk_gb_s": [each.disk / 1e9 for each in measured],
        "share_of_disk": (plan.step_bytes + kv_bytes) / measured_s / speeds.disk,
        "gemm_gflop_s": [each.gemm / 1e9 for each in measured],
        "share_of_gemm": 2 * multiplied(source.config) * given / measured_s / speeds.gemm,
    }
    if peer is not None:
        result["resident_step_s"] = median(step_s[1])
        result["of_resident"] = median(other / own for own, other in zip(*step_s, strict=True))
    path.close()
    return result


def multiplied(config: ModelConfig) -> int:
    """Return how many weights each token is multiplied by: all but a table that is not the head."""
    counts = count(config)
    table = 0 if config.head is Head.TIED else counts[Component.EMBEDDING].matrix
    return sum(each.matrix for each in counts.values()) - table


def _timed(
    decoders: Sequence[Decoder], setting: Setting, batch: int, between: Callable[[], None]
) -> tuple[int, float, list[list[float]]]:
    """Return the length at which steps are timed, the first decoder's seconds of all prompts, and steps by decoder.

    Each decoder first runs a step that is not timed: records are verified when they are first read. `between` is called
    before each round and after the last; what follows it is not timed, since the ring is full then.
    """
    generator = torch.Generator().manual_seed(1)
    tokens_BT = torch.randint(decoders[0].config.vocabulary, (batch, setting.reserve), generator=generator)
    for decoder in decoders:
        state = decoder.open(1, 4)
        decoder.extend(state, [tokens_BT[0, :1]])
        state.close()
    states = [decoder.open(batch, setting.reserve) for decoder in decoders]
    prompts = [_seconds(lambda: _extend(*each, list(tokens_BT[:, : setting.prompt]))) for each in zip(decoders, states)]  # noqa: B023, B905
    steps: list[list[float]] = [[] for _ in decoders]
    for at in range(setting.prompt, setting.prompt + ROUNDS * (STEPS + 1)):
        first = (at - setting.prompt) % (STEPS + 1) == 0
        if first:
            between()
        for index, each in enumerate(zip(decoders, states, strict=True)):
            seconds = _seconds(lambda: _extend(*each, list(tokens_BT[:, at, None])))  # noqa: B023
            if not first:
                steps[index].append(seconds)
    between()
    for state in states:
        state.close()
    return setting.prompt + ROUNDS * (STEPS + 1) // 2, prompts[0], steps


def _extend(decoder: Decoder, state: Sequences, tokens: list[Tensor]) -> None:
    decoder.extend(state, tokens)


def _seconds(call: Callable[[], object]) -> float:
    begin_s = time.perf_counter()
    call()
    return time.perf_counter() - begin_s


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[2:] or SETTINGS:
        print(json.dumps({"setting": name, **run(Path(sys.argv[1]), SETTINGS[name])}), flush=True)
