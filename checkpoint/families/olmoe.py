"""OLMoE: LLaMA's, with queries and keys normalized over all heads, and experts in every layer."""

from ...spec.config import MlpConfig, QkNormSpan
from ...spec.moe import MoeConfig
from ..family import Family, ParsedConfig, rms_norm
from ..fields import Fields
from ..llama_like import INPUT_NORMS, SPLIT_QKV, read, table
from ..moe_fields import ROUTER_AND_EXPERTS, ROUTER_TRAINING
from ..table import linear, norm
from .qwen2_moe import chosen_by


def _read(config: Fields) -> ParsedConfig:
    chooses, own_norm = chosen_by(config, experts=64, top_k=8), rms_norm(config, default=1e-5)
    config.only("clip_qkv", None)  # it would cut queries and keys after they are normalized
    bias = config.flag("attention_bias", False)

    def feed(index: int, plain: MlpConfig) -> MoeConfig:
        return MoeConfig(router=chooses, expert=plain)

    return read(
        config,
        norm=own_norm,
        attention={
            "qkv_bias": bias,
            "output_bias": bias,
            "qk_norm": own_norm,
            "qk_norm_span": QkNormSpan.ALL_HEADS,
        },
        feed=feed,
    )


OLMOE = Family(
    model_type="olmoe",
    architectures=("OlmoeForCausalLM", "OlmoeModel"),
    read=_read,
    table=table(
        *INPUT_NORMS,
        *SPLIT_QKV,
        *norm("self_attn.q_norm", "attention.query_norm"),
        *norm("self_attn.k_norm", "attention.key_norm"),
        *linear("self_attn.o_proj", "attention.output"),
        *ROUTER_AND_EXPERTS,
    ),
    ignored=ROUTER_TRAINING,
)
