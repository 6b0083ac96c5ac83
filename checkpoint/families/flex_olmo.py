"""FlexOlmo: OLMo 2's attention and norms, and OLMoE's experts."""

from ...spec.config import MlpConfig, NormPlacement, QkNormSpan
from ...spec.moe import MoeConfig
from ..family import Family, ParsedConfig, rms_norm
from ..fields import Fields
from ..llama_like import SPLIT_QKV, read, table
from ..moe_fields import ROUTER_AND_EXPERTS, ROUTER_TRAINING
from ..table import linear, norm
from .qwen2_moe import chosen_by


def _read(config: Fields) -> ParsedConfig:
    chooses, own_norm = chosen_by(config, experts=7, top_k=5), rms_norm(config)
    bias = config.flag("attention_bias", False)

    def feed(index: int, plain: MlpConfig) -> MoeConfig:
        return MoeConfig(router=chooses, expert=plain)

    return read(
        config,
        norm=own_norm,
        base=500000.0,
        attention={
            "qkv_bias": bias,
            "output_bias": bias,
            "qk_norm": own_norm,
            "qk_norm_span": QkNormSpan.ALL_HEADS,
        },
        feed=feed,
        layer={"norm_placement": NormPlacement.OUTPUT_NORM},
    )


FLEX_OLMO = Family(
    model_type="flex_olmo",
    architectures=("FlexOlmoForCausalLM", "FlexOlmoModel"),
    read=_read,
    table=table(
        *SPLIT_QKV,
        *norm("self_attn.q_norm", "attention.query_norm"),
        *norm("self_attn.k_norm", "attention.key_norm"),
        *linear("self_attn.o_proj", "attention.output"),
        *norm("post_attention_layernorm", "attention_output_norm"),
        *ROUTER_AND_EXPERTS,
        *norm("post_feedforward_layernorm", "mlp_output_norm"),
    ),
    ignored=ROUTER_TRAINING,
)
