"""Command A+ and North: Command R7B's layers, with experts; the first ones may be dense.

Layers with a window rotate, and so do the dense ones if none of them has a window by their own pattern. Experts and
the MLP beside them are added, or averaged: then each counts half.
"""

from dataclasses import replace

from ...spec.config import MlpConfig, RotaryLayout
from ...spec.moe import MoeConfig, RouterConfig, Score
from ..family import Family, ParsedConfig, rms_norm
from ..fields import Fields
from ..llama_like import all_but_every, layer_count, layer_types, rotation_of, sparse_layers, windows
from ..moe_fields import ROUTER_AND_EXPERTS, ROUTER_TRAINING, SHARED_EXPERTS
from . import cohere

_SCORES = {"softmax": Score.SOFTMAX_OF_CHOSEN, "sigmoid": Score.SIGMOID}
_AVERAGED = {"average": True, "sum": False}


def _read(config: Fields) -> ParsedConfig:
    config.only("use_qk_norm", False, None)
    score = config.choice("expert_selection_fn", _SCORES, "softmax")
    shared = config.integer("num_shared_experts", 0, least=0)
    halved = config.choice("shared_expert_combination_strategy", _AVERAGED, "average") and shared > 0
    renormalize = config.flag("norm_topk_prob", True)
    chooses = RouterConfig(
        experts=config.integer("num_experts", 8),
        top_k=config.integer("num_experts_per_tok", 2),
        score=score,
        renormalize=renormalize and score is Score.SIGMOID,
        scale=0.5 if halved else 1.0,
    )
    first = config.integer("first_k_dense_replace", 0, least=0)
    sparse = sparse_layers(config, first)
    width = config.integer("intermediate_size")
    dense = config.integer("prefix_dense_intermediate_size", width)
    pattern = config.integer("prefix_dense_sliding_window_pattern", 1)
    local = _local(config, first, pattern)
    rotation = rotation_of(config, 128, layout=RotaryLayout.INTERLEAVED)
    rotates = [here or (not experts and pattern == 1) for here, experts in zip(local, sparse, strict=True)]
    root_mean_square = rms_norm(config) if config.has("rms_norm_eps") else None
    config.ignore(("rms_norm_eps", "layer_norm_eps"))  # the one of the other kind of norm says nothing

    def feed(index: int, plain: MlpConfig) -> MlpConfig | MoeConfig:
        if not sparse[index]:
            return replace(plain, width=dense)
        beside = replace(plain, width=width * shared) if shared else None
        return MoeConfig(router=chooses, expert=plain, shared=beside, shared_gate=halved)

    parsed = cohere.read_cohere(
        config,
        qk_norm=False,
        norm=root_mean_square,
        rotations=[rotation if here else None for here in rotates],
        windows=windows(config, local, config.optional_integer("sliding_window", 4096)),
        size=128,
        feed=feed,
    )
    return replace(parsed, shared_at_half=halved)


def _local(config: Fields, first: int, pattern: int) -> list[bool]:
    """Return which layers have the window; the first, dense ones have a pattern of their own."""
    layers, rest = layer_count(config), config.integer("sliding_window_pattern", 4)
    if first > layers:
        raise config.wrong("first_k_dense_replace", f"at most the number of layers, which is {layers}")
    return layer_types(config, [*all_but_every(pattern, first), *all_but_every(rest, layers - first)])


COHERE2_MOE = Family(
    model_type="cohere2_moe",
    architectures=("Cohere2MoeForCausalLM", "Cohere2MoeModel"),
    read=_read,
    table=replace(cohere.TABLE, layer=(*cohere.TABLE.layer, *ROUTER_AND_EXPERTS, *SHARED_EXPERTS)),
    ignored={**cohere.IGNORED, **ROUTER_TRAINING},
)
