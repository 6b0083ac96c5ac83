"""Degrees by models by storages on real ranks: what is equal, as a table.

    HYPOTHESIS_PROFILE=exhaustive python -m pytest -n0 -s tests/parallel/test_matrix.py

prints it. Everything is computed in float64, not compiled.
"""

import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

import pytest

from twinfer.checkpoint import open_model
from twinfer.oracle.models import RandomSource
from twinfer.oracle.trial import same_bits
from twinfer.spec.config import ModelConfig, Storage
from twinfer.spec.errors import RequestError
from twinfer.spec.parallel import Exchange, ParallelConfig, check_parallel
from twinfer.spec.weights import WeightSource

from ..families.conftest import AGREEMENT
from .drawn import bytes_of, counted_by_reference, draw_calls, draw_mixture, draw_model, on_one
from .pool import Pool, started

MODELS: dict[str, ModelConfig | str] = {
    "drawn, dense": draw_model(400, layers=3, wide=True),
    "drawn, experts": draw_mixture(402, wide=True),
    "tiny-moe": "tiny-moe",
    "smollm2": "smollm2",
}
DENSE = [
    ParallelConfig(tensor=2),
    ParallelConfig(pipeline=2),
    ParallelConfig(data=2),
    ParallelConfig(tensor=3),
    ParallelConfig(tensor=4),
    ParallelConfig(pipeline=2, tensor=2),
    ParallelConfig(data=2, pipeline=2, tensor=2),
]
OF_EXPERTS = [
    ParallelConfig(tensor=2, expert=2),
    ParallelConfig(data=2, expert=2),
    ParallelConfig(tensor=2, expert_slices=2),
    *[ParallelConfig(data=2, tensor=2, expert=4, exchange=exchange) for exchange in Exchange],
    ParallelConfig(data=2, tensor=2, expert=2, expert_slices=2),
    ParallelConfig(data=2, pipeline=2, tensor=2, expert=4, exchange=Exchange.COORDINATED),
    ParallelConfig(data=2, pipeline=2, tensor=2, expert=2, expert_slices=2),
]


def source_of(model: str) -> WeightSource:
    which = MODELS[model]
    return open_model(which).source if isinstance(which, str) else RandomSource(which, 1)


def fits(model: str, parallel: ParallelConfig, storage: Storage) -> bool:
    if model == "smollm2" and (parallel.ranks > 3 or storage is Storage.BFLOAT16):
        return False  # it is large for two cores
    which = MODELS[model]
    try:
        check_parallel(open_model(which).config if isinstance(which, str) else which, parallel, storage)
    except RequestError:
        return False
    return True


CELLS = [
    (model, parallel, storage)
    for model in MODELS
    for parallel in [*DENSE, *OF_EXPERTS]
    for storage in Storage
    if fits(model, parallel, storage)
]


@dataclass
class Row:
    """What was found of a model at some degrees, over the storages."""

    storages: list[Storage] = field(default_factory=list)
    furthest: float = 0.0
    held: dict[str, int] = field(default_factory=lambda: defaultdict(int))


@pytest.fixture(scope="module")
def rows() -> Iterator[dict[tuple[str, ParallelConfig], Row]]:
    found: dict[tuple[str, ParallelConfig], Row] = {}
    yield found
    columns = "logits", "tokens", "bits", "bytes", "weights"
    print("\n| model | ranks | degrees | storages | furthest |", " | ".join(columns), "|")
    print("|---" * (5 + len(columns)) + "|")
    for (model, parallel), row in found.items():
        held = [f"{row.held[column]} of {len(row.storages)}" for column in columns]
        print(f"| {model} | {parallel.ranks} | {_named(parallel)} |", end="")
        print(f" {' '.join(row.storages)} | {row.furthest:.0e} | {' | '.join(held)} |")


def _named(parallel: ParallelConfig) -> str:
    names = "data", "pipeline", "tensor", "expert", "expert_slices"
    degrees = [f"{name} {getattr(parallel, name)}" for name in names if getattr(parallel, name) > 1]
    return ", ".join(degrees + ([parallel.exchange.value] if parallel.exchange is not Exchange.DIRECT else []))


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[int, Pool]]:
    with ExitStack() as stack:
        numbers = sorted({parallel.ranks for _, parallel, _ in CELLS})
        yield {ranks: stack.enter_context(started(ranks)) for ranks in numbers}


@pytest.mark.skipif(os.environ.get("HYPOTHESIS_PROFILE") != "exhaustive", reason="takes minutes")
@pytest.mark.parametrize(
    ("model", "parallel", "storage"), CELLS, ids=lambda each: _named(each) if isinstance(each, ParallelConfig) else None
)
def test_matrix(
    model: str,
    parallel: ParallelConfig,
    storage: Storage,
    pools: dict[int, Pool],
    rows: dict[tuple[str, ParallelConfig], Row],
) -> None:
    """Logits to a rounding and tokens are those of one rank, logits the same bits on all; bytes are the reference's
    ledger's; what all ranks store is, put together, what one rank stores, bit for bit."""
    source = source_of(model)
    calls = draw_calls(1, source.config.vocabulary, batch=4)
    if any(parallel == each for each in OF_EXPERTS):  # as many sequences as data groups, so that calls are equally many
        calls = [call[: parallel.data] for call in calls]
    wanted = on_one(source, storage, calls)
    results = pools[parallel.ranks].run(
        "cell", model=MODELS[model], seed=1, parallel=parallel, storage=storage, calls=calls
    )
    counted = counted_by_reference(source, parallel, storage, calls)
    pairs = list(zip(results[0][0], wanted, strict=True))
    furthest = max(float((got - want).abs().max() / want.abs().max()) for got, want in pairs)
    found = {
        "logits": furthest <= AGREEMENT,
        "tokens": all(same_bits(got.argmax(-1), want.argmax(-1)) for got, want in pairs),
        "bits": all(same_bits(*pair) for logits, *_ in results for pair in zip(logits, results[0][0], strict=True)),
        "bytes": [bytes_of(seen) for _, seen, _ in results] == [bytes_of(each) for each in counted],
        "weights": not any(differing for *_, differing in results),
    }
    row = rows.setdefault((model, parallel), Row())
    row.storages.append(storage)
    row.furthest = max(row.furthest, furthest)
    for name, right in found.items():
        row.held[name] += right
    assert all(found.values()), (found, furthest, [differing[:3] for *_, differing in results])
