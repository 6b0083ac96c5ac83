"""Qwen 2 MoE: Qwen 2's attention, and experts beside a shared MLP behind a sigmoid gate.

Which layers have experts is the config's: each `decoder_sparse_step`-th, without those in `mlp_only_layers`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from ...spec.config import MlpConfig
from ...spec.moe import MoeConfig, RouterConfig, router
from ..family import Family, ParsedConfig, alias
from ..fields import Fields
from ..llama_like import GATED_MLP, INPUT_NORMS, SPLIT_QKV, layer_count, layer_types, read, table, windows
from ..moe_fields import ROUTER_AND_EXPERTS, ROUTER_TRAINING
from ..table import linear
from . import qwen2


def chosen_by(config: Fields, *, experts: int, top_k: int, renormalize: bool = False) -> RouterConfig:
    """The router: softmax over all experts, renormalized or not, as `norm_topk_prob` says."""
    recipe = "qwen3-moe" if config.flag("norm_topk_prob", renormalize) else "qwen2-moe"
    count = config.integer(alias(config, "num_experts", "num_local_experts"), experts)
    return router(recipe, experts=count, top_k=config.integer("num_experts_per_tok", top_k))


def with_experts(config: Fields, *, dense: Sequence[int] = ()) -> Callable[[int], bool]:
    """Whether a layer has experts, by its number; `dense` are those without, where the config names none."""
    every = config.integer("decoder_sparse_step", 1)
    named = config.integers("mlp_only_layers")
    layers = layer_count(config)
    if any(layer >= layers for layer in named):
        raise config.wrong("mlp_only_layers", f"numbers below that of the layers, which is {layers}")
    without = named if config.has("mlp_only_layers") else dense
    return lambda index: index not in without and (index + 1) % every == 0


def _windows(config: Fields) -> list[int | None]:
    """Each layer's window; transformers writes 0 tokens where there is none."""
    if config.values.get("sliding_window") != 0 or config.flag("use_sliding_window", False):
        return qwen2.windows(config)
    config.ignore(("sliding_window", "max_window_layers"))
    return windows(config, layer_types(config, [False] * layer_count(config)), None)


def _read(config: Fields) -> ParsedConfig:
    chooses, has_experts = chosen_by(config, experts=60, top_k=4), with_experts(config)
    width, shared = (
        config.integer("moe_intermediate_size", 1408),
        config.integer("shared_expert_intermediate_size", 5632),
    )

    def feed(index: int, plain: MlpConfig) -> MlpConfig | MoeConfig:
        if not has_experts(index):
            return plain
        return MoeConfig(
            router=chooses,
            expert=replace(plain, width=width),
            shared=replace(plain, width=shared),
            shared_gate=True,
        )

    return read(
        config,
        windows=_windows(config),
        attention={"qkv_bias": config.flag("qkv_bias", True)},
        feed=feed,
    )


QWEN2_MOE = Family(
    model_type="qwen2_moe",
    architectures=("Qwen2MoeForCausalLM", "Qwen2MoeModel"),
    read=_read,
    table=table(
        *INPUT_NORMS,
        *SPLIT_QKV,
        *linear("self_attn.o_proj", "attention.output"),
        *GATED_MLP,
        *ROUTER_AND_EXPERTS,
        *linear("mlp.shared_expert.gate_proj", "mlp.shared.gate"),
        *linear("mlp.shared_expert.up_proj", "mlp.shared.up"),
        *linear("mlp.shared_expert.down_proj", "mlp.shared.down"),
        *linear("mlp.shared_expert_gate", "mlp.shared_gate"),
    ),
    ignored=ROUTER_TRAINING,
)
