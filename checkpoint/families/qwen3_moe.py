"""Qwen 3 MoE: Qwen 3's attention, and experts without a shared MLP."""

from dataclasses import replace

from ...spec.config import MlpConfig
from ...spec.moe import MoeConfig
from ..family import Family, ParsedConfig, rms_norm
from ..fields import Fields
from ..llama_like import GATED_MLP, INPUT_NORMS, SPLIT_QKV, read, table
from ..moe_fields import ROUTER_AND_EXPERTS, ROUTER_TRAINING
from ..table import Heads, linear, norm
from .qwen2_moe import chosen_by, with_experts


def _read(config: Fields) -> ParsedConfig:
    chooses, has_experts = chosen_by(config, experts=128, top_k=8), with_experts(config)
    width = config.integer("moe_intermediate_size", 768)

    def feed(index: int, plain: MlpConfig) -> MlpConfig | MoeConfig:
        return MoeConfig(router=chooses, expert=replace(plain, width=width)) if has_experts(index) else plain

    config.ignore(("max_window_layers",))  # of Qwen 2; here all layers have the window, or none
    window = config.optional_integer("sliding_window", 4096)
    bias = config.flag("attention_bias", False)
    return read(
        config,
        windows=window if config.flag("use_sliding_window", False) else None,
        attention={"qkv_bias": bias, "output_bias": bias, "qk_norm": rms_norm(config)},
        feed=feed,
    )


QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM", "Qwen3MoeModel"),
    read=_read,
    table=table(
        *INPUT_NORMS,
        *SPLIT_QKV,
        *norm("self_attn.q_norm", "attention.query_norm", Heads.SHARED),
        *norm("self_attn.k_norm", "attention.key_norm", Heads.SHARED),
        *linear("self_attn.o_proj", "attention.output"),
        *GATED_MLP,
        *ROUTER_AND_EXPERTS,
    ),
    ignored=ROUTER_TRAINING,
)
