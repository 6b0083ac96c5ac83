"""Granite 3, dense and with experts: LLaMA's, with four factors, on tokens, scores, what layers add, and logits."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

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
    config: Fields,
    *,
    mlp_bias: bool,
    feed: Callable[[int, MlpConfig], MlpConfig | MoeConfig] | None = None,
    sinks: bool = False,
    **differences: Any,
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
            "sinks": sinks,
        },
        layer={"residual_scale": config.number("residual_multiplier", 1.0)},
        model={
            "embedding_scale": config.number("embedding_multiplier", 1.0),
            "logit_scale": 1 / config.number("logits_scaling", 1.0),
        },
        **differences,
    )


GRANITE = Family(
    model_type="granite", architectures=("GraniteForCausalLM", "GraniteModel"), read=_read, table=LLAMA_TABLE
)


def _read_moe(config: Fields) -> ParsedConfig:
    return read_experts(config, shared=0)


def read_experts(config: Fields, *, shared: int, **differences: Any) -> ParsedConfig:
    """Read a mixture whose shared MLP is so wide, 0 for none; `sinks`, and keywords as `llama_like.read` has them."""
    chooses = router(
        "mixtral", experts=config.integer("num_local_experts", 8), top_k=config.integer("num_experts_per_tok", 2)
    )

    def feed(index: int, plain: MlpConfig) -> MoeConfig:
        return MoeConfig(router=chooses, expert=plain, shared=replace(plain, width=shared) if shared else None)

    return _read_with(config, mlp_bias=False, feed=feed, **differences)


_MOE_TABLE = table(
    *INPUT_NORMS,
    *SPLIT_QKV,
    *linear("self_attn.o_proj", "attention.output"),
    *linear("block_sparse_moe.router.layer", "mlp.router"),
    *linear("block_sparse_moe.router", "mlp.router"),
    *experts("block_sparse_moe.input_linear", *GATE_UP, form=Experts.STACKED),
    *experts("block_sparse_moe.output_linear", "mlp.experts.down", form=Experts.STACKED),
    *experts("block_sparse_moe.experts.gate_up_proj", *GATE_UP, form=Experts.STACKED, endings=("", "_bias")),
    *experts("block_sparse_moe.experts.down_proj", "mlp.experts.down", form=Experts.STACKED, endings=("", "_bias")),
)

GRANITE_MOE = Family(
    model_type="granitemoe",
    architectures=("GraniteMoeForCausalLM", "GraniteMoeModel"),
    read=_read_moe,
    table=_MOE_TABLE,
    ignored=ROUTER_TRAINING,
)

SHARED_TABLE = replace(
    _MOE_TABLE,
    layer=(
        *_MOE_TABLE.layer,
        *linear("shared_mlp.input_linear", "mlp.shared.gate", "mlp.shared.up"),
        *linear("shared_mlp.output_linear", "mlp.shared.down"),
    ),
)

GRANITE_MOE_SHARED = Family(
    model_type="granitemoeshared",
    architectures=("GraniteMoeSharedForCausalLM", "GraniteMoeSharedModel"),
    read=lambda config: read_experts(config, shared=config.integer("shared_intermediate_size", 0, least=0)),
    table=SHARED_TABLE,
    ignored=ROUTER_TRAINING,
)
