"""Matrix products alone: those of a model, by the ways that torch has for them and as the prefill graph does them; and
square ones of a few rows, as the decode graph does them.

Shapes: T rows, I inputs, N outputs.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ..compiled.linear import linear_decode, linear_prefill, product
from ..compiled.moe import Mlp
from ..compiled.packing import Matrix, pack, quantize
from ..compiled.programs import graph
from ..compiled.weights import Layer, Model
from ..spec.ambient import CPU, pinned
from ..spec.config import INT4_GROUP, Head, MlpConfig, ModelConfig, Storage
from ..spec.counts import Count
from ..spec.moe import MoeConfig
from .columns import Column, in_turn
from .rows import Limits
from .side_by_side import Key, Measured, ModelSample
from .targets import PRODUCTS, products_of, reading, small
from .timing import LEAST_SAMPLE_S, Timing

Shape = tuple[int, int]
"""Outputs and inputs."""


def layer_shapes(config: ModelConfig) -> "Counter[Shape]":
    """Of every weight product in the layers, how often a step does it; Q, K and V are one, and so are gate and up."""
    counts: Counter[Shape] = Counter()
    for layer in config.layers:
        attention, mlp, hidden = layer.attention, layer.mlp, config.hidden
        mixed = attention.heads * attention.head_size
        counts[mixed + 2 * attention.kv_heads * attention.head_size, hidden] += 1
        counts[hidden, mixed] += 1
        for each, times in _mlps(mlp):
            counts[each.width * (2 if each.gated else 1), hidden] += times
            counts[hidden, each.width] += times
    return counts


def _mlps(config: MlpConfig | MoeConfig) -> list[tuple[MlpConfig, int]]:
    """Return every MLP that a token passes, and how often."""
    if isinstance(config, MlpConfig):
        return [(config, 1)]
    beside = [(each, 1) for each in (config.shared, config.residual) if each is not None]
    return [(config.expert, config.router.top_k), *beside]


def step_shapes(config: ModelConfig) -> "Counter[Shape]":
    """The same, the head included."""
    head = Counter({(config.vocabulary, config.embedding_size or config.hidden): 1})
    return layer_shapes(config) + (head if config.head is not Head.NONE else Counter())


def flops(shapes: Mapping[Shape, int], rows: int) -> int:
    """Multiplications and additions.

    >>> flops({(2, 3): 4}, rows=5)
    240
    """
    return sum(2 * rows * outputs * inputs * count for (outputs, inputs), count in shapes.items())


@torch.no_grad()
def matrix_products(shapes: Mapping[Shape, int], rows: int) -> ModelSample:
    """What all these products take if each is done by whichever way of torch's is fastest at that moment.

    Either operand first, and oneDNN's product, which the compiled path uses too: a limit is only one if nothing is
    faster. Operands stay in the caches where they fit.
    """
    generator = torch.Generator().manual_seed(0)
    operands = [
        (torch.randn(rows, inputs, generator=generator), torch.randn(outputs, inputs, generator=generator), count)
        for (outputs, inputs), count in shapes.items()
    ]

    @torch.no_grad()
    def take() -> float:
        total = 0.0
        for x_TI, weight_NI, count in operands:
            x_IT = x_TI.t().contiguous()
            ways: list[Callable[[], object]] = [
                lambda x=x_TI, w=weight_NI: functional.linear(x, w),  # type: ignore[misc]
                lambda x=x_IT, w=weight_NI: w @ x,  # type: ignore[misc]
                lambda x=x_TI, w=weight_NI: product(x, w, None),  # type: ignore[misc]
            ]
            total += count * min(map(_seconds, ways))
        return total

    return ModelSample(take=take, tokens=rows)


def prefill_products(model: Model, config: ModelConfig, rows: int) -> tuple[Key, ModelSample]:
    """What the layers' products take, of float32 weights, compiled as in the prefill graph and nothing between them."""
    program = graph(_layer_products, keep_guards=True)
    generator = torch.Generator().manual_seed(0)
    widths = {inputs for _, inputs in layer_shapes(config)}
    inputs = {width: torch.randn(rows, width, generator=generator) for width in widths}
    given = [(_matrices(layer), [inputs[each.word.shape[1]] for each in _matrices(layer)]) for layer in model.layers]

    def take() -> float:
        with pinned(CPU, torch.get_num_threads()):
            start = time.perf_counter()
            for matrices, xs in given:
                program(xs, matrices)
            return time.perf_counter() - start

    return Key(PRODUCTS, products_of(rows).what), ModelSample(take=take, tokens=rows)


def _layer_products(xs: Sequence[Tensor], matrices: Sequence[Matrix]) -> list[Tensor]:
    return [linear_prefill(x_TI, each, Storage.FLOAT32) for x_TI, each in zip(xs, matrices, strict=True)]


def _matrices(layer: Layer) -> list[Matrix]:
    assert isinstance(layer.mlp, Mlp)
    return [layer.qkv, layer.output, *layer.mlp]


def small_products(storage: Storage, size: int) -> Iterator[tuple[Key, ModelSample]]:
    """A square product for one row and for four, the matrix always read from memory: many copies take turns."""
    weight = pack(quantize(torch.randn(size, size, generator=torch.Generator().manual_seed(0)), storage))
    for rows in (1, 4):

        def program(x_RI: Tensor, weight: Matrix) -> Tensor:
            return linear_decode(x_RI, weight, storage)

        x_RI = torch.randn(rows, size, generator=torch.Generator().manual_seed(1))
        column = Column(program=program, arguments={"x_RI": x_RI, "weight": weight}, from_memory=("weight",))
        compiled = graph(program, keep_guards=True)

        def take(column: Column = column, compiled: Callable[..., object] = compiled) -> float:
            return _pinned_seconds(in_turn(compiled, column.copies()))  # gigabytes where a cache is large: not kept

        yield small(storage, size, rows), ModelSample(take=take)


def memory_limit(storage: Storage, size: int, limits: Limits, rounds: int) -> tuple[Key, Measured]:
    """What reading that matrix would take at this machine's bandwidth, as if measured in every round."""
    groups = size * -(-size // INT4_GROUP)
    stored = Count(matrix=size * size, rows=size, groups=groups).bytes(storage)
    seconds = stored / limits.read_bytes_per_s
    return reading(storage, size), Measured(timing=Timing(seconds=(seconds,) * rounds, calls=1))


def _pinned_seconds(call: Callable[[], object]) -> float:
    with pinned(CPU, torch.get_num_threads()):
        return _seconds(call)


def _seconds(call: Callable[[], object]) -> float:
    """Of one call, on average over as many as take a while; one is made before and not counted."""
    call()
    calls, start = 0, time.perf_counter()
    while (taken := time.perf_counter() - start) < 10 * LEAST_SAMPLE_S:
        call()
        calls += 1
    return taken / calls
