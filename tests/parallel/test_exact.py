"""Where nothing rounds, real ranks compute what one rank computes, bit for bit, in every storage.

That one rank does not round is checked too: float32 and float64 give the same numbers.
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from twinfer.compiled.path import CompiledPath, Mode
from twinfer.oracle.trial import same_bits
from twinfer.spec.config import ModelConfig, Storage
from twinfer.spec.moe import MoeConfig
from twinfer.spec.parallel import Exchange, ParallelConfig
from twinfer.spec.weights import MoeWeights

from .drawn import Calls, draw_calls
from .exact import ExactSource, exact_config, without_norms
from .pool import Pool


def on_one(config: ModelConfig, storage: Storage, calls: Calls, compute: torch.dtype) -> list[Tensor]:
    with without_norms():
        path = CompiledPath(ExactSource(config, 1, storage), storage=storage, compute=compute, mode=Mode.EAGER)
        sequences = path.open(len(calls[0]), 1)
        return [path.extend(sequences, call) for call in calls]


def differing(
    pool: Pool, parallel: ParallelConfig, storage: Storage, config: ModelConfig, mutant: str | None = None
) -> list[tuple[int, int]]:
    """The ranks and calls whose logits are not those of one rank, bit for bit."""
    calls = draw_calls(1, config.vocabulary, batch=3)
    compute = torch.float32 if len(config.layers) == 1 else torch.float64
    wanted, wide = (on_one(config, storage, calls, each) for each in (compute, torch.float64))
    assert all(map(same_bits, (each.double() for each in wanted), wide)), "one rank rounds"
    given = {"config": config, "seed": 1, "parallel": parallel, "storage": storage, "compute": compute}
    results = pool.run("extend_exactly", calls=calls, mutant=mutant, **given)
    return [
        (rank, index)
        for rank, logits in enumerate(results)
        for index, pair in enumerate(zip(logits, wanted, strict=True))
        if not same_bits(*pair)
    ]


@pytest.mark.parametrize("storage", Storage)
def test_two_ranks(two: Pool, storage: Storage) -> None:
    """Of one layer in float32, and of two stages in float64."""
    assert not differing(two, ParallelConfig(tensor=2), storage, exact_config(1))
    assert not differing(two, ParallelConfig(pipeline=2), storage, exact_config(2))


@pytest.mark.parametrize("storage", Storage)
def test_four_ranks(four: Pool, storage: Storage) -> None:
    """More than there are key/value heads, in one layer; and two stages of two ranks, with gated MLPs."""
    assert not differing(four, ParallelConfig(tensor=4), storage, exact_config(1))
    assert not differing(four, ParallelConfig(pipeline=2, tensor=2), storage, exact_config(2))


def test_scales_of_the_slice_are_seen(two: Pool) -> None:
    """Rounding what a rank holds by its own absmax moves every call."""
    given = two, ParallelConfig(tensor=2), Storage.INT8, exact_config(1)
    assert differing(*given, mutant="scales of the slice") == [(rank, call) for rank in range(2) for call in range(4)]


JOBS = {
    "direct": ParallelConfig(data=2, tensor=2, expert=4),
    "slices": ParallelConfig(data=2, tensor=2, expert=2, expert_slices=2),
    "hierarchical": ParallelConfig(data=2, tensor=2, expert=4, exchange=Exchange.HIERARCHICAL),
    "coordinated": ParallelConfig(data=2, tensor=2, expert=4, exchange=Exchange.COORDINATED),
}


@pytest.mark.parametrize("storage", Storage)
@pytest.mark.parametrize("job", JOBS)
def test_experts(four: Pool, job: str, storage: Storage) -> None:
    """Each row comes back as its expert computes it alone; groups have unequally many rows."""
    config = exact_config(1, experts=True)
    source, mlp = ExactSource(config, 1, storage), config.layers[0].mlp
    weights = source.layer(0).mlp
    assert isinstance(mlp, MoeConfig)
    assert isinstance(weights, MoeWeights)
    generator = torch.Generator().manual_seed(1)
    live_M = torch.arange(config.hidden) % 64 > 1
    rows = [torch.randint(-9, 10, (count, config.hidden), generator=generator) * live_M for count in (5, 2)]
    chosen = [torch.rand(len(each), 4, generator=generator).argsort(1)[:, :2] for each in rows]
    given = {"config": config, "seed": 1, "parallel": JOBS[job], "storage": storage, "compute": torch.float32}
    results = four.run("serve_exactly", rows=rows, chosen=chosen, **given)
    for rank, got_TKM in enumerate(results):
        data = JOBS[job].place(rank).data
        want_TKM = torch.stack(
            [
                torch.stack([_of_expert(x_M, weights, int(expert)) for expert in expert_K])
                for x_M, expert_K in zip(rows[data].float(), chosen[data], strict=True)
            ]
        )
        assert same_bits(got_TKM, want_TKM), rank


def _of_expert(x_M: Tensor, weights: MoeWeights, expert: int) -> Tensor:
    up, down = weights.experts.up, weights.experts.down
    assert up.bias_EN is not None
    assert down.bias_EN is not None
    inner_F = functional.relu(up.weight_ENI[expert] @ x_M + up.bias_EN[expert])
    return down.weight_ENI[expert] @ inner_F + down.bias_EN[expert]
