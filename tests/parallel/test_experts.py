"""Rows that arrive from other ranks are multiplied by the experts that they are for."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from twinfer.compiled.experts import stack
from twinfer.compiled.moe import Mlp, Moe
from twinfer.parallel.experts import expert_pieces, multiplied
from twinfer.spec.config import Storage
from twinfer.spec.mlp import Activation, MlpConfig
from twinfer.spec.moe import MoeConfig, RouterConfig
from twinfer.spec.weights import StackedLinearWeights

HIDDEN, WIDTH, EXPERTS = 5, 3, 3
CONFIG = MoeConfig(
    router=RouterConfig(experts=EXPERTS, top_k=1),
    expert=MlpConfig(width=WIDTH, activation=Activation.RELU, gated=False),
)


@given(
    counts=st.lists(st.lists(st.integers(0, 4), min_size=EXPERTS, max_size=EXPERTS), min_size=1, max_size=3),
    seed=st.integers(0, 2**16),
)
def test_each_row_is_for_its_own_expert(counts: list[list[int]], seed: int) -> None:
    """Few rows or many, from any number of peers: each is what its expert makes of it; exact, on small integers.

    Limits are those of compiled pieces.
    """
    generator = torch.Generator().manual_seed(seed)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-3, 4, shape, generator=generator).float()

    up_EFM, down_EMF = integers(EXPERTS, WIDTH, HIDDEN), integers(EXPERTS, HIDDEN, WIDTH)
    expert_N = [expert for of_peer in counts for expert, rows in enumerate(of_peer) for _ in range(rows)]
    row_NM = integers(len(expert_N), HIDDEN)
    experts = Mlp(*(stack([StackedLinearWeights(weight_ENI=each)], Storage.FLOAT32) for each in (up_EFM, down_EMF)))
    weights = Moe(experts.up, None, experts, None, None, None, None)  # the router, the first of them, has chosen
    pieces = expert_pieces(CONFIG, Storage.FLOAT32, lambda function, dynamic: function)
    found_NM = multiplied(row_NM, torch.tensor(counts), weights, pieces)
    for row_M, expert, got_M in zip(row_NM, expert_N, found_NM, strict=True):
        assert torch.equal(got_M, down_EMF[expert] @ (up_EFM[expert] @ row_M).clamp_min(0))
