"""Which rows or columns of which tensor belong to one of the ranks that share a model, by the tensors' dotted names.

Tensor slicing as in Megatron-LM (Shoeybi et al. 2019, section 3; the paper's section IV-A): the matrices that read the
hidden vector are cut by rows, those that write it by columns, so a layer needs two all-reduces and nothing else.

    rows       query, key, value, gate and up, with biases; gains of queries and keys; ALiBi slopes; sinks; token table;
               head
    columns    attention output and down; their biases belong to rank 0 and are absent elsewhere
    whole      norms, positions, token types, rotary frequencies, projections to and from the token table's width;
               routers and what weighs the MLPs beside experts

Of a mixture's experts a rank holds its rows or columns of every one, or, with an `ExpertShard`, whole experts or slices
of some: the paper's expert parallelism and expert slicing (section V-A).

Heads stay whole, and every query head stays with the key/value head that it reads. Where there are more ranks than
key/value heads, ranks that share a head all hold it. Example: 8 query heads over 2 key/value heads of 16 elements, an
MLP of 96, and 1000 tokens, on 4 ranks. Rank 3 holds

    query heads 6 and 7        rows 96..128 of query, and the same columns of the attention output
    key/value head 1           rows 16..32 of key and value, which rank 2 holds too
    a quarter of the MLP       rows 72..96 of gate and up, and the same columns of down
    a quarter of the tokens    rows 750..1000 of token table and head

Of 8 experts as wide, on 4 ranks for different experts and 2 for different slices, the rank at place 3 of the 4 and 1 of
the 2 holds experts 6 and 7, of each rows 48..96 of gate and up, and the same columns of down.

A vocabulary need not divide: of 1001 tokens the ranks hold 251, 251, 251 and 248. Everything else must.
"""

from dataclasses import dataclass, replace
from math import gcd, isqrt

from .config import INT4_GROUP, LayerConfig, ModelConfig, Storage
from .errors import RequestError
from .mlp import MlpConfig
from .moe import MoeConfig
from .shapes import Shapes, embedding_shapes, head_shapes, layer_shapes

Slices = dict[str, tuple[slice | None, ...]]
"""For each tensor that a rank holds, what it holds of each dimension; None is all of it."""

EXPERTS = "mlp.experts."
"""How the names of a layer's experts begin."""

_BESIDE = ("experts", "shared", "residual")
_LAYER_ROWS = (
    *("attention.query.", "attention.key.", "attention.value.", "mlp.gate.", "mlp.up."),
    *("attention.query_norm.", "attention.key_norm.", "attention.alibi_slope_H", "attention.sink_H"),
    *(f"mlp.{part}.{matrix}." for part in _BESIDE for matrix in ("gate", "up")),
)
_LAYER_COLUMNS = ("attention.output.", "mlp.down.", *(f"mlp.{part}.down." for part in _BESIDE))
_OF_KV_HEADS = ("attention.key.", "attention.value.", "attention.key_norm.")
_EMBEDDING_ROWS = ("token_VW",)
_HEAD_ROWS = ("projection.", "bias_V")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertShard:
    """The place of one rank among those that share a mixture's experts."""

    rank: int
    """Among the ranks that hold different experts, counted from 0."""
    ranks: int
    slice_rank: int = 0
    """Among the ranks that hold different slices of the same experts, counted from 0."""
    slices: int = 1

    def __post_init__(self) -> None:
        _check_place("ExpertShard", "rank", self.rank, "ranks", self.ranks)
        _check_place("ExpertShard", "slice_rank", self.slice_rank, "slices", self.slices)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """The place of one rank among those that share a model."""

    rank: int
    """Counted from 0."""
    ranks: int
    experts: ExpertShard | None = None
    """None cuts every expert like any other MLP, by `rank` of `ranks`."""

    def __post_init__(self) -> None:
        _check_place("Shard", "rank", self.rank, "ranks", self.ranks)


def _check_place(kind: str, rank_name: str, rank: int, count_name: str, count: int) -> None:
    if count < 1:
        raise RequestError(f"{kind}.{count_name} is {count}; it must be at least 1")
    if not 0 <= rank < count:
        raise RequestError(f"{kind}.{rank_name} is {rank}; of {count} {count_name} it must be 0 to {count - 1}")


def embedding_slices(config: ModelConfig, shard: Shard) -> Slices:
    """Return what the rank holds of the embedding. Raises `RequestError` as `check_ranks`; likewise the two below."""
    check_ranks(config, shard.ranks, experts=shard.experts)
    return _slices(embedding_shapes(config), shard, _EMBEDDING_ROWS, ())


def layer_slices(config: ModelConfig, index: int, shard: Shard) -> Slices:
    """Return what the rank holds of a layer.

    >>> from twinfer.spec.paper_models import PAPER_MODELS
    >>> held = layer_slices(PAPER_MODELS["gpt2-1.5b"].config, 0, Shard(rank=1, ranks=5))  # 25 heads of 64
    >>> held["attention.query.weight_NI"], held["mlp.down.weight_NI"], held["mlp_norm.gain_M"]
    ((slice(320, 640, None), None), (None, slice(1280, 2560, None)), (None,))
    >>> "mlp.down.bias_N" in held
    False
    >>> place = ExpertShard(rank=3, ranks=64, slice_rank=1, slices=2)  # 128 experts of width 32768
    >>> held = layer_slices(PAPER_MODELS["24b-moe-128"].config, 1, Shard(rank=0, ranks=8, experts=place))
    >>> held["mlp.experts.up.weight_ENI"]
    (slice(6, 8, None), slice(16384, 32768, None), None)
    """
    check_ranks(config, shard.ranks, experts=shard.experts)
    layer = config.layers[index]
    shapes, kv_heads = layer_shapes(layer, config.hidden), layer.attention.kv_heads
    held = _slices(shapes, shard, _LAYER_ROWS, _LAYER_COLUMNS, kv_heads)
    if shard.experts is not None:
        held = {name: cuts for name, cuts in held.items() if not name.startswith("mlp.experts.")}
        held |= _expert_slices(shapes, shard.experts)
    return held


def slices_without_experts(config: ModelConfig, index: int) -> Slices:
    """Return all of a layer but its experts: of their tensors, which have the experts in front, none is held."""
    shapes = layer_shapes(config.layers[index], config.hidden)
    return {
        name: (slice(0, 0) if name.startswith(EXPERTS) else None, *(None for _ in shape[1:]))
        for name, shape in shapes.items()
    }


def slices_of_expert(config: ModelConfig, index: int, expert: int) -> Slices:
    """Return one of a layer's experts, and nothing else of it."""
    shapes = layer_shapes(config.layers[index], config.hidden)
    return {
        name: (slice(expert, expert + 1), *(None for _ in shape[1:]))
        for name, shape in shapes.items()
        if name.startswith(EXPERTS)
    }


def head_slices(config: ModelConfig, shard: Shard) -> Slices:
    """Return what the rank holds of the head."""
    check_ranks(config, shard.ranks, experts=shard.experts)
    return _slices(head_shapes(config), shard, _HEAD_ROWS, ())


def vocabulary_piece(vocabulary: int, shard: Shard) -> range:
    """Return the tokens whose rows of the token table and the head the rank holds.

    >>> [len(vocabulary_piece(1001, Shard(rank=rank, ranks=4))) for rank in range(4)]
    [251, 251, 251, 248]
    """
    return range(vocabulary)[_piece(vocabulary, shard)]


def index_of(cuts: tuple[slice | None, ...]) -> tuple[slice, ...]:
    """Write the cuts as an index of a tensor.

    >>> index_of((None, slice(0, 4)))
    (slice(None, None, None), slice(0, 4, None))
    """
    return tuple(slice(None) if cut is None else cut for cut in cuts)


def sliced_shapes(shapes: Shapes, slices: Slices) -> Shapes:
    """Return the shapes of what a rank holds, from those of the whole."""
    return {
        name: tuple(len(range(size)[cut]) for size, cut in zip(shapes[name], index_of(cuts), strict=True))
        for name, cuts in slices.items()
    }


def local_layer(layer: LayerConfig, ranks: int, experts: ExpertShard | None = None) -> LayerConfig:
    """Return the config by which each rank computes its part of a layer: its heads, and its part of the MLP.

    Biases are there as in the whole layer; those of attention output and down, on rank 0 only. The router's number of
    experts stays that of the whole layer, for every rank routes among all.
    """
    attention = replace(
        layer.attention,
        heads=layer.attention.heads // ranks,
        kv_heads=max(1, layer.attention.kv_heads // ranks),
    )
    return replace(layer, attention=attention, mlp=_local_mlp(layer.mlp, ranks, experts))


def _local_mlp(config: MlpConfig | MoeConfig, ranks: int, experts: ExpertShard | None) -> MlpConfig | MoeConfig:
    if isinstance(config, MlpConfig):
        return replace(config, width=config.width // ranks)
    cuts = {"expert": ranks if experts is None else experts.slices, "shared": ranks, "residual": ranks}
    parts = {part: getattr(config, part) for part in cuts}
    return replace(
        config, **{part: replace(mlp, width=mlp.width // cuts[part]) for part, mlp in parts.items() if mlp is not None}
    )


def _widths(config: MlpConfig | MoeConfig, experts: ExpertShard | None) -> dict[str, int]:
    """Return the width of each MLP of a layer that the ranks cut, by what it is called."""
    if isinstance(config, MlpConfig):
        return {"an MLP": config.width}
    mlps = {"a shared MLP": config.shared, "a residual MLP": config.residual}
    if experts is None:
        mlps = {"experts": config.expert, **mlps}
    return {name: mlp.width for name, mlp in mlps.items() if mlp is not None}


def degrees(config: ModelConfig, storage: Storage | None = None, experts: ExpertShard | None = None) -> tuple[int, ...]:
    """List every number of ranks that can share the model, in that storage where one is given.

    In int4 the columns are cut where groups end, so that no two ranks share a group's minimum and scale: with 128 heads
    of 160, the columns of one head would end inside a group.

    >>> from twinfer.spec.paper_models import PAPER_MODELS
    >>> config = PAPER_MODELS["lm-530b"].config
    >>> degrees(config), degrees(config, Storage.INT4)
    ((1, 2, 4, 8, 16, 32, 64, 128), (1, 2, 4, 8, 16, 32, 64))
    """
    most = min(layer.attention.heads for layer in config.layers)
    return tuple(ranks for ranks in range(1, most + 1) if _refusal(config, ranks, storage, experts) is None)


def check_ranks(
    config: ModelConfig,
    ranks: int,
    storage: Storage | None = None,
    experts: ExpertShard | None = None,
    *,
    name: str = "ranks",
    stage_ranks: int | None = None,
) -> None:
    """Raise `RequestError`, naming the nearest number that can, unless that number of ranks can share the model.

    With `experts`, the same for the ranks that share those: they need not be a multiple of `ranks`, nor divide it.
    `name` is what the number is called where it was given; of `stage_ranks`, nearest numbers of ranks that share
    experts are divisors.
    """
    if ranks < 1:
        raise RequestError(f"{name} is {ranks}; it must be at least 1")
    refusal = _refusal(config, ranks, storage, experts)
    if refusal is not None:
        able = degrees(config, storage, experts)
        distance = min(abs(other - ranks) for other in able)
        nearest = " or ".join(str(other) for other in able if abs(other - ranks) == distance)
        raise RequestError(f"{name} is {ranks}, but {refusal}; the nearest number that can share it is {nearest}")
    if experts is not None:
        _check_experts(config, experts, storage, stage_ranks or 0)


def _check_experts(config: ModelConfig, shard: ExpertShard, storage: Storage | None, stage_ranks: int) -> None:
    """Raise where experts do not divide so; 0 stage ranks are any number of them (gcd(n, 0) is n)."""
    for index, layer in enumerate(config.layers):
        if not isinstance(layer.mlp, MoeConfig):
            continue
        experts, width, slices = layer.mlp.router.experts, layer.mlp.expert.width, shard.slices
        if experts % shard.ranks:
            nearest = nearest_divisor(gcd(experts, stage_ranks // shard.slices), shard.ranks)
            raise RequestError(
                f"expert is {shard.ranks}, but layer {index} has {experts} experts, which do not divide by it; the "
                f"nearest that works is {nearest}"
            )
        if not _can_slice(width, slices, storage):
            only = f", and int4 is cut at multiples of {INT4_GROUP} only" if storage is Storage.INT4 else ""
            whole = gcd(width, stage_ranks // shard.ranks)
            able = (each for each in range(1, whole + 1) if whole % each == 0 and _can_slice(width, each, storage))
            raise RequestError(
                f"expert_slices is {slices}, but layer {index} has experts of width {width}, which cannot be cut "
                f"so{only}; the nearest that works is {min(able, key=lambda each: abs(each - slices))}"
            )


def _can_slice(width: int, slices: int, storage: Storage | None) -> bool:
    between_groups = storage is not Storage.INT4 or slices == 1 or width // slices % INT4_GROUP == 0
    return width % slices == 0 and between_groups


def nearest_divisor(size: int, wanted: int) -> int:
    """Return the divisor of a size that is nearest to a number, the smaller of two.

    >>> nearest_divisor(12, 5), nearest_divisor(8, 100)
    (4, 8)
    """
    small = [each for each in range(1, isqrt(size) + 1) if size % each == 0]
    return min(*small, *(size // each for each in small), key=lambda each: (abs(each - wanted), each))


def _refusal(config: ModelConfig, ranks: int, storage: Storage | None, experts: ExpertShard | None) -> str | None:
    """Say why that number of ranks cannot share the model; None if it can."""
    for index, layer in enumerate(config.layers):
        heads, kv_heads, widths = layer.attention.heads, layer.attention.kv_heads, _widths(layer.mlp, experts)
        if heads % ranks:
            return f"layer {index} has {heads} query heads, which do not divide by it"
        if kv_heads % ranks and ranks % kv_heads:
            return f"layer {index} has {kv_heads} key/value heads, which neither divide by it nor it by them"
        for name, width in widths.items():
            if width % ranks:
                return f"layer {index} has {name} of width {width}, which does not divide by it"
        down = {"down" if name == "an MLP" else f"down of {name}": width for name, width in widths.items()}
        columns = {"attention output": heads * layer.attention.head_size, **down}
        for name, size in columns.items():
            if storage is Storage.INT4 and ranks > 1 and size // ranks % INT4_GROUP:
                return (
                    f"layer {index} {name} has {size} columns, so each rank would hold {size // ranks}, "
                    f"and int4 is cut at multiples of {INT4_GROUP} only"
                )
    piece = -(-config.vocabulary // ranks)
    if (ranks - 1) * piece >= config.vocabulary:
        return f"of {config.vocabulary} tokens in pieces of {piece} the last rank would get none"
    return None


def _slices(
    shapes: Shapes, shard: Shard, by_rows: tuple[str, ...], by_columns: tuple[str, ...], kv_heads: int = 1
) -> Slices:
    held: Slices = {}
    for name, shape in shapes.items():
        whole: tuple[slice | None, ...] = (None,) * len(shape)
        stack = whole[: name.startswith(EXPERTS)]  # an expert's rows and columns come after the experts
        if name.startswith(by_rows):
            rows = _piece(shape[len(stack)], _among(shard, kv_heads) if name.startswith(_OF_KV_HEADS) else shard)
            held[name] = (*stack, rows, *whole[len(stack) + 1 :])
        elif not name.startswith(by_columns):
            held[name] = whole
        elif len(shape) == len(stack) + 2:
            held[name] = *whole[:-1], _piece(shape[-1], shard)
        elif shard.rank == 0:  # the bias of a matrix cut by columns is added once
            held[name] = whole
    return held


def _expert_slices(shapes: Shapes, shard: ExpertShard) -> Slices:
    """Return what the rank holds of the experts; the bias of a matrix cut by columns is on the first slice only."""
    held: Slices = {}
    place = Shard(rank=shard.slice_rank, ranks=shard.slices)
    for name, shape in shapes.items():
        if not name.startswith("mlp.experts."):
            continue
        experts = _piece(shape[0], Shard(rank=shard.rank, ranks=shard.ranks))
        if not name.startswith(_LAYER_COLUMNS):
            held[name] = (experts, _piece(shape[1], place), *(None,) * (len(shape) - 2))
        elif len(shape) == 3:
            held[name] = (experts, None, _piece(shape[2], place))
        elif shard.slice_rank == 0:
            held[name] = (experts, None)
    return held


def _among(shard: Shard, kv_heads: int) -> Shard:
    """Number the rank among those that hold different key/value heads.

    Of 4 ranks that share 2 heads, the first two hold head 0:

    >>> [_among(Shard(rank=rank, ranks=4), 2).rank for rank in range(4)]
    [0, 0, 1, 1]
    """
    return Shard(rank=shard.rank * kv_heads // shard.ranks, ranks=kv_heads) if kv_heads < shard.ranks else shard


def _piece(size: int, shard: Shard) -> slice:
    """Cut out the rank's piece of that many rows: pieces are equal but for the last, which may be shorter.

    >>> [_piece(10, Shard(rank=rank, ranks=4)) for rank in (0, 3)]
    [slice(0, 3, None), slice(9, 10, None)]
    """
    length = -(-size // shard.ranks)
    return slice(shard.rank * length, min(size, (shard.rank + 1) * length))
