"""MiniMax M2: queries and keys normalized over all heads, part of each head rotating, and experts by sigmoid.

Published files carry the fields of the first MiniMax, whose linear attention this one does not have, and of layers that
guess tokens further ahead. What they hold in 8 bits must be made 16 bits before.
"""

from ...spec.config import MlpConfig, QkNormSpan
from ...spec.moe import MoeConfig, router
from ..family import Family, ParsedConfig, alias, rms_norm
from ..fields import Fields
from ..llama_like import INPUT_NORMS, SPLIT_QKV, head_size_of, layer_count, read, table
from ..moe_fields import GATE, ROUTER_TRAINING, UP
from ..table import STACKED_EXPERTS, experts, linear, norm, tensor

_REQUIRED = {
    "scoring_func": "sigmoid",
    "use_routing_bias": True,
    "use_qk_norm": True,
    "qk_norm_type": "per_layer",
    "shared_intermediate_size": 0,
}
"""Fields of the code that trained the models, each with the one value that is computed."""


def _read(config: Fields) -> ParsedConfig:
    for name, computed in _REQUIRED.items():
        config.only(name, computed, None)
    size, own_norm, layers = head_size_of(config, 128), rms_norm(config), layer_count(config)
    config.only("attn_type_list", None, [1] * layers)
    chooses = router(
        "deepseek-v3",
        experts=config.integer(alias(config, "num_local_experts", "num_experts"), 256),
        top_k=config.integer("num_experts_per_tok", 8),
    )
    turning = config.optional_integer("rotary_dim", None)

    def feed(index: int, plain: MlpConfig) -> MoeConfig:
        return MoeConfig(router=chooses, expert=plain)

    return read(
        config,
        norm=own_norm,
        base=5e6,
        part=1.0 if turning is None else turning / size,
        size=128,
        attention={"qk_norm": own_norm, "qk_norm_span": QkNormSpan.ALL_HEADS},
        feed=feed,
    )


MINIMAX_M2 = Family(
    model_type="minimax_m2",
    architectures=("MiniMaxM2ForCausalLM", "MiniMaxM2Model"),
    read=_read,
    table=table(
        *INPUT_NORMS,
        *SPLIT_QKV,
        *norm("self_attn.q_norm", "attention.query_norm"),
        *norm("self_attn.k_norm", "attention.key_norm"),
        *linear("self_attn.o_proj", "attention.output"),
        *linear("block_sparse_moe.gate", "mlp.router"),
        *linear("mlp.gate", "mlp.router"),
        tensor("block_sparse_moe.e_score_correction_bias", "mlp.choice_bias_E"),
        tensor("mlp.e_score_correction_bias", "mlp.choice_bias_E"),
        *experts("block_sparse_moe.experts.{expert}.w1", GATE),
        *experts("block_sparse_moe.experts.{expert}.w3", UP),
        *experts("block_sparse_moe.experts.{expert}.w2", "mlp.experts.down"),
        *STACKED_EXPERTS,
    ),
    ignored={
        **ROUTER_TRAINING,
        "use_mtp": "layers that guess tokens further ahead, which no file holds",
        "num_mtp_modules": "layers that guess tokens further ahead, which no file holds",
        "mtp_transformer_layers": "layers that guess tokens further ahead, which no file holds",
    },
    remote_code=("configuration_minimax_m2", "modeling_minimax_m2"),
)
