"""StableLM 3B and 2: layer norms, rotation of a part of each head, gated MLPs; some normalize every head of queries and
keys by a norm of its own, and have attention and MLP in parallel."""

from dataclasses import replace

from ...spec.config import Residual
from ..family import Family, ParsedConfig, layer_norm
from ..fields import Fields
from ..llama_like import LLAMA_TABLE, read
from ..table import tensor

TABLE = replace(
    LLAMA_TABLE,
    layer=(
        *LLAMA_TABLE.layer,
        tensor("self_attn.q_layernorm.norms.{head}.weight", "attention.query_norm.gain_M"),
        tensor("self_attn.k_layernorm.norms.{head}.weight", "attention.key_norm.gain_M"),
    ),
)


def _read(config: Fields) -> ParsedConfig:
    config.only("num_heads", None, config.integer("num_attention_heads"))
    config.only("rotary_scaling_factor", 1.0)
    norm = layer_norm(config, "layer_norm_eps")
    parallel = config.flag("use_parallel_residual", False)
    return read(
        config,
        norm=norm,
        part=0.25,
        attention={
            "qkv_bias": config.flag("use_qkv_bias", False),
            "qk_norm": replace(norm, bias=False) if config.flag("qk_layernorm", False) else None,
        },
        layer={"residual": Residual.PARALLEL_SHARED_NORM if parallel else Residual.SEQUENTIAL},
    )


STABLELM = Family(
    model_type="stablelm",
    architectures=("StableLmForCausalLM", "StableLmModel"),
    read=_read,
    table=TABLE,
)
