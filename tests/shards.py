"""What each rank must hold of a model, found element by element from heads that are dealt out, without the table in
`spec.shard`."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from twinfer.checkpoint.table import Heads, Table
from twinfer.oracle.case import Picker
from twinfer.oracle.models import draw_model_config
from twinfer.oracle.trial import same_bits
from twinfer.spec.config import INT4_GROUP, AttentionConfig, LayerConfig, ModelConfig, Storage
from twinfer.spec.moe import MoeConfig
from twinfer.spec.shapes import is_buffer
from twinfer.spec.shard import ExpertShard, Shard, degrees
from twinfer.spec.weights import (
    EmbeddingWeights,
    HeadWeights,
    LayerWeights,
    WeightSource,
    tensors,
    validate_embedding,
    validate_head,
    validate_layer,
)

Part = EmbeddingWeights | LayerWeights | HeadWeights
FEW = (1, 2, 3, 4)
"""Numbers of ranks that are tried, where a model can be shared by so many."""


def parts(source: WeightSource, shard: Shard | None = None) -> Iterator[tuple[int | str, Part]]:
    """Every part of a model, or of a rank's share, checked against its config."""
    embedding, head, config = source.embedding(shard), source.head(shard), source.config
    validate_embedding(embedding, config, shard)
    validate_head(head, config, shard)
    yield "embedding", embedding
    for index in range(len(config.layers)):
        layer = source.layer(index, shard)
        validate_layer(layer, config, index, shard)
        yield index, layer
    yield "head", head


def expected(part: int | str, whole: Part, config: ModelConfig, shard: Shard) -> dict[str, Tensor]:
    """The rank's share of a whole part, picked one element after the other."""
    held = {}
    for name, tensor in tensors(whole):
        rows, columns = _elements(part, name, config, shard)
        if rows == []:
            continue
        first = 1 if ".experts." in name else 0  # the experts come before their rows
        share = tensor
        if first and shard.experts is not None:
            place, count = shard.experts, len(tensor)
            share = tensor[[expert for expert in range(count) if expert * place.ranks // count == place.rank]]
        share = share if rows is None else share.index_select(first, torch.tensor(rows))
        held[name] = share if columns is None else share.index_select(first + 1, torch.tensor(columns))
    return held


def _elements(
    part: int | str, name: str, config: ModelConfig, shard: Shard
) -> tuple[list[int] | None, list[int] | None]:
    """Which rows and which columns; None is all, and no rows at all is a tensor that the rank does not hold."""
    rank, ranks = shard.rank, shard.ranks
    if name == "token_VW" or (part == "head" and name in ("projection.weight_NI", "bias_V")):
        piece = -(-config.vocabulary // ranks)
        return [token for token in range(config.vocabulary) if token // piece == rank], None
    if isinstance(part, str):
        return None, None
    layer = config.layers[part]
    query, key_value = _dealt(layer.attention, shard)
    match name.split("."):
        case ["mlp", "experts" | "shared" | "residual" as beside, matrix, tensor] if isinstance(layer.mlp, MoeConfig):
            mlp = {"experts": layer.mlp.expert, "shared": layer.mlp.shared, "residual": layer.mlp.residual}[beside]
            assert mlp is not None
            if beside == "experts" and shard.experts is not None:
                shard = Shard(rank=shard.experts.slice_rank, ranks=shard.experts.slices)
            return _of_mlp(matrix, tensor.replace("_E", "_"), mlp.width, shard)
        case ["mlp", "gate" | "up" | "down" as matrix, tensor]:
            return _of_mlp(matrix, tensor, layer.dense_mlp.width, shard)
    match name.split("."):
        case ["attention", "alibi_slope_H" | "sink_H"]:
            return sorted({element // layer.attention.head_size for element in query}), None
        case ["attention", "query" | "query_norm", _]:
            return query, None
        case ["attention", "key" | "value" | "key_norm", _]:
            return key_value, None
        case ["attention", "output", "weight_NI"]:
            return None, query
        case [_, "output", "bias_N"]:
            return None if rank == 0 else [], None
    return None, None


def _of_mlp(matrix: str, tensor: str, width: int, shard: Shard) -> tuple[list[int] | None, list[int] | None]:
    own = [element for element in range(width) if element * shard.ranks // width == shard.rank]
    if matrix != "down":
        return own, None
    return (None, own) if tensor == "weight_NI" else (None if shard.rank == 0 else [], None)


def _dealt(attention: AttentionConfig, shard: Shard) -> tuple[list[int], list[int]]:
    """Elements of the query heads that the rank is dealt, and of the key/value heads that these read."""
    heads = [head for head in range(attention.heads) if head * shard.ranks // attention.heads == shard.rank]
    read = sorted({head // (attention.heads // attention.kv_heads) for head in heads})
    elements = range(attention.head_size)
    return (
        [head * attention.head_size + element for head in heads for element in elements],
        [head * attention.head_size + element for head in read for element in elements],
    )


def assert_shards_join(source: WeightSource, storage: Storage | None = None) -> list[int]:
    """Each rank holds its elements, bit by bit, and all ranks together hold the model; returns the degrees tried."""
    whole = dict(parts(source))
    tried = [ranks for ranks in degrees(source.config, storage) if ranks in FEW]
    for ranks in tried:
        shares: dict[int | str, list[dict[str, Tensor]]] = {part: [] for part in whole}
        for rank in range(ranks):
            shard = Shard(rank=rank, ranks=ranks)
            for part, share in parts(source, shard):
                held, wanted = dict(tensors(share)), expected(part, whole[part], source.config, shard)
                assert held.keys() == wanted.keys(), (part, shard)
                for name, tensor in held.items():
                    assert same_bits(tensor, wanted[name]), f"{part} {name} of rank {rank} of {ranks}"
                shares[part].append(held)
        for part, each in shares.items():
            _assert_join(part, whole[part], each, source.config)
    return tried


def _assert_join(part: int | str, whole: Part, shares: list[dict[str, Any]], config: ModelConfig) -> None:
    """The ranks' pieces, one after the other, are the tensor; of replicated ones, each once."""
    for name, tensor in tensors(whole):
        pieces = [share[name] for share in shares if name in share]
        kv_name = name.startswith(("attention.key", "attention.value"))
        if kv_name and isinstance(part, int):
            copies = max(1, len(shares) // config.layers[part].attention.kv_heads)
            pieces = pieces[::copies]
        if pieces[0].shape == tensor.shape:
            continue  # each rank holds all of it
        dimension = next(i for i, size in enumerate(pieces[0].shape) if size != tensor.shape[i])
        assert same_bits(torch.cat(pieces, dimension), tensor), f"{part} {name}"


def assert_experts_join(
    source: WeightSource, storage: Storage | None = None, after_read: Callable[[LayerWeights], None] | None = None
) -> list[tuple[int, int]]:
    """Ranks hold their experts, or slices of these, bit by bit, and all ranks all of them; all else by another degree.

    Returns the numbers of expert ranks and slices tried. `after_read` gets each share right after it is read.
    """
    mixtures = [index for index, layer in enumerate(source.config.layers) if isinstance(layer.mlp, MoeConfig)]
    tried = [(ranks, slices) for ranks in FEW for slices in FEW[::-1] if _fits(source.config, storage, ranks, slices)]
    for ranks, slices in tried:
        tensor = max(each for each in degrees(source.config, storage, ExpertShard(rank=0, ranks=1)) if each in FEW)
        for index in mixtures:
            whole = source.layer(index)
            held: dict[tuple[int, int], dict[str, Tensor]] = {}
            for rank, slice_rank in product(range(ranks), range(slices)):
                place = ExpertShard(rank=rank, ranks=ranks, slice_rank=slice_rank, slices=slices)
                shard = Shard(rank=(rank + slice_rank) % tensor, ranks=tensor, experts=place)
                share = source.layer(index, shard)
                if after_read is not None:
                    after_read(share)
                validate_layer(share, source.config, index, shard)
                held[rank, slice_rank] = dict(tensors(share))
                wanted = expected(index, whole, source.config, shard)
                assert held[rank, slice_rank].keys() == wanted.keys(), (index, shard)
                for name, each in held[rank, slice_rank].items():
                    assert same_bits(each, wanted[name]), f"{index} {name} of {shard}"
            for name, each in tensors(whole):
                if ".experts." in name:
                    sliced = -1 if name.endswith("down.weight_ENI") else 1
                    experts = [
                        torch.cat(
                            [part[name] for slice_rank in range(slices) if name in (part := held[rank, slice_rank])],
                            sliced,
                        )
                        for rank in range(ranks)
                    ]
                    assert same_bits(torch.cat(experts), each), f"{index} {name}"
    return tried


def _fits(config: ModelConfig, storage: Storage | None, ranks: int, slices: int) -> bool:
    """Report whether every mixture's experts divide so."""
    mixtures = [layer.mlp for layer in config.layers if isinstance(layer.mlp, MoeConfig)]
    group = INT4_GROUP if storage is Storage.INT4 and slices > 1 else 1
    return all(mlp.router.experts % ranks == 0 and mlp.expert.width % (slices * group) == 0 for mlp in mixtures)


def shareable(pick: Picker) -> ModelConfig:
    """A drawn config that several numbers of ranks can share, a vocabulary that few divide."""
    config = draw_model_config(pick)
    kv_heads, width = pick.choice([1, 2, 3, 4, 6, 12]), 12 * pick.integer(1, 3)

    def widened(layer: LayerConfig) -> LayerConfig:
        attention = replace(layer.attention, heads=12, kv_heads=kv_heads)
        return replace(layer, attention=attention, mlp=replace(layer.mlp, width=width))

    return replace(config, vocabulary=pick.integer(13, 40), layers=tuple(widened(layer) for layer in config.layers))


def assert_reads_no_further(source: WeightSource, store: Any, table: Table) -> None:
    once = {name for entry in table.layer if entry.heads is Heads.SHARED for name in entry.fills}
    config = source.config
    for ranks in (ranks for ranks in degrees(config) if ranks in FEW):
        for rank in range(ranks):
            store.bytes, held = 0, 0
            for part, share in parts(source, Shard(rank=rank, ranks=ranks)):
                for tensor_name, tensor in tensors(share):
                    if isinstance(part, int) and tensor_name in once:
                        held += tensor.element_size() * config.layers[part].attention.head_size
                    elif not is_buffer(tensor_name):
                        held += tensor.nbytes
            assert store.bytes == held, f"rank {rank} of {ranks}"
