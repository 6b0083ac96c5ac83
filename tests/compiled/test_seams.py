"""Where a model can be taken apart: into stages, into layers that come and go, and at each layer's two reductions."""

import inspect
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from twinfer.compiled import layers
from twinfer.compiled.layers import Cache
from twinfer.compiled.path import CompiledPath
from twinfer.compiled.programs import mark_dynamic
from twinfer.compiled.sequences import StaticSequences
from twinfer.compiled.steps import decode_program, eager, encode_program, prefill_program
from twinfer.compiled.weights import (
    Layer,
    Model,
    find_rotations,
    prepare,
    prepare_embedding,
    prepare_head,
    prepare_layer,
)
from twinfer.oracle.case import RandomPicker
from twinfer.oracle.models import RandomSource, draw_model_config
from twinfer.oracle.strategies import drawn
from twinfer.spec.config import LayerConfig, ModelConfig, Residual, RotaryConfig, RotaryLayout, Storage
from twinfer.spec.errors import RequestError, WeightError
from twinfer.spec.weights import LinearWeights

CPU = torch.device("cpu")
CAPACITY = 9
configs = drawn(lambda pick: draw_model_config(pick, context=20))
seeds = st.integers(0, 2**20)
storages = st.sampled_from(Storage)


def bits(tensor: Tensor) -> list[int]:
    values: list[int] = tensor.contiguous().view(torch.int32).flatten().tolist()
    return values


def stages(source: RandomSource, storage: Storage, cuts: list[int]) -> list[tuple[Model, ModelConfig]]:
    """The model cut before these layers; each part is prepared only from its own weights, the last one first."""
    config = source.config
    bounds = [0, *cuts, len(config.layers)]
    found: list[tuple[Model, ModelConfig]] = []
    for begin, end in reversed(list(pairwise(bounds))):
        part = replace(config, layers=config.layers[begin:end])
        weights = [source.layer(index) for index in range(begin, end)]
        prepared = [prepare_layer(*each, storage, CPU) for each in zip(weights, part.layers, strict=True)]
        frequencies = [each.attention.rotary_frequency_J for each in weights]
        embedding = prepare_embedding(source.embedding(), config, storage, CPU)
        model = Model(
            embedding=embedding if begin == 0 else None,
            layers=prepared,
            rotations=find_rotations(frequencies, part, CPU),
            head=prepare_head(source.head(), config, storage, CPU, tied=embedding.table) if not found else None,
            storage=storage,
            device=CPU,
            compute=torch.float32,
        )
        found.insert(0, (model, part))
    return found


def decoded(model: Model, config: ModelConfig, x_RM: Tensor | None) -> list[Tensor]:
    step_3R = torch.tensor([[1 % config.vocabulary, 0, 0], [3, 0, 5], [0, CAPACITY, 2 * CAPACITY]])
    caches = StaticSequences(config, 3, CAPACITY, CPU).caches
    return [decode_program(config, model.storage, eager)(model, caches, step_3R, torch.arange(7), x_RM)]


def prefilled(model: Model, config: ModelConfig, x_TM: Tensor | None) -> list[Tensor]:
    token_T, position_T = torch.arange(5) % config.vocabulary, torch.arange(5)
    caches = StaticSequences(config, 2, CAPACITY, CPU).caches
    start_1 = torch.tensor([CAPACITY])
    program = prefill_program(config, model.storage, eager)
    return [each for each in program(model, caches, token_T, position_T, start_1, position_T, x_TM) if each is not None]


def encoded(model: Model, config: ModelConfig, x_TM: Tensor | None) -> list[Tensor]:
    token_T, position_T = torch.arange(5) % config.vocabulary, torch.tensor([0, 1, 2, 0, 1])
    type_T = torch.zeros_like(token_T) if config.token_types else None
    program = encode_program(config, model.storage, eager)
    return [program(model, token_T, type_T, position_T, torch.tensor([0, 3, 5]), x_TM)]


PROGRAMS = [decoded, prefilled, encoded]


@pytest.mark.parametrize("run", PROGRAMS, ids=[each.__name__ for each in PROGRAMS])
@given(config=configs, seed=seeds, storage=storages, cuts=st.lists(st.integers(1, 3), max_size=3))
@settings(max_examples=25)
@torch.no_grad()
def test_stages_one_after_the_other_are_the_model(
    run: Callable[..., list[Tensor]], config: ModelConfig, seed: int, storage: Storage, cuts: list[int]
) -> None:
    """To the bit, wherever it is cut, or not at all."""
    source = RandomSource(config, seed)
    whole = run(prepare(source, storage, CPU), config, None)
    x: Tensor | None = None
    for model, part in stages(source, storage, sorted({cut for cut in cuts if cut < len(config.layers)})):
        out = run(model, part, x)
        x = out[0]
    assert [bits(each) for each in out] == [bits(each) for each in whole]


def test_a_tied_head_needs_the_table() -> None:
    config = replace(draw_model_config(RandomPicker(1)), embedding_size=None)
    weights = replace(RandomSource(config).head(), projection=None)
    with pytest.raises(WeightError, match="tied to the token table"):
        prepare_head(weights, config, Storage.FLOAT32, CPU)


@given(config=configs, seed=seeds)
def test_every_layer_has_its_own_rotation(config: ModelConfig, seed: int) -> None:
    """Frequencies and factor are the layer's, and no two rotations of the model are equal."""
    source = RandomSource(config, seed)
    rotations = prepare(source, Storage.FLOAT32, CPU).rotations
    for index, (layer, place) in enumerate(zip(config.layers, rotations.of_layer, strict=True)):
        frequency_J = source.layer(index).attention.rotary_frequency_J
        assert (place is None) == (layer.attention.rotary is None)
        if place is not None:
            assert layer.attention.rotary is not None
            assert frequency_J is not None
            assert rotations.different[place].attention_factor == layer.attention.rotary.attention_factor
            assert torch.equal(rotations.different[place].frequency_J, frequency_J.double())
    keys = [(each.attention_factor, *each.frequency_J.tolist()) for each in rotations.different]
    assert len(keys) == len(set(keys))


def test_rotations_are_compared_by_value_and_factor() -> None:
    """And each is a copy: the weights may go."""
    config = draw_model_config(RandomPicker(1))
    layer = replace(config.layers[0], attention=replace(config.layers[0].attention, alibi=False))

    def rotary(factor: float) -> LayerConfig:
        rotary = RotaryConfig(layout=RotaryLayout.HALF_SPLIT, size=2, attention_factor=factor)
        return replace(layer, attention=replace(layer.attention, rotary=rotary))

    plain = replace(layer, attention=replace(layer.attention, rotary=None))
    config = replace(config, layers=(rotary(1.0), rotary(1.0), plain, rotary(2.0), rotary(1.0)))
    frequencies = [torch.tensor([each]) for each in (0.5, 0.5, 0.5, 0.5, 0.25)]
    rotations = find_rotations(frequencies, config, CPU)
    assert rotations.of_layer == (0, 0, None, 1, 2)
    for each in frequencies:
        each.zero_()
    assert [each.frequency_J.tolist() for each in rotations.different] == [[0.5], [0.5], [0.25]]


class Streamed:
    """Layers that are prepared as they are asked for, and how many of them were ever alive at that time."""

    def __init__(self, source: RandomSource) -> None:
        self.source = source
        self.alive = 0

    def __iter__(self) -> Iterator[Layer]:
        made: list[weakref.ref[Tensor]] = []
        for index, config in enumerate(self.source.config.layers):
            layer = prepare_layer(self.source.layer(index), config, Storage.FLOAT32, CPU)
            made.append(weakref.ref(layer.qkv.word))
            self.alive = max(self.alive, sum(each() is not None for each in made))
            yield layer
            del layer


@pytest.mark.parametrize("run", PROGRAMS, ids=[each.__name__ for each in PROGRAMS])
@torch.no_grad()
def test_a_step_keeps_no_layer_longer_than_until_the_next(run: Callable[..., list[Tensor]]) -> None:
    """Six layers that come one by one: never more than the one in use and the next, and the same bits."""
    config = draw_model_config(RandomPicker(2), context=20)
    config = replace(config, layers=config.layers[:1] * 6)
    source = RandomSource(config)
    model, streamed = prepare(source, Storage.FLOAT32, CPU), Streamed(source)
    for _ in range(2):
        found = run(model._replace(layers=streamed), config, None)
        assert [bits(each) for each in found] == [bits(each) for each in run(model, config, None)]
    assert streamed.alive == 2


def layer_runs(config: LayerConfig, table: Any) -> dict[str, Callable[..., Tensor]]:
    """The three functions of a layer on some hidden vectors: weights and reduction to output."""
    hidden = 12
    x_TM = torch.randn(3, hidden, generator=torch.Generator().manual_seed(0))
    attention, place_T = config.attention, torch.arange(3)

    def cache() -> Cache:
        shape = 6, attention.kv_heads, attention.head_size
        return Cache(torch.zeros(shape), torch.zeros(shape))

    def decode(weights: Layer, reduce: Any) -> Tensor:
        mask = layers.DecodeMask(place_T[:, None].expand(-1, 2), torch.zeros(3, 2))
        where = table, place_T, place_T, place_T[:2], mask
        return layers.decode_layer(
            x_TM, weights, cache(), *where, config=config, storage=Storage.FLOAT32, reduce=reduce
        )

    def prefill(weights: Layer, reduce: Any) -> Tensor:
        where = table, place_T, place_T, torch.zeros(3, 3)
        return layers.prefill_layer(
            x_TM, weights, cache(), *where, config=config, storage=Storage.FLOAT32, reduce=reduce
        )

    def encode(weights: Layer, reduce: Any) -> Tensor:
        bounds = torch.tensor([0, 3])
        return layers.encode_layer(x_TM, weights, table, bounds, config=config, storage=Storage.FLOAT32, reduce=reduce)

    return {"decode": decode, "prefill": prefill, "encode": encode}


def doubled(weights: LinearWeights) -> LinearWeights:
    return LinearWeights(weight_NI=2 * weights.weight_NI, bias_N=None if weights.bias_N is None else 2 * weights.bias_N)


@pytest.mark.parametrize("kind", ["decode", "prefill", "encode"])
@given(config=configs, seed=seeds)
@settings(max_examples=40)
@torch.no_grad()
def test_what_both_sub_layers_give_is_reduced_before_anything_else(kind: str, config: ModelConfig, seed: int) -> None:
    """A reduction that doubles is the layer whose two output matrices are doubled, to the bit: 2 rounds nothing."""
    config = replace(config, hidden=12, embedding_size=None)
    layer = config.layers[0]
    weights = RandomSource(config, seed).layer(0)
    twice = replace(
        weights,
        attention=replace(weights.attention, output=doubled(weights.attention.output)),
        mlp=replace(weights.mlp, down=doubled(weights.mlp.down)),
    )
    plain, other = (prepare_layer(each, layer, Storage.FLOAT32, CPU) for each in (weights, twice))
    rotary = layer.attention.rotary
    table = None if rotary is None else (torch.full((3, rotary.size // 2), 0.6), torch.full((3, rotary.size // 2), 0.8))
    run = layer_runs(layer, table)[kind]
    calls = 0

    def double(x_TM: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return 2 * x_TM

    assert bits(run(plain, double)) == bits(run(other, layers.identity))
    assert calls == (2 if layer.residual is Residual.SEQUENTIAL else 1)


def test_dynamic_dims_are_named_after_arguments_that_there_are() -> None:
    """In every piece of every program; a misspelled one would leave a size fixed."""

    def piece(function: Callable[..., Any], dynamic: Any) -> Callable[..., Any]:
        assert set(dynamic) <= set(inspect.signature(function).parameters)
        return function

    config = draw_model_config(RandomPicker(2))
    for many in (False, True):
        decode_program(config, Storage.FLOAT32, piece, many=many)
    prefill_program(config, Storage.FLOAT32, piece)
    encode_program(config, Storage.FLOAT32, piece)


def test_dynamic_dims_are_marked_in_all_tensors_of_an_argument() -> None:
    def function(x: Tensor, three: tuple[Tensor, Tensor | None, Tensor], y: Tensor) -> Tensor:
        raise AssertionError("only its names count")

    x, first, second, y = (torch.zeros(3, 3) for _ in range(4))
    mark_dynamic(function, (x, (first, None, second), y), {"x": (0, 1), "three": (1,)})
    marked = [getattr(each, "_dynamo_dynamic_indices", set()) for each in (x, first, second, y)]
    assert marked == [{0, 1}, {1}, {1}, set()]
    with pytest.raises(KeyError, match="z"):
        mark_dynamic(function, (x, (first, None, second), y), {"z": (0,)})


def test_a_path_of_a_prepared_model_is_the_path_of_its_source() -> None:
    """To the bit, and on the same memory; a part of a model is refused."""
    config = draw_model_config(RandomPicker(3), context=20)
    source, tokens = RandomSource(config, 3), [torch.arange(4) % config.vocabulary]
    path = CompiledPath(source, storage=Storage.INT8, mode="eager")
    other = CompiledPath.from_model(path.model, config, mode="eager")
    assert other.model is path.model
    assert bits(other.extend(other.open(1, 5), tokens)) == bits(path.extend(path.open(1, 5), tokens))
    for missing in ({"embedding": None}, {"head": None}):
        with pytest.raises(RequestError, match="lacks its embedding or its head"):
            CompiledPath.from_model(path.model._replace(**missing), config, mode="eager")
