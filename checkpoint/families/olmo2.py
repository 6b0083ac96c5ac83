"""OLMo 2: LLaMA's, with norms of what attention and MLP give, and of queries and keys over all heads together."""

from ...spec.config import NormPlacement, QkNormSpan
from ..family import Family, ParsedConfig, rms_norm
from ..fields import Fields
from ..llama_like import GATED_MLP, SPLIT_QKV, read, table
from ..table import linear, norm


def _read(config: Fields) -> ParsedConfig:
    bias, rms = config.flag("attention_bias", False), rms_norm(config, default=1e-5)
    return read(
        config,
        norm=rms,
        attention={
            "qkv_bias": bias,
            "output_bias": bias,
            "qk_norm": rms,
            "qk_norm_span": QkNormSpan.ALL_HEADS,
        },
        layer={"norm_placement": NormPlacement.OUTPUT_NORM},
    )


OLMO2 = Family(
    model_type="olmo2",
    architectures=("Olmo2ForCausalLM", "Olmo2Model"),
    read=_read,
    table=table(
        *SPLIT_QKV,
        *norm("self_attn.q_norm", "attention.query_norm"),
        *norm("self_attn.k_norm", "attention.key_norm"),
        *linear("self_attn.o_proj", "attention.output"),
        *norm("post_attention_layernorm", "attention_output_norm"),
        *GATED_MLP,
        *norm("post_feedforward_layernorm", "mlp_output_norm"),
    ),
)
