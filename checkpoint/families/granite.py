"""Granite 3, dense and with experts: LLaMA's, with four factors, on tokens, scores, what layers add, and logits."""

from collections.abc import Callable

from ...spec.config import MlpConfig
from ...spec.moe import MoeConfig, router
from ..family import Family, ParsedConfig
from ..fields import Fields
from ..llama_like import INPUT_NORMS, LLAMA_TABLE, SPLIT_QKV, read, table
from ..moe_fields import ROUTER_TRAINING
from ..table import GATE_UP, Experts, experts, linear


def _read(config: Fields) -> ParsedConfig:
    return _read_with(config, mlp_bias=config.flag("mlp_bias", False))


def _read_with(
    config: Fields, *, mlp_bias: bool, feed: Callable[[int, MlpConfig], MlpConfig | MoeConfig] | None = None
) -> ParsedConfig:
    bias = config.flag("attention_bias", False)
    return read(
        config,
        mlp_bias=mlp_bias,
        feed=feed,
        attention={
            "qkv_bias": bias,
            "output_bias": bias,
            "scale": config.number("attention_multiplier", 1.0),  # instead of the root of the head's size
        },
        layer={"residual_scale": config.number("residual_multiplier", 1.0)},
        model={
            "embedding_scale": config.number("embedding_multiplier", 1.0),
            "logit_scale": 1 / config.number("logits_scaling", 1.0),
        },
    )


GRANITE = Family(
    model_type="granite", architectures=("GraniteForCausalLM", "GraniteModel"), read=_read, table=LLAMA_TABLE
)


def _read_moe(config: Fields) -> ParsedConfig:
    chooses = router(
        "mixtral", experts=config.integer("num_local_experts", 8), top_k=config.integer("num_experts_per_tok", 2)
    )
    return _read_with(config, mlp_bias=False, feed=lambda index, plain: MoeConfig(router=chooses, expert=plain))


GRANITE_MOE = Family(
    model_type="granitemoe",
    architectures=("GraniteMoeForCausalLM", "GraniteMoeModel"),
    read=_read_moe,
    table=table(
        *INPUT_NORMS,
        *SPLIT_QKV,
        *linear("self_attn.o_proj", "attention.output"),
        *linear("block_sparse_moe.router.layer", "mlp.router"),
        *linear("block_sparse_moe.router", "mlp.router"),
        *experts("block_sparse_moe.input_linear", *GATE_UP, form=Experts.STACKED),
        *experts("block_sparse_moe.output_linear", "mlp.experts.down", form=Experts.STACKED),
        *experts("block_sparse_moe.experts.gate_up_proj", *GATE_UP, form=Experts.STACKED, endings=("", "_bias")),
        *experts("block_sparse_moe.experts.down_proj", "mlp.experts.down", form=Experts.STACKED, endings=("", "_bias")),
    ),
    ignored=ROUTER_TRAINING,
)
