"""Every op, by name; and why some public functions of the reference have no record."""

from collections.abc import Mapping
from types import MappingProxyType

from ..spec.errors import RequestError
from .op import Op
from .ops import attention as attention_ops
from .ops import cache as cache_ops
from .ops import combine as combine_ops
from .ops import dispatch as dispatch_ops
from .ops import embedding as embedding_ops
from .ops import int4 as int4_ops
from .ops import layer as layer_ops
from .ops import linear as linear_ops
from .ops import logits as logit_ops
from .ops import mlp as mlp_ops
from .ops import moe as moe_ops
from .ops import norms as norm_ops
from .ops import pooling as pooling_ops
from .ops import positions as position_ops
from .ops import quantize as quantize_ops
from .ops import route as route_ops
from .ops import sampling as sampling_ops
from .ops import sbi_gemm as sbi_ops
from .ops import shaped_attention as shaped_attention_ops
from .ops import w8a8 as w8a8_ops

_ALL = (
    linear_ops.LINEAR,
    sbi_ops.SBI_GEMM,
    sbi_ops.INTERLEAVE,
    sbi_ops.DEINTERLEAVE,
    norm_ops.LAYER_NORM,
    norm_ops.RMS_NORM,
    norm_ops.NORM,
    mlp_ops.ACTIVATION,
    mlp_ops.MLP,
    route_ops.ROUTE,
    dispatch_ops.DISPATCH,
    combine_ops.COMBINE,
    moe_ops.MOE,
    position_ops.ROTATE,
    position_ops.ALIBI,
    attention_ops.VISIBLE,
    attention_ops.ATTENTION,
    shaped_attention_ops.SHAPED_ATTENTION,
    cache_ops.APPEND,
    layer_ops.SELF_ATTENTION,
    layer_ops.LAYER,
    embedding_ops.EMBED,
    embedding_ops.HEAD_LOGITS,
    embedding_ops.SCALE_AND_CAP,
    pooling_ops.POOL,
    pooling_ops.UNIT_LENGTH,
    quantize_ops.QUANTIZE_ROWS,
    quantize_ops.DEQUANTIZE_ROWS,
    int4_ops.QUANTIZE_GROUPS,
    int4_ops.DEQUANTIZE_GROUPS,
    quantize_ops.STORED,
    int4_ops.STORED_GROUPS,
    w8a8_ops.INTEGER_PRODUCT,
    w8a8_ops.LINEAR_W8A8,
    logit_ops.PENALISE_REPETITION,
    logit_ops.SCALE_TEMPERATURE,
    logit_ops.KEEP_TOP_K,
    logit_ops.KEEP_TOP_P,
    logit_ops.KEEP_MIN_P,
    sampling_ops.NEXT_TOKEN,
    sampling_ops.DRAW,
    sampling_ops.SAMPLE,
)

OPS: Mapping[str, Op] = MappingProxyType({op.name: op for op in _ALL})

WITHOUT_RECORD: Mapping[str, str] = MappingProxyType(
    {
        "twinfer.reference.cache.empty": "makes a cache of no tokens; there is nothing to compare",
        "twinfer.reference.decoder.empty_caches": "one empty cache a layer; there is nothing to compare",
        "twinfer.reference.decoder.forward": "the whole model: compare_paths judges it, over schedules",
        "twinfer.reference.sbi_gemm.tiling": "how sbi_gemm's work is divided, which its result does not depend on",
        "twinfer.reference.sampling.shape_logits": "applies the processors, which have records, in a fixed order",
        **dict.fromkeys(
            (
                f"twinfer.reference.dispatch.{name}"
                for name in ("capacity", "slots", "tokens_of_slots", "dispatch", "slot_mask")
            ),
            "a step of dispatch, whose record joins them",
        ),
        **dict.fromkeys(
            (f"twinfer.reference.dispatch.{name}" for name in ("dispatch_one_hot", "combine_one_hot")),
            "a variant of dispatch and combine, which have records",
        ),
        "twinfer.reference.layer.feed_forward": "chooses between an MLP and experts by the config's kind",
        "twinfer.reference.moe.router_logits": "a linear map in float32, which has a record",
        "twinfer.reference.routing.choice_weights": "the weights that route returns, for choices that are given",
        **dict.fromkeys(
            (
                f"twinfer.reference.layer.{name}"
                for name in ("normed", "each_head_normed", "added_to", "joined", "heads", "attend")
            ),
            "a step of the layer or of its attention, which have records",
        ),
        **dict.fromkeys(
            (
                *(
                    f"twinfer.reference.parallel.collectives.{name}"
                    for name in ("all_reduce", "reduce_scatter", "all_gather", "all_to_all", "send")
                ),
                *(f"twinfer.reference.parallel.vocabulary.{name}" for name in ("embed_over_ranks", "rows_of_piece")),
                "twinfer.reference.parallel.vocabulary.logits_over_ranks",
                *("twinfer.reference.parallel.tensor.layer", "twinfer.reference.parallel.norms.norm_over_ranks"),
                *(f"twinfer.reference.parallel.ranks.{name}" for name in ("cut", "empty_caches")),
                "twinfer.reference.parallel.generation.generate",
                *("twinfer.reference.parallel.experts.moe", "twinfer.reference.parallel.expert_slices.serve_rows"),
                *(
                    f"twinfer.reference.parallel.exchange.{name}"
                    for name in ("exchange_groups", "experts_of_peers", "swap", "hierarchical", "gather_blocks")
                ),
            ),
            "of many ranks: its tests hold it against the same thing on one, bit for bit on integers",
        ),
        **dict.fromkeys(
            (
                *(f"twinfer.reference.parallel.schedule.{name}" for name in ("baseline", "dynamic_queue", "hybrid")),
                *(f"twinfer.reference.parallel.timeline.{name}" for name in ("makespan", "picture")),
                "twinfer.reference.parallel.pipeline.execute",
            ),
            "of schedules: its tests hold it against the closed formulas",
        ),
        **dict.fromkeys(
            (
                *(
                    f"twinfer.reference.offload.hiding.{name}"
                    for name in ("hiding_tokens", "compute_s", "fetch_s", "step_s", "partitioned_fetch_s")
                ),
                "twinfer.reference.offload.streaming.streamed_forward",
                *(f"twinfer.reference.offload.partitioned.{name}" for name in ("partition", "all_gather")),
                *(
                    f"twinfer.reference.offload.kv_offload.{name}"
                    for name in ("moves", "moved_layers", "offload", "fetch_back", "link_use")
                ),
                *(
                    f"twinfer.reference.offload.expert_cache.{name}"
                    for name in (
                        *("fetches", "hit_rate", "optimal"),
                        *("least_recently_used", "least_frequently_used"),
                    )
                ),
            ),
            "decides when something is fetched, which changes no value: its tests compare with what is never moved",
        ),
        "twinfer.reference.sampling.generator_for": "seeds a generator; its streams are tested with the reference",
    }
)


def op_named(name: str) -> Op:
    """The op of this name; raises `RequestError` that lists the names where there is none."""
    if name not in OPS:
        raise RequestError(f"there is no op {name!r}; the ops are {', '.join(OPS)}")
    return OPS[name]
