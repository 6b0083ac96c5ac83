"""Which products a model has, and that what is timed is what the compiled path does."""

from collections import Counter

import pytest
import torch

from twinfer.bench import products
from twinfer.bench.plan import operations_of, stored_bytes
from twinfer.bench.products import (
    flops,
    layer_shapes,
    matrix_products,
    memory_limit,
    prefill_products,
    small_products,
    step_shapes,
)
from twinfer.bench.rows import Limits
from twinfer.bench.side_by_side import Workload
from twinfer.bench.targets import reading, small
from twinfer.compiled.packing import Matrix
from twinfer.compiled.weights import prepare
from twinfer.oracle.models import RandomSource
from twinfer.spec.config import Head, Storage

from .tiny_llama import VOCABULARY, llama

CPU = torch.device("cpu")


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "graph", lambda program, **_: program)


@pytest.mark.parametrize("gated", [True, False])
def test_the_shapes_are_those_of_the_matrices_that_are_prepared(gated: bool) -> None:
    config = llama(gated=gated)
    model = prepare(RandomSource(config), Storage.FLOAT32, CPU)
    prepared = Counter(
        tuple(part.word.shape) for layer in model.layers for part in (*layer, *layer.mlp) if isinstance(part, Matrix)
    )
    assert layer_shapes(config) == prepared
    assert step_shapes(config) - layer_shapes(config) == Counter({tuple(model.head.projection.word.shape): 1})


def test_the_head_counts_whether_it_is_tied_or_not() -> None:
    assert step_shapes(llama(head=Head.TIED)) == step_shapes(llama(head=Head.UNTIED))


def test_operations_of_a_step_and_of_a_prompt() -> None:
    """A step multiplies by every matrix for each of its rows; a prompt by the head for its last token alone."""
    config = llama()
    layers = flops(layer_shapes(config), 1)
    head = 2 * VOCABULARY * config.hidden
    assert operations_of(config, Workload(prompt=5, steps=2, batch=3)) == 3 * (layers + head)
    assert operations_of(config, Workload(prompt=5)) == 5 * layers + head


def test_stored_bytes_are_those_of_the_words_and_scales() -> None:
    config = llama()
    elements = sum(outputs * inputs * count for (outputs, inputs), count in step_shapes(config).items())
    rows = sum(outputs * count for (outputs, _), count in step_shapes(config).items())
    assert stored_bytes(config, Storage.FLOAT32) == 4 * elements
    assert stored_bytes(config, Storage.BFLOAT16) == 2 * elements
    assert stored_bytes(config, Storage.INT8) == elements + 4 * rows


def test_all_products_take_the_sum_of_each_ones_fastest_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ways for each shape; the fastest counts, as often as the model has that shape."""
    taken = iter([3.0, 1.0, 2.0, 50.0, 40.0, 10.0])
    monkeypatch.setattr(products, "_seconds", lambda call: next(taken))
    sample = matrix_products({(3, 4): 5, (6, 7): 2}, rows=9)
    assert sample.take() == 5 * 1.0 + 2 * 10.0
    assert sample.tokens == 9


def test_every_way_computes_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whole numbers, so that no rounding hides a difference."""
    results: list[torch.Tensor] = []
    whole = torch.randint
    monkeypatch.setattr(torch, "randn", lambda *size, generator: whole(-4, 5, size, generator=generator).float())

    def keep(call: object) -> float:
        assert callable(call)
        results.append(call())
        return 1.0

    monkeypatch.setattr(products, "_seconds", keep)
    matrix_products({(3, 4): 1}, rows=2).take()
    direct, transposed, onednn = results
    assert direct.shape == (2, 3)
    assert direct.count_nonzero() > 0
    assert torch.equal(direct, transposed.t())
    assert torch.equal(direct, onednn)


def test_a_prefills_products_are_those_of_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    config = llama()
    seen: Counter[tuple[int, int]] = Counter()
    matrices_seen: set[int] = set()

    def counting(program: object, **_: object) -> object:
        def call(xs: list[torch.Tensor], matrices: list[Matrix]) -> list[torch.Tensor]:
            assert callable(program)
            outs: list[torch.Tensor] = program(xs, matrices)
            seen.update((out.shape[1], x_TI.shape[1]) for out, x_TI in zip(outs, xs, strict=True))
            matrices_seen.update(each.word.data_ptr() for each in matrices)
            assert {out.shape[0] for out in outs} == {7}
            return outs

        return call

    monkeypatch.setattr(products, "graph", counting)
    _, sample = prefill_products(prepare(RandomSource(config), Storage.FLOAT32, CPU), config, 7)
    assert sample.take() > 0
    assert seen == layer_shapes(config)
    assert len(matrices_seen) == seen.total()  # each once


@pytest.mark.parametrize("storage", list(Storage))
@pytest.mark.usefixtures("uncompiled")
def test_small_products_of_one_row_and_of_four_can_be_timed(storage: Storage) -> None:
    found = dict(small_products(storage, 128))
    assert list(found) == [small(storage, 128, 1), small(storage, 128, 4)]
    for sample in found.values():
        assert sample.take() > 0


def test_reading_takes_the_stored_bytes_over_the_bandwidth() -> None:
    limits = Limits(read_bytes_per_s=1e6, read_by="", gemm_flops_per_s=1.0, gemm_by="")
    key, measured = memory_limit(Storage.INT8, 1000, limits, rounds=3)
    assert key == reading(Storage.INT8, 1000)
    assert measured.timing.seconds == (1.004,) * 3  # a byte for each weight, four for each row
