"""A mixture truly compiled: within the reference's budget, recorded steps to the bit, and nothing compiles twice."""

from functools import cache

import pytest
import torch
from torch import Tensor

from twinfer.compiled.cpu_graph import CpuGraph
from twinfer.compiled.experts import stack
from twinfer.compiled.path import CompiledPath
from twinfer.oracle.baseline import Baseline
from twinfer.oracle.models import RandomSource
from twinfer.oracle.paths import assert_paths_agree
from twinfer.oracle.schedule import GREEDY, Close, Extend, Open
from twinfer.spec.config import (
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
from twinfer.spec.moe import MoeConfig, RouterConfig

from .graph_machine import same_bits
from .test_expert_kernels import FEW, assert_in_budget, by_operator, drawn

STORAGES = [Storage.FLOAT32, Storage.INT4]


def mixture() -> ModelConfig:
    """Two layers alike, so one piece a program: five experts, top-2."""
    mlp = MlpConfig(width=12, activation=Activation.SILU, gated=True)
    moe = MoeConfig(router=RouterConfig(experts=5, top_k=2, renormalize=True), expert=mlp)
    norm = NormConfig(kind=NormKind.RMS, epsilon=1e-5)
    attention = AttentionConfig(heads=2, kv_heads=1, head_size=8, scale=8**-0.5)
    layer = LayerConfig(norm=norm, attention=attention, mlp=moe)
    return ModelConfig(
        family="mixture",
        hidden=20,
        vocabulary=40,
        context=64,
        layers=(layer, layer),
        final_norm=norm,
        learned_positions=True,
        head=Head.TIED,
    )


@cache
def compiled(storage: Storage) -> CompiledPath:
    path = CompiledPath(RandomSource(mixture(), seed=5), storage=storage, routes=True)
    path.compile()
    return path


@pytest.mark.parametrize("storage", STORAGES)
def test_prompts_and_steps_are_in_budget_and_compile_nothing(storage: Storage) -> None:
    """One, three and six sequences, pieces of any length: every choice of an expert is compared, every row judged."""
    path = compiled(storage)
    step = ((GREEDY,),)
    schedule = (
        Open("a", 1, 40),
        Extend("a", (tuple(range(9)),), every_position=True),
        *(Extend("a", step),) * 3,
        Open("b", 6, 4),
        Extend("b", ((1, 2), (3,), (4, 5, 6, 7, 8), (12,), (9,), (10,))),
        *(Extend("b", step * 6), Extend("b", step * 3 + ((),) * 3)) * 2,
        Extend("a", ((11,) * 20,)),
        Close("b"),
        Extend("a", step),
    )
    with torch.compiler.set_stance("fail_on_recompile"):
        found = assert_paths_agree(Baseline.of(RandomSource(mixture(), seed=5), storage=storage), path, schedule)
    tokens = sum(len(each) for step in schedule if isinstance(step, Extend) for each in step.new_tokens)
    assert found.choices == 2 * tokens


@pytest.mark.parametrize("storage", STORAGES)
def test_recorded_steps_are_the_plain_ones_to_the_bit(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever experts are chosen; and they are chosen anew in each step, or there would be nothing to compare."""
    path = compiled(storage)
    plain = CompiledPath.from_model(path.model, path.config, captured=False, routes=True)
    token_T, replays, replay = torch.arange(7), list[CpuGraph](), CpuGraph.replay

    def counted(recorded: CpuGraph) -> None:
        replays.append(recorded)
        replay(recorded)

    monkeypatch.setattr(CpuGraph, "replay", counted)

    def steps(path: CompiledPath) -> tuple[list[Tensor], list[list[int]]]:
        answers, chosen = [], []
        for batch in (1, 4, 6):
            sequences = path.open(batch, 16)
            logits_BV = path.extend(sequences, [token_T[index % 3 :] for index in range(batch)])
            for _ in range(6):
                logits_BV = path.extend(sequences, list(logits_BV.argmax(-1)[:, None]))
                answers.append(logits_BV)
                chosen.append([int(each) for of_sequence in path.routes for one in of_sequence for each in one[0]])
        return answers, chosen

    recorded, chosen = steps(path)
    assert len(replays) >= len(recorded)
    wanted, expected = steps(plain)
    assert all(same_bits(*pair) for pair in zip(recorded, wanted, strict=True))
    assert chosen == expected
    assert len({tuple(each) for each in chosen}) > 6


@pytest.mark.parametrize("storage", STORAGES)
def test_products_of_any_shape_are_in_budget_and_compile_nothing(storage: Storage) -> None:
    """Of other shapes than the kernels were compiled for: one expert and several, tiles of one kind, expanded ones."""
    compiled(storage)
    cases = [([4], 16, 64), ([1, 0, 2], 33, 70), ([FEW + 9, 7, 3], 5, 3), ([1] * 9, 80, 200), ([FEW, 61], 200, 136)]
    with torch.compiler.set_stance("fail_on_recompile"):
        for seed, (rows, outputs, inputs) in enumerate(cases):
            weights, x_AI = drawn(seed, rows, outputs, inputs, biased=seed % 2 == 0)
            got_AN = by_operator(x_AI, rows, stack([weights], storage), storage)
            assert_in_budget(got_AN, x_AI, rows, weights, storage)
