"""What a rank stores, unpacked, beside its elements of what one rank stores, picked one by one."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twinfer.compiled.experts import one_expert
from twinfer.compiled.linear import expanded
from twinfer.compiled.moe import Mlp, Moe
from twinfer.compiled.packing import Matrix
from twinfer.compiled.weights import Layer, Model, prepare
from twinfer.oracle.trial import same_bits
from twinfer.parallel.path import RankPath
from twinfer.spec.config import LayerConfig, MlpConfig, Storage
from twinfer.spec.parallel import stage_layers
from twinfer.spec.weights import LayerWeights, WeightSource, assemble, tensors

sys.path.insert(0, str(Path(__file__).parent.parent))
from shards import expected


def differing(path: RankPath, source: WeightSource, storage: Storage) -> list[str]:
    """Matrices and biases of this rank that are not its elements of the whole model's, bit for bit."""
    groups, config = path.wire.groups, source.config
    shard, place = groups.parallel.shard(groups.rank), groups.place
    whole = prepare(source, storage, torch.device("cpu"))
    found = []
    numbers = stage_layers(len(config.layers), groups.parallel.pipeline)[place.stage]
    whole_layers = tuple(whole.layers)
    for number, mine, local in zip(numbers, path.share.model.layers, path.share.config.layers, strict=True):
        named = dict(tensors(source.layer(number)))
        unpacked = dict(of_layer(whole_layers[number], config.layers[number], config.hidden, storage))
        assert unpacked.keys() <= named.keys()
        wanted = expected(number, assemble(LayerWeights, named | unpacked), config, shard)
        wanted = {name: wanted[name] for name in unpacked if name in wanted}
        got = dict(of_layer(mine, local, config.hidden, storage))
        assert wanted.keys() <= got.keys()
        for name, tensor in got.items():
            right = same_bits(tensor, wanted[name]) if name in wanted else not tensor.any()  # another rank's bias
            found += [] if right else [f"{number} {name}"]
    first = int(path.share.first_token_1)
    for name, one, other in _tables(path.share.model, whole):
        rows, of_whole = (expanded(each, storage, config.table_width, torch.float64) for each in (one, other))
        own = slice(first, first + path.share.tokens)
        found += [] if same_bits(rows[: path.share.tokens].contiguous(), of_whole[own].contiguous()) else [name]
    return found


def _tables(mine: Model, whole: Model) -> Iterator[tuple[str, Matrix, Matrix]]:
    assert whole.embedding is not None
    assert whole.head is not None
    if mine.embedding is not None:
        yield "token table", mine.embedding.table, whole.embedding.table
    if mine.head is not None:
        yield "head", mine.head.projection, whole.head.projection


def of_layer(layer: Layer, config: LayerConfig, hidden: int, storage: Storage) -> Iterator[tuple[str, Tensor]]:
    """Every matrix and bias of a layer by its dotted name, in float64."""
    attention = config.attention
    of_heads = attention.heads * attention.head_size
    sizes = of_heads, *[attention.kv_heads * attention.head_size] * 2
    names = [f"attention.{each}" for each in ("query", "key", "value")]
    yield from _split(names, sizes, layer.qkv, hidden, storage)
    yield from _split(["attention.output"], [hidden], layer.output, of_heads, storage)
    if isinstance(config.mlp, MlpConfig):
        assert isinstance(layer.mlp, Mlp)
        yield from _of_mlp("mlp", layer.mlp, config.mlp, hidden, storage)
        return
    assert isinstance(layer.mlp, Moe)
    yield from _of_experts(layer.mlp.experts, config.mlp.expert, hidden, storage)
    for name, part, which in (
        ("shared", layer.mlp.shared, config.mlp.shared),
        ("residual", layer.mlp.residual, config.mlp.residual),
    ):
        if part is not None and which is not None:
            yield from _of_mlp(f"mlp.{name}", part, which, hidden, storage)


def _of_mlp(name: str, mlp: Mlp, config: MlpConfig, hidden: int, storage: Storage) -> Iterator[tuple[str, Tensor]]:
    names = [f"{name}.gate", f"{name}.up"] if config.gated else [f"{name}.up"]
    yield from _split(names, [config.width] * len(names), mlp.up, hidden, storage)
    yield from _split([f"{name}.down"], [hidden], mlp.down, config.width, storage)


def _of_experts(experts: Mlp, config: MlpConfig, hidden: int, storage: Storage) -> Iterator[tuple[str, Tensor]]:
    each: list[dict[str, Tensor]] = []
    for place in range(len(experts.up.word)):
        one = Mlp(one_expert(experts.up, place), one_expert(experts.down, place))
        each.append(dict(_of_mlp("mlp.experts", one, config, hidden, storage)))
    for name in each[0]:
        stacked = name.replace("weight_NI", "weight_ENI").replace("bias_N", "bias_EN")
        yield stacked, torch.stack([of_one[name] for of_one in each])


def _split(names: list[str], sizes: Any, matrix: Matrix, inputs: int, storage: Storage) -> Iterator[tuple[str, Tensor]]:
    weight_NI = expanded(matrix, storage, inputs, torch.float64)[: sum(sizes)].contiguous()
    for name, piece_NI in zip(names, torch.split(weight_NI, list(sizes)), strict=True):
        yield f"{name}.weight_NI", piece_NI
    if matrix.bias_N is not None:
        for name, piece_N in zip(names, torch.split(matrix.bias_N[: sum(sizes)].double(), list(sizes)), strict=True):
            yield f"{name}.bias_N", piece_N
