"""Hy3: Qwen 3's attention, and experts by sigmoid, chosen with a bias, beside a shared MLP; the first layer is dense.

Published files hold one layer more, which guesses tokens further ahead.
"""

from dataclasses import replace

from ...spec.config import MlpConfig
from ...spec.moe import MoeConfig, router
from ..family import Family, ParsedConfig, alias, rms_norm
from ..fields import Fields
from ..llama_like import GATED_MLP, INPUT_NORMS, SPLIT_QKV, layer_count, read, sparse_layers, table
from ..moe_fields import ROUTER_AND_EXPERTS, ROUTER_TRAINING, SHARED_EXPERTS, further_layers
from ..table import Heads, linear, norm, tensor

_REQUIRED = ("qk_norm", "route_norm", "moe_router_use_sigmoid", "moe_router_enable_expert_bias")
"""Fields of the code that trained the models, of which only true is computed."""


def _read(config: Fields) -> ParsedConfig:
    for name in _REQUIRED:
        config.only(name, True, None)
    chooses = router(
        "deepseek-v3",
        experts=config.integer(alias(config, "num_experts", "num_local_experts"), 192),
        top_k=config.integer("num_experts_per_tok", 8),
        scale=config.number("router_scaling_factor", 2.826),
    )
    sparse = sparse_layers(config, config.integer("first_k_dense_replace", 1, least=0))
    width = config.integer(alias(config, "moe_intermediate_size", "expert_hidden_dim"), 1536)
    shared, beyond = config.integer("num_shared_experts", 1), further_layers(config, layer_count(config))
    own_norm, bias = rms_norm(config, default=1e-5), config.flag("attention_bias", False)

    def feed(index: int, plain: MlpConfig) -> MlpConfig | MoeConfig:
        if not sparse[index]:
            return plain
        return MoeConfig(
            router=chooses,
            expert=replace(plain, width=width, bias=False),
            shared=replace(plain, width=width * shared),
        )

    parsed = read(
        config,
        norm=own_norm,
        base=11_158_840.0,
        size=128,
        mlp_bias=config.flag("mlp_bias", False),
        attention={"qkv_bias": bias, "output_bias": bias, "qk_norm": own_norm},
        feed=feed,
    )
    return replace(parsed, table=replace(_TABLE, ignorable=(*_TABLE.ignorable, *beyond)))


_TABLE = table(
    *INPUT_NORMS,
    *SPLIT_QKV,
    *norm("self_attn.q_norm", "attention.query_norm", Heads.SHARED),
    *norm("self_attn.k_norm", "attention.key_norm", Heads.SHARED),
    *linear("self_attn.o_proj", "attention.output"),
    *GATED_MLP,
    *linear("mlp.router.gate", "mlp.router"),
    tensor("mlp.expert_bias", "mlp.choice_bias_E"),
    *linear("mlp.shared_mlp.gate_proj", "mlp.shared.gate"),
    *linear("mlp.shared_mlp.up_proj", "mlp.shared.up"),
    *linear("mlp.shared_mlp.down_proj", "mlp.shared.down"),
    *ROUTER_AND_EXPERTS,
    tensor("mlp.e_score_correction_bias", "mlp.choice_bias_E"),
    *SHARED_EXPERTS,
)
"""Names of files first; those of live modules, where they differ, after them."""

HY_V3 = Family(
    model_type="hy_v3",
    architectures=("HYV3ForCausalLM", "HYV3Model"),
    read=_read,
    table=_TABLE,
    ignored={
        **ROUTER_TRAINING,
        **dict.fromkeys(
            ("enable_attention_fp32_softmax", "enable_lm_head_fp32", "enable_moe_fp32_combine"),
            "dtypes of the makers' own code",
        ),
        "use_grouped_mm": "how their code computes the same",
        "eod_token_id": "tokens by role",
    },
)
