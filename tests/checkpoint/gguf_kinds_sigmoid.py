"""Models of the GGUF architectures whose experts are weighed by sigmoids and chosen with a bias."""

from typing import Any

import gguf
import transformers as hf
from hypothesis import strategies as st

from twinfer.checkpoint.gguf.architectures import Windows

from .gguf_converter import Config
from .gguf_kind import RMS, TIED, Kind, llama_sizes, windows, yes_or_no
from .gguf_kinds_moe import otherwise, qwen_keys

GLM_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}


def glm_keys(writer: gguf.GGUFWriter, config: Config) -> None:
    qwen_keys(writer, config)
    writer.add_rope_dimension_count(int(config.head_dim * config.rope_parameters["partial_rotary_factor"]))
    sigmoid_keys(writer, config, config.n_shared_experts)


def dots_keys(writer: gguf.GGUFWriter, config: Config) -> None:
    qwen_keys(writer, config)
    sigmoid_keys(writer, config, config.n_shared_experts)


def sigmoid_keys(writer: gguf.GGUFWriter, config: Config, shared: int) -> None:
    writer.add_expert_shared_count(shared)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.norm_topk_prob)


def exaone_keys(writer: gguf.GGUFWriter, config: Config) -> None:
    qwen_keys(writer, config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_sliding_window(config.sliding_window)
    writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
    sigmoid_keys(writer, config, config.num_shared_experts)
    writer.add_expert_shared_feed_forward_length(config.moe_intermediate_size * config.num_shared_experts)
    writer.add_nextn_predict_layers(0)
    writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)


def glm_sizes(sizes: dict[str, int]) -> dict[str, Any]:
    return llama_sizes(sizes) | {"head_dim": sizes["size"], "rope_parameters": GLM_ROPE}


SIGMOID_KINDS = [
    Kind(
        architecture="glm4moe",
        model=hf.Glm4MoeForCausalLM,
        config=hf.Glm4MoeConfig,
        sizes=glm_sizes,
        options={
            **RMS,
            "n_routed_experts": st.sampled_from([4, 8]),
            "num_experts_per_tok": st.sampled_from([1, 2]),
            "moe_intermediate_size": st.integers(1, 9),
            "n_group": st.sampled_from([1, 2]),
            "topk_group": st.just(1),
            "first_k_dense_replace": st.integers(0, 2),
            "norm_topk_prob": yes_or_no,
            "routed_scaling_factor": st.sampled_from([1.0, 2.5]),
            "attention_bias": yes_or_no,
            "use_qk_norm": yes_or_no,
            "n_shared_experts": st.sampled_from([1, 2]),
        },
        keys=glm_keys,
        chosen={
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 8,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 2.5,
            "n_shared_experts": 2,
            "use_qk_norm": True,
        },
        wrong=({"mlp_norm": "ffn_norm"}, otherwise("glm4moe", shared_gate=True), {"qk_norm": None}),
    ),
    Kind(
        architecture="dots1",
        model=hf.Dots1ForCausalLM,
        config=hf.Dots1Config,
        options={
            **RMS,
            **TIED,
            "n_routed_experts": st.sampled_from([4, 8]),
            "num_experts_per_tok": st.sampled_from([1, 2]),
            "moe_intermediate_size": st.integers(1, 9),
            "n_group": st.sampled_from([1, 2]),
            "first_k_dense_replace": st.integers(0, 2),
            "norm_topk_prob": yes_or_no,
            "routed_scaling_factor": st.sampled_from([1.0, 2.5]),
            "n_shared_experts": st.sampled_from([1, 2]),
            "sliding_window": st.none(),
        },
        keys=dots_keys,
        chosen={
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 8,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 2.5,
            "n_shared_experts": 2,
            "sliding_window": None,
        },
        wrong=(otherwise("dots1", leading_dense=False), otherwise("dots1", shared_gate=True), {"permuted": True}),
    ),
    Kind(
        architecture="exaone-moe",
        model=hf.ExaoneMoeForCausalLM,
        config=hf.ExaoneMoeConfig,
        options={
            **RMS,
            **TIED,
            "layers": st.integers(1, 5),
            "num_experts": st.sampled_from([4, 8]),
            "num_experts_per_tok": st.sampled_from([1, 2]),
            "moe_intermediate_size": st.integers(1, 9),
            "n_group": st.sampled_from([1, 2]),
            "first_k_dense_replace": st.integers(0, 2),
            "norm_topk_prob": yes_or_no,
            "routed_scaling_factor": st.sampled_from([1.0, 2.5]),
            "num_shared_experts": st.sampled_from([1, 2]),
            "sliding_window": windows,
        },
        keys=exaone_keys,
        chosen={
            "layers": 5,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 8,
            "routed_scaling_factor": 2.5,
            "num_shared_experts": 2,
            "sliding_window": 4,
        },
        wrong=(
            otherwise("exaone-moe", leading_dense=False),
            {"windows": Windows(period=4, absent=None)},
            {"permuted": True},
        ),
    ),
]
