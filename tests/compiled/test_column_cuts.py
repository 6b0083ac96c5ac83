"""Quantize, then slice: what ranks pack of a layer is, put together, what one rank packs, bit by bit."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

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


OfGroup = Callable[[list[Tensor], int], Tensor]
"""What the ranks of a group and a place among them get of the absmaxes that each of them found."""


def largest(absmax: list[Tensor], place: int) -> Tensor:
    """An all-reduce of maxima."""
    return torch.stack(absmax).amax(0)


class Meeting:
    """Where the threads of a group exchange tensors."""

    def __init__(self, group: tuple[int, ...], of_group: OfGroup) -> None:
        self._group, self._of_group = group, of_group
        self._barrier, self._found = Barrier(len(group), timeout=60), dict[int, Tensor]()

    def of_rows(self, rank: int) -> Callable[[Tensor], Tensor]:
        def call(absmax_N: Tensor) -> Tensor:
            self._found[rank] = absmax_N
            self._barrier.wait()
            result = self._of_group([self._found[each] for each in self._group], self._group.index(rank))
            self._barrier.wait()
            return result

        return call


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


def joined(source: WeightSource, index: int, storage: Storage, of_group: OfGroup) -> dict[str, list[Tensor]]:
    """The same, put together from what ranks pack of their shares, each in a thread of its own."""
    layer = source.config.layers[index]
    tensor, slices = (
        {rank: meeting for group in groups for meeting in (Meeting(group, of_group),) for rank in group}
        for groups in (PARALLEL.tensor_groups, PARALLEL.slice_groups)
    )

    def packed(rank: int) -> dict[str, list[Tensor]]:
        shard = PARALLEL.shard(rank)
        local = local_layer(layer, PARALLEL.tensor, shard.experts)
        ways = {"of_rows": tensor[rank].of_rows(rank), "of_expert_rows": slices[rank].of_rows(rank)}
        return column_cut(prepare_layer(source.layer(index, shard), local, storage, CPU, **ways), local, storage)

    with ThreadPoolExecutor(PARALLEL.stage_ranks) as pool:
        held = list(pool.map(packed, range(PARALLEL.stage_ranks)))
    whole = {name: [torch.cat([held[rank][name][0] for rank in (2, 3)], 1)] for name in held[0] if name != "experts"}
    if "experts" in held[0]:
        whole["experts"] = [
            torch.cat(pair, 1)
            for first, second in ((0, 3), (1, 4), (2, 5))  # slice groups
            for pair in zip(held[first]["experts"], held[second]["experts"], strict=True)
        ]
    return whole


def differing(source: WeightSource, storage: Storage, of_group: OfGroup) -> list[str]:
    """What is not stored as one rank stores it."""
    found = []
    for index, layer in enumerate(source.config.layers):
        alone = column_cut(prepare_layer(source.layer(index), layer, storage, CPU), layer, storage)
        together = joined(source, index, storage, of_group)
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
    assert not differing(source, storage, largest)
    convert(checkpoint_of(source), tmp_path / "out", storage, quiet)
    assert not differing(open_model(str(tmp_path / "out")).source, storage, largest)


def test_scales_of_the_slice_are_seen() -> None:
    """In int8 only: int4 is cut between its groups."""
    for storage in Storage:
        found = differing(RandomSource(config()), storage, lambda absmax, place: absmax[place])
        every = ["0 attention", "0 mlp", "1 attention", "1 experts", "1 shared"]
        assert found == (every if storage is Storage.INT8 else [])
