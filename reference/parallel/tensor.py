"""Tensor slicing: the ranks of a group share every layer (paper, section IV-A; Shoeybi et al. 2019, section 3).

An MLP with its up matrix cut by rows and its down matrix by columns, between two ranks:

    down(f(up(x))) = [down_0 down_1] f([up_0; up_1] x) = down_0 f(up_0 x) + down_1 f(up_1 x)

The non-linearity acts on each element alone, so nothing is exchanged before the sum. Attention likewise: query, key and
value by rows, that is by heads; the output matrix by columns. So a layer needs two all-reduces, one after attention and
one after the MLP, and one only where both read the same vector (parallel residual). Norms and the stream are
replicated. The bias of a matrix cut by columns lives on rank 0 of the group: on every rank it would be added R times.

Which rows and columns a rank holds is `spec.shard`. Nothing here knows how the weights were cut.

Shapes: R ranks (a list), B batch, T new tokens, M hidden, N width of a projection, H query heads, K key/value heads,
D head size; of a rank, H, K and N are its own.
"""

from collections.abc import Sequence

from einops import rearrange
from torch import Tensor

from ...spec.config import AttentionConfig, LayerConfig, QkNormSpan, Residual
from ...spec.moe import MoeConfig
from ...spec.weights import AttentionWeights, LayerWeights, MlpWeights, MoeWeights
from ..cache import KVCache
from ..components import DEFAULT, Components
from ..layer import added_to, attend, heads, joined, normed
from .experts import moe
from .norms import norm_over_ranks
from .stage import Stage


def layer(
    x_RBTM: Sequence[Tensor],
    weights_R: Sequence[LayerWeights],
    config: LayerConfig,
    cache_R: Sequence[KVCache],
    stage: Stage,
    components: Components = DEFAULT,
) -> tuple[list[Tensor], list[KVCache]]:
    """Pass new tokens through a layer; the config is the whole layer's, the weights are the ranks' shares.

    x is equal on all ranks of a tensor group, and so is what comes out.
    """

    def through(norm: str, x_RBTM: Sequence[Tensor]) -> list[Tensor]:
        norm_R = [getattr(weights, norm) for weights in weights_R]
        return [normed(x_BTM, each, config, components) for x_BTM, each in zip(x_RBTM, norm_R, strict=True)]

    def join(norm: str, x_RBTM: Sequence[Tensor], out_RBTM: Sequence[Tensor]) -> list[Tensor]:
        norm_R = [getattr(weights, norm) for weights in weights_R]
        return [joined(*each, config, components) for each in zip(x_RBTM, out_RBTM, norm_R, strict=True)]

    read_RBTM = through("attention_norm", x_RBTM)
    x_RBTM = [added_to(*each, config) for each in zip(x_RBTM, read_RBTM, strict=True)]
    part_RBTM, cache_R = _attention(read_RBTM, weights_R, config.attention, cache_R, stage, components)
    if config.residual is Residual.SEQUENTIAL:
        x_RBTM = join("attention_output_norm", x_RBTM, stage.add_up(part_RBTM))
        read_RBTM = through("mlp_norm", x_RBTM)
        x_RBTM = [added_to(*each, config) for each in zip(x_RBTM, read_RBTM, strict=True)]
        return join("mlp_output_norm", x_RBTM, _fed(read_RBTM, None, weights_R, config, stage, components)), cache_R
    if config.residual is Residual.PARALLEL:
        read_RBTM = through("mlp_norm", x_RBTM)
    both_RBTM = _fed(read_RBTM, part_RBTM, weights_R, config, stage, components)
    return [x_BTM + config.residual_scale * both for x_BTM, both in zip(x_RBTM, both_RBTM, strict=True)], cache_R


def _attention(
    x_RBTM: Sequence[Tensor],
    weights_R: Sequence[LayerWeights],
    config: AttentionConfig,
    cache_R: Sequence[KVCache],
    stage: Stage,
    components: Components,
) -> tuple[list[Tensor], list[KVCache]]:
    """What each rank's heads add to the output projection, and the caches of its key/value heads."""
    attention_R = [weights.attention for weights in weights_R]
    query_RBTHD = _heads(x_RBTM, attention_R, "query", config, stage, components)
    key_RBTKD = _heads(x_RBTM, attention_R, "key", config, stage, components)
    value_RBTKD = _heads(x_RBTM, attention_R, "value", config, stage, components)
    inputs = zip(query_RBTHD, key_RBTKD, value_RBTKD, attention_R, cache_R, strict=True)
    results = [
        attend(query, key, value, weights, config, cache, components) if query.shape[1] else (x_BTM, cache)
        for x_BTM, (query, key, value, weights, cache) in zip(x_RBTM, inputs, strict=True)  # x may be of no tokens
    ]
    return [part_BTM for part_BTM, _ in results], [cache for _, cache in results]


def _heads(
    x_RBTM: Sequence[Tensor],
    attention_R: Sequence[AttentionWeights],
    which: str,
    config: AttentionConfig,
    stage: Stage,
    components: Components,
) -> list[Tensor]:
    """Project to each rank's own heads; a norm over all heads is the one step that needs the other ranks."""
    x_RBTN = [
        components.linear(x_BTM, getattr(weights, which)) for x_BTM, weights in zip(x_RBTM, attention_R, strict=True)
    ]
    norm_R = [getattr(weights, f"{which}_norm", None) for weights in attention_R]
    if config.qk_norm is None or config.qk_norm_span is QkNormSpan.HEAD:
        return [heads(x_BTN, norm, config, components) for x_BTN, norm in zip(x_RBTN, norm_R, strict=True)]
    x_RBTHD = [heads(x_BTN, None, config, components) for x_BTN in x_RBTN]
    present_R = [norm for norm in norm_R if norm is not None]
    if not present_R:  # values
        return x_RBTHD
    flat_RBTN = [rearrange(x_BTHD, "b t h d -> b t (h d)") for x_BTHD in x_RBTHD]
    normed_RBTN = norm_over_ranks(flat_RBTN, present_R, config.qk_norm, stage)
    return [rearrange(x_BTN, "b t (h d) -> b t h d", d=config.head_size) for x_BTN in normed_RBTN]


def _fed(
    x_RBTM: Sequence[Tensor],
    attended_RBTM: Sequence[Tensor] | None,
    weights_R: Sequence[LayerWeights],
    config: LayerConfig,
    stage: Stage,
    components: Components,
) -> list[Tensor]:
    """What the MLP or the experts make of x; what the ranks' heads made of it, if given, is added up along with it."""
    if isinstance(config.mlp, MoeConfig):
        mixtures = [weights.mlp for weights in weights_R if isinstance(weights.mlp, MoeWeights)]
        fed_RBTM = moe(x_RBTM, mixtures, config.mlp, stage, components)
        if attended_RBTM is None:
            return fed_RBTM
        return [sum_BTM + fed for sum_BTM, fed in zip(stage.add_up(attended_RBTM), fed_RBTM, strict=True)]
    mlps = [weights.mlp for weights in weights_R if isinstance(weights.mlp, MlpWeights)]
    part_RBTM = [
        components.mlp(x_BTM, weights, config.mlp, linear=components.linear)
        for x_BTM, weights in zip(x_RBTM, mlps, strict=True)
    ]
    if attended_RBTM is not None:
        part_RBTM = [attended + part for attended, part in zip(attended_RBTM, part_RBTM, strict=True)]
    return stage.add_up(part_RBTM)
