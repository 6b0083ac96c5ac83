"""Formulas over shapes are what ranks hold, element by element, and what the ledger counts, message by message."""

from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twinfer.oracle.case import RandomPicker
from twinfer.oracle.models import RandomSource
from twinfer.reference.components import DEFAULT
from twinfer.reference.parallel import job as jobs
from twinfer.reference.parallel.path import ParallelReference
from twinfer.reference.parallel.tensor import layer
from twinfer.spec.config import ModelConfig, Storage
from twinfer.spec.counts import count_of, total
from twinfer.spec.moe import ROUTERS
from twinfer.spec.paper_models import PAPER_MODELS
from twinfer.spec.parallel import Exchange, ParallelConfig
from twinfer.spec.plan import rank_bytes, traffic
from twinfer.spec.weights import tensors

from .drawn import draw_layers, draw_parallel
from .test_experts import JOBS, even, mixture
from .test_path import FULL, full_config

seeds = st.integers(0, 2**31)


def assert_plan_is_ledger(config: ModelConfig, parallel: ParallelConfig, tokens: int) -> None:
    """One call of that many tokens in each data group, in float64."""
    path = ParallelReference(RandomSource(config), parallel, compute=torch.float64)
    sequences = path.open(parallel.data, tokens)
    path.extend(sequences, [torch.arange(tokens) % config.vocabulary] * parallel.data)
    planned = traffic(config, parallel, tokens=tokens, compute=torch.float64)
    ledger = path.job.ledger
    assert sum(each.messages for each in planned) == sum(ledger.messages.values())
    assert sum(each.bytes for each in planned) == sum(ledger.bytes.values())
    calls: Counter[str] = Counter()
    for each in planned:
        calls[each.collective] += each.calls
    assert calls == Counter(call.kind.value for call in ledger.calls)


@given(seed=seeds, tokens=st.integers(1, 6))
@settings(max_examples=20)
def test_traffic_of_dense_models(seed: int, tokens: int) -> None:
    pick = RandomPicker(seed)
    config = draw_layers(pick, pick.integer(1, 3))
    assert_plan_is_ledger(config, draw_parallel(pick, config), tokens)


def test_traffic_of_norms_over_all_heads() -> None:
    """Two all-reduces each of queries and keys for a layer norm; a vocabulary and heads that do not divide."""
    assert_plan_is_ledger(full_config(), FULL, tokens=3)


@pytest.mark.parametrize("exchange", Exchange)
@pytest.mark.parametrize("job", JOBS, ids=str)
def test_traffic_of_mixtures(job: ParallelConfig, exchange: Exchange, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all experts are chosen equally often, on one stage and on two."""
    monkeypatch.setattr(jobs, "layer", partial(layer, components=replace(DEFAULT, route=even)))
    for stages, seed in ((1, 0), (2, 3)):
        parallel = replace(job, exchange=exchange, pipeline=stages)
        assert_plan_is_ledger(mixture("switch", seed), parallel, tokens=8)


@given(seed=seeds, storage=st.sampled_from([Storage.FLOAT32, Storage.BFLOAT16, Storage.INT8]))
@settings(max_examples=10)
def test_bytes_of_ranks(seed: int, storage: Storage) -> None:
    """What each rank holds is what its tensors count; a dense model on one rank is what `total` counts."""
    pick = RandomPicker(seed)
    for config, parallel in (
        (draw_layers(pick, 2), ParallelConfig()),
        (mixture(pick.choice(list(ROUTERS)), seed), replace(pick.choice(JOBS), pipeline=2)),
    ):
        path = ParallelReference(RandomSource(config), parallel)
        for rank in range(parallel.ranks):
            place = parallel.place(rank)
            held = path.job.weights[place.stage][rank % parallel.stage_ranks]
            shapes = {}
            parts = [(f"{i}", each) for i, each in enumerate(held.layers)]
            if place.stage == 0:
                parts.append(("embedding", held.ends.embedding))
            if place.stage == parallel.pipeline - 1:
                parts.append(("head", held.ends.head))
                if place.stage > 0 and held.ends.head.projection is None:
                    shapes["tied.token_VW"] = tuple(held.ends.embedding.token_VW.shape)
            for number, part in parts:
                shapes |= {f"{number}.{name}": tuple(tensor.shape) for name, tensor in tensors(part)}
            assert rank_bytes(config, parallel, rank, storage) == count_of(shapes).bytes(storage), rank
        if parallel.ranks == 1:
            assert rank_bytes(config, parallel, 0, storage) == total(config).bytes(storage)


PAPER = {  # Table II: tensor, expert, slices, GPUs
    "1.3b-moe-128": (1, 128, 1, 128),
    "2.4b-moe-128": (1, 128, 1, 128),
    "8b-moe-128": (4, 128, 1, 128),
    "24b-moe-128": (8, 128, 2, 256),
    "47b-moe-128": (8, 128, 2, 256),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_models_of_the_paper(name: str) -> None:
    """On the paper's GPUs: a rank's share of experts and tensor slices, and peers p - 1 against PCC's p / L - 1."""
    tensor, expert, slices, gpus = PAPER[name]
    config = PAPER_MODELS[name].config
    parallel = ParallelConfig(data=gpus // tensor, tensor=tensor, expert=expert, expert_slices=slices)
    hidden, layers = config.hidden, len(config.layers)
    experts = layers // 2 * 8 * hidden**2 // slices
    rest = (12 * layers - 4 * layers) * hidden**2 // tensor
    table = config.vocabulary * hidden // tensor + config.context * hidden * 2  # positions stay float32
    held = rank_bytes(config, parallel, 0, Storage.BFLOAT16)
    assert 2 * (experts + rest + table) <= held <= 1.01 * 2 * (experts + rest + table)
    of_exchange = {
        exchange: {each.step: each for each in traffic(config, replace(parallel, exchange=exchange))}
        for exchange in (Exchange.DIRECT, Exchange.COORDINATED)
    }
    direct, coordinated = (of_exchange[each]["dispatch"].messages for each in (Exchange.DIRECT, Exchange.COORDINATED))
    assert direct == layers // 2 * gpus * (expert - 1)
    assert coordinated == layers // 2 * gpus * (expert // tensor - 1)
