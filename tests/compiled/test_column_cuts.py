"""Quantize, then slice: what ranks pack of a layer is, put together, what one rank packs, bit by bit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from twinfer.checkpoint import open_model
from twinfer.compiled.packing import Matrix, columns_of
from twinfer.compiled.weights import Layer, prepare_layer
from twinfer.converting import convert
from twinfer.oracle.case import RandomPicker
from twinfer.oracle.models import RandomSource
from twinfer.oracle.trial import same_bits
from twinfer.spec.column_cuts import column_absmax, with_absmax
from twinfer.spec.config import INT4_GROUP, Activation, LayerConfig, MlpConfig, ModelConfig, Storage
from twinfer.spec.moe import MoeConfig, router
from twinfer.spec.parallel import ParallelConfig
from twinfer.spec.shard import local_layer
from twinfer.spec.weights import WeightSource

from ..checkpoint.test_convert import checkpoint_of, quiet
from ..checkpoint.test_shards import Denormal
from ..shards import shareable

CPU = torch.device("cpu")
PARALLEL = ParallelConfig(data=3, tensor=2, expert=3, expert_slices=2)


def config() -> ModelConfig:
    """A dense layer and a mixture with an MLP beside it; no width of hidden vectors fills blocks of packed rows."""
    drawn = shareable(RandomPicker(3))
    one = drawn.layers[0]
    attention = replace(one.attention, heads=4, kv_heads=2, head_size=INT4_GROUP // 2)
    mlp = MlpConfig(width=2 * INT4_GROUP, activation=Activation.GELU_TANH, gated=True, bias=True)
    moe = MoeConfig(router=router("mixtral", experts=6, top_k=2), expert=mlp, shared=replace(mlp, width=4 * INT4_GROUP))
    layers = tuple(replace(one, attention=attention, mlp=each) for each in (mlp, moe))
    return replace(drawn, layers=layers, vocabulary=9)


def whole_rows(values: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The all-reduce of the largest: of experts in slice groups, of all else in tensor groups."""
    found: list[dict[str, Tensor]] = [{} for _ in values]
    for groups, of_experts in ((PARALLEL.tensor_groups, False), (PARALLEL.slice_groups, True)):
        for group in groups:
            for name in values[group[0]]:
                if name.startswith("mlp.experts.") is of_experts:
                    largest = torch.stack([values[rank][name] for rank in group]).amax(0)
                    for rank in group:
                        found[rank][name] = largest
    return found


def stored(matrix: Matrix, storage: Storage, inputs: int) -> Tensor:
    """The float64 weights [N, I] that a matrix holds."""
    if storage is Storage.FLOAT32:
        return matrix.word.double()
    scale_BU = None
    if matrix.scale_N is not None:
        fill = torch.zeros(matrix.word.shape[0] * matrix.word.shape[2] - len(matrix.scale_N))
        scale_BU = torch.cat([matrix.scale_N, fill]).view(matrix.word.shape[0], -1).double()
    groups = (None if each is None else each.double() for each in (matrix.scale_BGU, matrix.min_BGU))
    weight_IN = columns_of(matrix.word.view(torch.int32), scale_BU, *groups, storage, torch.float64)
    return weight_IN[:inputs, : matrix.outputs].t()


def expert(matrix: Matrix, place: int) -> Matrix:
    parts = {
        name: None if part is None else part[place] for name, part in matrix._asdict().items() if name != "outputs"
    }
    return Matrix(**parts, outputs=matrix.outputs)


def column_cut(layer: Layer, which: LayerConfig, storage: Storage) -> dict[str, list[Tensor]]:
    """The stored weights of what is cut by columns: one for each expert, or a single one."""
    attention = which.attention
    found = {"attention": [stored(layer.output, storage, attention.heads * attention.head_size)]}
    if isinstance(which.mlp, MlpConfig):
        return found | {"mlp": [stored(layer.mlp.down, storage, which.mlp.width)]}
    assert which.mlp.shared is not None
    down = layer.mlp.experts.down
    experts = [stored(expert(down, place), storage, which.mlp.expert.width) for place in range(len(down.word))]
    return found | {"experts": experts, "shared": [stored(layer.mlp.shared.down, storage, which.mlp.shared.width)]}


def joined(
    source: WeightSource,
    index: int,
    storage: Storage,
    reduce: Callable[[list[dict[str, Tensor]]], list[dict[str, Tensor]]],
) -> dict[str, list[Tensor]]:
    """The same, put together from what ranks pack of their shares."""
    layer = source.config.layers[index]
    shares = [source.layer(index, PARALLEL.shard(rank)) for rank in range(PARALLEL.stage_ranks)]
    held = []
    for rank, absmax in enumerate(reduce([column_absmax(share) for share in shares])):
        local = local_layer(layer, PARALLEL.tensor, PARALLEL.shard(rank).experts)
        packed = prepare_layer(with_absmax(shares[rank], absmax), local, storage, CPU)
        held.append(column_cut(packed, local, storage))
    whole = {name: [torch.cat([held[rank][name][0] for rank in (2, 3)], 1)] for name in held[0] if name != "experts"}
    if "experts" in held[0]:
        whole["experts"] = [
            torch.cat(pair, 1)
            for first, second in ((0, 3), (1, 4), (2, 5))  # slice groups
            for pair in zip(held[first]["experts"], held[second]["experts"], strict=True)
        ]
    return whole


def differing(source: WeightSource, storage: Storage, reduce: Callable[..., list[dict[str, Tensor]]]) -> list[str]:
    """What is not stored as one rank stores it."""
    found = []
    for index, layer in enumerate(source.config.layers):
        alone = column_cut(prepare_layer(source.layer(index), layer, storage, CPU), layer, storage)
        together = joined(source, index, storage, reduce)
        assert alone.keys() == together.keys()
        for name, tensors in alone.items():
            if not all(same_bits(*each) for each in zip(tensors, together[name], strict=True)):
                found.append(f"{index} {name}")
    return found


@pytest.mark.parametrize("storage", Storage)
@pytest.mark.parametrize("seed", [0, 1])
def test_ranks_store_what_one_rank_stores(storage: Storage, seed: int, tmp_path: Path) -> None:
    """Of drawn weights, rows with denormal scales among them, and of a folder in that storage."""
    source = Denormal(config(), seed)
    assert not differing(source, storage, whole_rows)
    convert(checkpoint_of(source), tmp_path / "out", storage, quiet)
    assert not differing(open_model(str(tmp_path / "out")).source, storage, whole_rows)


def test_scales_of_the_slice_are_seen() -> None:
    """In int8 only: int4 is cut between its groups."""
    for storage in Storage:
        found = differing(RandomSource(config()), storage, lambda values: values)
        every = ["0 attention", "0 mlp", "1 attention", "1 experts", "1 shared"]
        assert found == (every if storage is Storage.INT8 else [])
