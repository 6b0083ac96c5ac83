"""Command R and R+, Aya: attention and MLP in parallel after one norm without bias, interleaved rotation, tied."""

from typing import Any

from ...spec.config import NormConfig, Residual, RotaryLayout
from ..family import Family, ParsedConfig, layer_norm
from ..fields import Fields
from ..llama_like import GATED_MLP, SPLIT_QKV, layer_count, read, rotation_of, table
from ..table import Heads, linear, norm

TABLE = table(
    *norm("input_layernorm", "attention_norm"),
    *SPLIT_QKV,
    *norm("self_attn.q_norm", "attention.query_norm", Heads.STACKED),
    *norm("self_attn.k_norm", "attention.key_norm", Heads.STACKED),
    *linear("self_attn.o_proj", "attention.output"),
    *GATED_MLP,
)

IGNORED = {"use_parallel_embedding": "how the table of tokens was split in training"}


def read_cohere(config: Fields, *, qk_norm: bool, norm: NormConfig | None = None, **differences: Any) -> ParsedConfig:
    """What all have in common; `norm` instead of theirs, and the other keywords as `llama_like.read` has them."""
    config.only("position_embedding_type", "rope_gptj")
    config.only("rotary_pct", 1.0)
    config.only("use_embedding_sharing", config.flag("tie_word_embeddings", True))
    config.only("use_gated_activation", True)
    config.only("use_parallel_block", True)
    plain, bias = norm or layer_norm(config, "layer_norm_eps", bias=False), config.flag("attention_bias", False)
    return read(
        config,
        norm=plain,
        tied=True,
        attention={"qkv_bias": bias, "output_bias": bias, "qk_norm": plain if qk_norm else None},
        layer={"residual": Residual.PARALLEL_SHARED_NORM},
        model={"logit_scale": config.number("logit_scale", 0.0625)},
        **differences,
    )


def _read(config: Fields) -> ParsedConfig:
    rotation = rotation_of(config, base=500000.0, layout=RotaryLayout.INTERLEAVED)
    return read_cohere(config, qk_norm=config.flag("use_qk_norm", False), rotations=[rotation] * layer_count(config))


COHERE = Family(
    model_type="cohere",
    architectures=("CohereForCausalLM", "CohereModel"),
    read=_read,
    table=TABLE,
    ignored=IGNORED,
)
