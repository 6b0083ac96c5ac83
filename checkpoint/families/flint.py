"""Flint: Qwen 3's attention with sinks, where only layers with a window rotate, and experts by sigmoid.

Beside the experts an MLP serves every token. The first two layers, every fourth from the second on, and the last one
see everything; the first two are dense.
"""

from dataclasses import replace

from ...spec.config import MlpConfig
from ...spec.moe import MoeConfig, RouterConfig, Score
from ..family import Family, ParsedConfig, rms_norm
from ..fields import Fields
from ..llama_like import GATED_MLP, INPUT_NORMS, SPLIT_QKV, layer_count, layer_types, read, rotation_of, table, windows
from ..moe_fields import ROUTER_AND_EXPERTS, ROUTER_TRAINING
from ..table import Heads, linear, norm, tensor
from .qwen2_moe import with_experts


def _read(config: Fields) -> ParsedConfig:
    chooses = RouterConfig(
        experts=config.integer("num_experts", 256),
        top_k=config.integer("num_experts_per_tok", 6),
        score=Score.SIGMOID,
        renormalize=config.flag("norm_topk_prob", True),
    )
    has_experts, layers = with_experts(config, dense=(0, 1)), layer_count(config)
    width, shared = (
        config.integer("moe_intermediate_size", 512),
        config.integer("shared_expert_intermediate_size", 1024),
    )
    local = layer_types(config, [2 <= index < layers - 1 and index % 4 != 1 for index in range(layers)])
    rotation, bias = rotation_of(config, 128), config.flag("attention_bias", False)

    def feed(index: int, plain: MlpConfig) -> MlpConfig | MoeConfig:
        if not has_experts(index):
            return plain
        return MoeConfig(router=chooses, expert=replace(plain, width=width), shared=replace(plain, width=shared))

    return read(
        config,
        windows=windows(config, local, config.optional_integer("sliding_window", 513)),
        rotations=[rotation if here else None for here in local],
        size=128,
        attention={"qkv_bias": bias, "output_bias": bias, "qk_norm": rms_norm(config), "sinks": True},
        feed=feed,
    )


FLINT = Family(
    model_type="flint",
    architectures=("FlintForCausalLM", "FlintModel"),
    read=_read,
    table=table(
        *INPUT_NORMS,
        *SPLIT_QKV,
        *norm("self_attn.q_norm", "attention.query_norm", Heads.SHARED),
        *norm("self_attn.k_norm", "attention.key_norm", Heads.SHARED),
        *linear("self_attn.o_proj", "attention.output"),
        tensor("self_attn.softmax_offset", "attention.sink_H"),
        tensor("self_attn.sinks", "attention.sink_H"),
        *GATED_MLP,
        *ROUTER_AND_EXPERTS,
        *linear("mlp.shared_expert.gate_proj", "mlp.shared.gate"),
        *linear("mlp.shared_expert.up_proj", "mlp.shared.up"),
        *linear("mlp.shared_expert.down_proj", "mlp.shared.down"),
    ),
    ignored=ROUTER_TRAINING,
)
