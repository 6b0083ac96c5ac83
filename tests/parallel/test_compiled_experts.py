"""Mixtures on ranks, truly compiled: one rank after the other, steps recorded between the exchanges of rows."""

import os

import pytest
import torch

from twinfer.compiled.programs import Program
from twinfer.oracle.models import RandomSource
from twinfer.oracle.trial import same_bits
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
from twinfer.spec.parallel import ParallelConfig

from ..families.conftest import AGREEMENT
from .drawn import bytes_of, counted_by_reference, on_one
from .pool import Pool

DEGREES = [
    ParallelConfig(tensor=2, expert=2),
    ParallelConfig(data=2, expert=2),
    ParallelConfig(tensor=2, expert_slices=2),
]
PROMPTS = 5, 12, 50
"""Of so many tokens some 10 rows arrive on a rank, which are multiplied one by one; 12 for an expert, in tiles; and 50
for an expert, which is expanded."""


def mixture() -> ModelConfig:
    """Two layers alike, so one piece a program: four experts, top-2."""
    mlp = MlpConfig(width=128, activation=Activation.SILU, gated=True)
    moe = MoeConfig(router=RouterConfig(experts=4, top_k=2, renormalize=True), expert=mlp, shared=mlp)
    norm = NormConfig(kind=NormKind.RMS, epsilon=1e-5)
    layer = LayerConfig(norm=norm, attention=AttentionConfig(heads=2, kv_heads=2, head_size=64, scale=1 / 8), mlp=moe)
    return ModelConfig(
        family="mixture",
        hidden=20,
        vocabulary=40,
        context=128,
        layers=(layer, layer),
        final_norm=norm,
        learned_positions=True,
        head=Head.TIED,
    )


@pytest.mark.skipif(os.environ.get("HYPOTHESIS_PROFILE") != "exhaustive", reason="compiles for a minute each")
@pytest.mark.parametrize("storage", Storage)
@pytest.mark.parametrize("parallel", DEGREES, ids=str)
def test_compiled_mixtures(two: Pool, parallel: ParallelConfig, storage: Storage) -> None:
    """Logits are those of one rank to a rounding, the same bits on both ranks; the ledger is the reference's.

    Rows that arrive are few, and many of each expert.
    """
    config = mixture()
    token_T = torch.randperm(max(PROMPTS), generator=torch.Generator().manual_seed(1)) % config.vocabulary
    lengths = [length for prompt in PROMPTS for length in (prompt, 1)]
    calls = [[token_T[:length].roll(group) for group in range(parallel.data)] for length in lengths]
    given = {"config": config, "parallel": parallel, "storage": storage, "calls": calls}
    results = two.run("compiled", patience_s=300, programs=[Program.PREFILL, Program.DECODE], **given)
    source = RandomSource(config, 1)
    counted = counted_by_reference(source, parallel, storage, calls)
    for rank, (logits, seen, recorded) in enumerate(results):
        assert all(same_bits(*pair) for pair in zip(logits, results[0][0], strict=True)), f"rank {rank} differs"
        assert bytes_of(seen) == bytes_of(counted[rank]), f"rank {rank}"
        assert recorded > 0, f"rank {rank} records no step"
    for got_BV, want_BV in zip(results[0][0], on_one(source, storage, calls), strict=True):
        assert float((got_BV - want_BV).abs().max() / want_BV.abs().max()) <= AGREEMENT
