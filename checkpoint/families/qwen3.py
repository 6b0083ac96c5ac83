"""Qwen 3: LLaMA's, with queries and keys normalized head by head."""

from ..family import Family, ParsedConfig, rms_norm
from ..fields import Fields
from ..llama_like import GATED_MLP, INPUT_NORMS, SPLIT_QKV, read, table
from ..table import Heads, linear, norm
from . import qwen2


def _read(config: Fields) -> ParsedConfig:
    bias = config.flag("attention_bias", False)
    return read(
        config,
        windows=qwen2.windows(config),
        size=128,
        attention={"qkv_bias": bias, "output_bias": bias, "qk_norm": rms_norm(config)},
    )


QWEN3 = Family(
    model_type="qwen3",
    architectures=("Qwen3ForCausalLM", "Qwen3Model"),
    read=_read,
    table=table(
        *INPUT_NORMS,
        *SPLIT_QKV,
        *norm("self_attn.q_norm", "attention.query_norm", Heads.SHARED),
        *norm("self_attn.k_norm", "attention.key_norm", Heads.SHARED),
        *linear("self_attn.o_proj", "attention.output"),
        *GATED_MLP,
    ),
)
