"""Command R, R+ and R7B, Aya: attention and MLP in parallel after one norm without bias, interleaved rotation, tied."""

from typing import Any

from ...spec.config import Residual, RotaryLayout
from ..family import Family, Understood, layer_norm
from ..fields import Fields
from ..llama_like import (
    GATED_MLP,
    SPLIT_QKV,
    all_but_every,
    layer_count,
    layer_types,
    read,
    rotation_of,
    table,
    windows,
)
from ..table import Heads, linear, norm

TABLE = table(
    *norm("input_layernorm", "attention_norm"),
    *SPLIT_QKV,
    *norm("self_attn.q_norm", "attention.query_norm", Heads.STACKED),
    *norm("self_attn.k_norm", "attention.key_norm", Heads.STACKED),
    *linear("self_attn.o_proj", "attention.output"),
    *GATED_MLP,
)


HARMLESS = {
    "cache_implementation": "how the library that wrote it keeps keys and values",
    "use_parallel_embedding": "how the table of tokens was split in training",
}


def _read_cohere(config: Fields) -> Understood:
    rotation = rotation_of(config, base=500000.0, layout=RotaryLayout.INTERLEAVED)
    return _read(config, config.flag("use_qk_norm", False), rotations=[rotation] * layer_count(config))


def _read_cohere2(config: Fields) -> Understood:
    """All layers but every fourth have a window, and those alone rotate."""
    pattern = config.integer("sliding_window_pattern", 4)
    config.only("layer_switch", pattern)
    config.only("order_of_interleaved_layers", "local_attn_first")
    config.only("position_embedding_type", "rope_gptj")
    config.only("rotary_pct", 1.0, 1)
    config.only("use_embedding_sharing", config.flag("tie_word_embeddings", True))
    config.only("use_gated_activation", True)
    config.only("use_parallel_block", True)
    config.only("use_qk_norm", False)
    local = layer_types(config, all_but_every(pattern, layer_count(config)))
    rotation = rotation_of(config, layout=RotaryLayout.INTERLEAVED)
    return _read(
        config,
        qk_norm=False,
        rotations=[rotation if here else None for here in local],
        windows=windows(config, local, config.optional_integer("sliding_window", 4096)),
    )


def _read(config: Fields, qk_norm: bool, **differences: Any) -> Understood:
    plain, bias = layer_norm(config, "layer_norm_eps", bias=False), config.flag("attention_bias", False)
    return read(
        config,
        norm=plain,
        tied=True,
        attention={"qkv_bias": bias, "output_bias": bias, "qk_norm": plain if qk_norm else None},
        layer={"residual": Residual.PARALLEL_SHARED_NORM},
        model={"logit_scale": config.number("logit_scale", 0.0625)},
        **differences,
    )


COHERE = Family(
    model_type="cohere",
    architectures=("CohereForCausalLM", "CohereModel"),
    read=_read_cohere,
    table=TABLE,
    harmless=HARMLESS,
)

COHERE2 = Family(
    model_type="cohere2",
    architectures=("Cohere2ForCausalLM", "Cohere2Model"),
    read=_read_cohere2,
    table=TABLE,
    harmless=HARMLESS,
)
