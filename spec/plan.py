"""What a job of many ranks will hold and send, from the config alone: formulas over shapes, nothing is allocated.

One call passes T new tokens of a sequence in each data group through all stages, in pieces (`prompt_pieces`), and
scores the last of them. Counted are messages and bytes that cross from rank to rank, by the algorithms that the
reference's ledger assumes: rings for all-reduce and all-gather, direct messages for all-to-all. Experts count as chosen
equally often; where a rank has fewer rows than there are experts, bytes are the mean, and messages the most that there
can be.

Letters: T tokens, R ranks of a group, n bytes that a rank hands in, M hidden, E experts, k experts a token.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import torch

from .config import LayerConfig, ModelConfig, NormKind, QkNormSpan, Residual, Storage
from .counts import Count, count_of
from .moe import MoeConfig
from .parallel import Exchange, ParallelConfig, check_parallel, prompt_pieces, stage_layers
from .shapes import embedding_shapes, head_shapes, layer_shapes
from .shard import embedding_slices, head_slices, layer_slices, sliced_shapes

INT64_BYTES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What one kind of step sends in one call, over all ranks."""

    step: str
    collective: str
    calls: int
    """How many groups do it, times how often."""
    messages: int
    bytes: Fraction


def rank_bytes(config: ModelConfig, parallel: ParallelConfig, rank: int, storage: Storage) -> int:
    """Return the bytes of the weights that a rank of the job holds.

    >>> from twinfer.spec.paper_models import PAPER_MODELS
    >>> parallel = ParallelConfig(data=32, tensor=8, expert=128, expert_slices=2)
    >>> round(rank_bytes(PAPER_MODELS["24b-moe-128"].config, parallel, 0, Storage.BFLOAT16) / 1e9, 1)
    12.3
    """
    place = parallel.place(rank)
    shard = parallel.shard(rank)
    held = Count()
    for index in stage_layers(len(config.layers), parallel.pipeline)[place.stage]:
        shapes = layer_shapes(config.layers[index], config.hidden)
        held += count_of(sliced_shapes(shapes, layer_slices(config, index, shard)))
    embedding = sliced_shapes(embedding_shapes(config), embedding_slices(config, shard))
    if place.stage == 0:
        held += count_of(embedding)
    if place.stage == parallel.pipeline - 1:
        head = sliced_shapes(head_shapes(config), head_slices(config, shard))
        held += count_of(head)
        if place.stage > 0 and "projection.weight_NI" not in head:
            held += count_of({"token_VW": embedding["token_VW"]})
    return held.bytes(storage)


def traffic(
    config: ModelConfig, parallel: ParallelConfig, *, tokens: int = 1, compute: torch.dtype = torch.bfloat16
) -> list[Traffic]:
    """Return what one call sends, step by step; raises `RequestError` where `check_parallel` does."""
    check_parallel(config, parallel)
    activation, wide = compute.itemsize, torch.promote_types(compute, torch.float32).itemsize
    groups, ring = parallel.data, parallel.tensor
    sends = (parallel.pipeline - 1) * parallel.stage_ranks
    found = []
    for piece in prompt_pieces(tokens, parallel):
        vector = piece * config.hidden
        found.append(_all_reduce("embedding", groups, ring, piece * config.table_width, wide))
        for layer in config.layers:
            found += _layer(layer, parallel, piece, vector, activation, wide)
        found.append(_traffic("stage to stage", "send", sends, sends, sends * vector * activation))
    found.append(_all_gather("logits", groups, ring, Fraction(config.vocabulary * wide, ring)))
    return _merged(found)


def _layer(
    layer: LayerConfig, parallel: ParallelConfig, tokens: int, vector: int, activation: int, wide: int
) -> Iterator[Traffic]:
    groups, ring = parallel.data, parallel.tensor
    qk_norm = layer.attention.qk_norm
    if qk_norm is not None and layer.attention.qk_norm_span is QkNormSpan.ALL_HEADS:
        for _ in range(4 if qk_norm.kind is NormKind.LAYER else 2):
            yield _all_reduce("norm over all heads", groups, ring, tokens, wide)
    yield _all_reduce("attention output", groups, ring, vector, activation)
    if isinstance(layer.mlp, MoeConfig):
        for beside in (layer.mlp.shared, layer.mlp.residual):
            if beside is not None:
                yield _all_reduce("MLP beside experts", groups, ring, vector, activation)
        yield from _experts(layer.mlp, parallel, tokens, vector * activation)
    elif layer.residual is Residual.SEQUENTIAL:
        yield _all_reduce("MLP output", groups, ring, vector, activation)


def _experts(config: MoeConfig, parallel: ParallelConfig, tokens: int, vector_bytes: int) -> Iterator[Traffic]:
    own = config.router.experts // parallel.expert
    piece = Fraction(vector_bytes * config.router.top_k * own, config.router.experts)  # of one rank for one other
    ranks, coordinated = parallel.stage_ranks, parallel.exchange is Exchange.COORDINATED
    peers = parallel.expert // parallel.tensor if coordinated else parallel.expert
    for step, size in (("expert counts", Fraction(own * INT64_BYTES)), ("dispatch", piece), ("return", piece)):
        if parallel.exchange is Exchange.HIERARCHICAL:
            nodes = parallel.expert // parallel.tensor
            yield _all_to_all(step, ranks // parallel.tensor, parallel.tensor, nodes * size)
            yield _all_to_all(step, ranks // nodes, nodes, parallel.tensor * size)
        else:
            yield _all_to_all(step, ranks // peers, peers, size)
    arrived, slices = peers * piece, parallel.expert_slices
    yield _all_gather("slice counts", ranks // slices, slices, Fraction(peers * own * INT64_BYTES))
    yield _all_gather("rows of slices", ranks // slices, slices, arrived)
    summed = slices * arrived
    hops, groups = 2 * (slices - 1), ranks // slices
    yield _traffic("sum of slices", "all_reduce", groups * (slices > 1), groups * hops * slices, groups * hops * summed)
    if coordinated:
        yield _all_gather("gather after experts", parallel.data, parallel.tensor, peers * piece)


def _all_reduce(step: str, groups: int, ranks: int, elements: int, size: int) -> Traffic:
    messages = groups * 2 * (ranks - 1) * min(ranks, elements)
    return _traffic(step, "all_reduce", groups * (ranks > 1), messages, groups * 2 * (ranks - 1) * elements * size)


def _all_gather(step: str, groups: int, ranks: int, handed_in: Fraction) -> Traffic:
    messages = groups * ranks * (ranks - 1)
    return _traffic(step, "all_gather", groups * (ranks > 1), messages, messages * handed_in)


def _all_to_all(step: str, groups: int, ranks: int, piece: Fraction) -> Traffic:
    messages = groups * ranks * (ranks - 1)
    return _traffic(step, "all_to_all", groups * (ranks > 1), messages, messages * piece)


def _traffic(step: str, collective: str, calls: int, messages: int, sent: Fraction | int) -> Traffic:
    return Traffic(step=step, collective=collective, calls=calls, messages=messages, bytes=Fraction(sent))


def _merged(found: list[Traffic]) -> list[Traffic]:
    """One entry a step, in the order of their first appearance; steps that send nothing are left out."""
    together: dict[tuple[str, str], Traffic] = {}
    for each in found:
        before = together.get((each.step, each.collective))
        if before is not None:
            sums = (before.calls + each.calls, before.messages + each.messages, before.bytes + each.bytes)
            together[each.step, each.collective] = _traffic(each.step, each.collective, *sums)
        else:
            together[each.step, each.collective] = each
    return [each for each in together.values() if each.messages]


def whole_bytes(sent: Fraction) -> int:
    """Round a mean number of bytes up to a whole one."""
    return math.ceil(sent)
