"""Families with experts beside transformers: each at configs that differ in everything that its routing can vary."""

from collections.abc import Callable
from typing import Any

import pytest
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from twinfer.spec.moe import Score

from .experts_family import (
    CHOICE_BIAS_ZERO,
    GATE_AND_UP_SWAPPED,
    SHARED_GATE_AT_HALF,
    SHARED_SWAPPED,
    SINKS_NEGATED,
    WINDOWS_MOVED,
    router_with,
)
from .llama_family import attention_with, layers_with, other_layout, reads_alike

SIZES: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
QWEN = SIZES | {"moe_intermediate_size": 8, "num_experts": 6, "num_experts_per_tok": 3}
OLMOE = SIZES | {"num_experts": 6, "num_experts_per_tok": 3}
LOCAL = SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2}
GLM = SIZES | {"moe_intermediate_size": 8, "n_routed_experts": 8, "num_experts_per_tok": 3, "head_dim": 8}
OSS = LOCAL | {"head_dim": 4, "sliding_window": 4, "num_hidden_layers": 3}
HUNYUAN = SIZES | {"num_experts": 5, "moe_topk": 3, "head_dim": 8}
ALPHA = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 1.0, "alpha": 9.0}
DOTS = SIZES | {"moe_intermediate_size": 8, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 2}
ERNIE = SIZES | {"moe_intermediate_size": 8, "moe_num_experts": 6, "moe_k": 3, "head_dim": 8}
SOLAR = SIZES | {"moe_intermediate_size": 8, "n_routed_experts": 8, "num_experts_per_tok": 3, "head_dim": 8}
COMMAND = SIZES | {"num_experts": 6, "num_experts_per_tok": 3, "head_dim": 8, "sliding_window": 4, "logit_scale": 0.5}
EXAONE = SIZES | {"moe_intermediate_size": 8, "num_experts": 8, "num_experts_per_tok": 3, "sliding_window": 4}
FLINT = QWEN | {"head_dim": 8, "sliding_window": 5, "shared_expert_intermediate_size": 10}
SWASH = LOCAL | {"sliding_window": 4, "num_hidden_layers": 3}
HY = SIZES | {"moe_intermediate_size": 8, "num_experts": 6, "num_experts_per_tok": 3, "head_dim": 8}
MELLUM = QWEN | {"head_dim": 8, "sliding_window": 4, "num_hidden_layers": 3}
FULL, SLIDING = "full_attention", "sliding_attention"
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 8}
SHORT = {"rope_type": "default", "rope_theta": 100.0}
DBRX_INNER = {"ffn_hidden_size": 12, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 16}
DBRX = {"d_model": 16, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "vocab_size": 20}

CONFIGS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "mixtral": ("Mixtral", [LOCAL | {"sliding_window": 5, "tie_word_embeddings": True}, LOCAL]),
    "qwen2_moe": (
        "Qwen2Moe",
        [
            QWEN
            | {
                "num_hidden_layers": 4,
                "decoder_sparse_step": 2,
                "mlp_only_layers": [1],
                "norm_topk_prob": True,
                "qkv_bias": False,
            },
            QWEN | {"shared_expert_intermediate_size": 10},
        ],
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        [
            QWEN | {"head_dim": 6, "mlp_only_layers": [0], "attention_bias": True},
            QWEN | {"head_dim": 4, "norm_topk_prob": True},
        ],
    ),
    "olmoe": ("Olmoe", [OLMOE | {"norm_topk_prob": True, "attention_bias": True}, OLMOE]),
    "granitemoe": (
        "GraniteMoe",
        [
            LOCAL | {"attention_bias": True},
            LOCAL
            | {
                "embedding_multiplier": 3.0,
                "logits_scaling": 2.0,
                "residual_multiplier": 0.5,
                "attention_multiplier": 0.3,
            },
        ],
    ),
    "phimoe": (
        "Phimoe",
        [LOCAL | {"attention_bias": True, "lm_head_bias": True}, LOCAL | {"router_jitter_noise": 0.2}],
    ),
    "dbrx": (
        "Dbrx",
        [
            DBRX
            | {
                "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 1e9},
                "ffn_config": DBRX_INNER | {"moe_normalize_expert_weights": None},
            },
            DBRX | {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 0.5}, "ffn_config": DBRX_INNER},
        ],
    ),
    "gpt_oss": ("GptOss", [OSS | {"swiglu_limit": 0.5, "attention_bias": False}, OSS | {"swiglu_limit": 0.7}]),
    "glm4_moe": (
        "Glm4Moe",
        [
            GLM | {"first_k_dense_replace": 0, "norm_topk_prob": False, "attention_bias": True},
            GLM | {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "use_qk_norm": True},
        ],
    ),
    "dots1": (
        "Dots1",
        [
            DOTS | {"sliding_window": None, "first_k_dense_replace": 1, "attention_bias": True},
            DOTS
            | {
                "n_group": 4,
                "topk_group": 2,
                "norm_topk_prob": True,
                "routed_scaling_factor": 2.5,
                "sliding_window": 4,
                "max_window_layers": 1,
            },
        ],
    ),
    "ernie4_5_moe": (
        "Ernie4_5_Moe",
        [
            ERNIE | {"num_hidden_layers": 5, "moe_layer_end_index": 3, "moe_layer_interval": 2, "use_bias": True},
            ERNIE | {"num_hidden_layers": 3, "moe_num_shared_experts": 1, "tie_word_embeddings": False},
            ERNIE | {"moe_layer_start_index": 0, "moe_num_shared_experts": 0},
        ],
    ),
    "flex_olmo": ("FlexOlmo", [OLMOE | {"norm_topk_prob": True, "attention_bias": True}, OLMOE]),
    "granitemoeshared": (
        "GraniteMoeShared",
        [LOCAL, LOCAL | {"shared_intermediate_size": 10, "residual_multiplier": 0.5, "attention_bias": True}],
    ),
    "minimax_m2": (
        "MiniMaxM2",
        [LOCAL | {"head_dim": 4, "tie_word_embeddings": True}, LOCAL | {"head_dim": 8, "rotary_dim": 4}],
    ),
    "solar_open": (
        "SolarOpen",
        [
            SOLAR | {"n_shared_experts": 2, "norm_topk_prob": False, "attention_bias": True},
            SOLAR | {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
        ],
    ),
    "hunyuan_v1_moe": (
        "HunYuanMoEV1",
        [HUNYUAN | {"attention_bias": True, "rope_parameters": ALPHA}, HUNYUAN | {"tie_word_embeddings": True}],
    ),
    "cohere2_moe": (
        "Cohere2Moe",
        [
            COMMAND
            | {
                "num_hidden_layers": 3,
                "first_k_dense_replace": 1,
                "prefix_dense_intermediate_size": 10,
                "expert_selection_fn": "sigmoid",
                "norm_topk_prob": False,
                "rms_norm_eps": 1e-4,
                "attention_bias": True,
            },
            COMMAND | {"num_hidden_layers": 4, "num_shared_experts": 2, "expert_selection_fn": "sigmoid"},
            COMMAND
            | {
                "num_hidden_layers": 5,
                "first_k_dense_replace": 2,
                "prefix_dense_sliding_window_pattern": 2,
                "sliding_window_pattern": 2,
                "num_shared_experts": 1,
                "shared_expert_combination_strategy": "sum",
                "tie_word_embeddings": False,
            },
            COMMAND | {"layer_types": [FULL, SLIDING], "mlp_layer_types": ["sparse", "dense"]},
        ],
    ),
    "exaone_moe": (
        "ExaoneMoe",
        [
            EXAONE
            | {
                "head_dim": 6,
                "num_hidden_layers": 3,
                "norm_topk_prob": False,
                "layer_types": [FULL, SLIDING, FULL],
                "mlp_layer_types": ["sparse", "dense", "sparse"],
                "tie_word_embeddings": True,
            },
            EXAONE | {"num_hidden_layers": 5, "n_group": 4, "topk_group": 2, "num_shared_experts": 2},
        ],
    ),
    "flint": (
        "Flint",
        [
            FLINT
            | {
                "num_hidden_layers": 3,
                "layer_types": [SLIDING, FULL, SLIDING],
                "mlp_only_layers": [],
                "decoder_sparse_step": 2,
                "norm_topk_prob": False,
                "attention_bias": True,
            },
            FLINT | {"num_hidden_layers": 7},
        ],
    ),
    "granitemoe_swa": (
        "GraniteMoeSWA",
        [
            SWASH | {"attention_bias": True, "tie_word_embeddings": True},
            SWASH
            | {
                "layer_rope_theta": [0, 100.0, 10000.0],
                "rope_parameters": YARN,
                "shared_intermediate_size": 10,
                "embedding_multiplier": 3.0,
                "logits_scaling": 2.0,
                "residual_multiplier": 0.5,
                "attention_multiplier": 0.3,
            },
        ],
    ),
    "hy_v3": (
        "HYV3",
        [
            HY
            | {
                "num_hidden_layers": 3,
                "mlp_layer_types": ["sparse", "dense", "sparse"],
                "num_shared_experts": 2,
                "attention_bias": True,
                "mlp_bias": True,
            },
            HY | {"tie_word_embeddings": True},
        ],
    ),
    "mellum": (
        "Mellum",
        [
            MELLUM
            | {"mlp_layer_types": ["sparse", "dense", "sparse"], "norm_topk_prob": False, "attention_bias": True},
            MELLUM
            | {
                "layer_types": [SLIDING, FULL, SLIDING],
                "rope_parameters": {FULL: YARN, SLIDING: SHORT},
                "num_mtp_layers": 1,
            },
        ],
    ),
}

WRONG: dict[str, dict[str, dict[str, Any]]] = {
    "mixtral": {"gate and up swapped": GATE_AND_UP_SWAPPED, "softmax of all": router_with(score=Score.SOFTMAX)},
    "qwen2_moe": {
        "renormalized": router_with(renormalize=True),
        "shared MLP by a half whatever the token": SHARED_GATE_AT_HALF,
    },
    "qwen3_moe": {"not renormalized": router_with(renormalize=False), "gate and up swapped": GATE_AND_UP_SWAPPED},
    "olmoe": {"renormalized": router_with(renormalize=True), "gate and up swapped": GATE_AND_UP_SWAPPED},
    "granitemoe": {"gate and up swapped": GATE_AND_UP_SWAPPED, "softmax of all": router_with(score=Score.SOFTMAX)},
    "phimoe": {
        "half as near": router_with(nearness=0.2),
        "plain softmax": router_with(score=Score.SOFTMAX_OF_CHOSEN, nearness=None),
    },
    "dbrx": {"not renormalized": router_with(renormalize=False), "not cut": attention_with(qkv_clip=None)},
    "gpt_oss": {"sinks of the wrong sign": SINKS_NEGATED, "gate and up swapped": GATE_AND_UP_SWAPPED},
    "glm4_moe": {"no groups": router_with(groups=1, kept_groups=1), "not scaled": router_with(scale=1.0)},
    "dots1": {"no groups": router_with(groups=1, kept_groups=1), "no window": attention_with(window=None)},
    "ernie4_5_moe": {
        "not renormalized": router_with(renormalize=False),
        "bias of the choice left out": CHOICE_BIAS_ZERO,
        "halves that rotate": layers_with(other_layout),
    },
    "flex_olmo": {"renormalized": router_with(renormalize=True), "gate and up swapped": GATE_AND_UP_SWAPPED},
    "granitemoeshared": {
        "softmax of all": router_with(score=Score.SOFTMAX),
        "shared gate and up swapped": SHARED_SWAPPED,
    },
    "minimax_m2": {"softmax": router_with(score=Score.SOFTMAX), "bias of the choice left out": CHOICE_BIAS_ZERO},
    "solar_open": {"no groups": router_with(groups=1, kept_groups=1), "not scaled": router_with(scale=1.0)},
    "hunyuan_v1_moe": {
        "normed before they rotate": attention_with(qk_norm_rotated=False),
        "not renormalized": router_with(renormalize=False),
    },
    "cohere2_moe": {
        "experts added, not averaged": router_with(scale=1.0),
        "not renormalized": router_with(renormalize=False),
        "windows in other layers": WINDOWS_MOVED,
        "shared gate and up swapped": SHARED_SWAPPED,
    },
    "exaone_moe": {
        "no groups": router_with(groups=1, kept_groups=1),
        "not scaled": router_with(scale=1.0),
        "bias of the choice left out": CHOICE_BIAS_ZERO,
        "windows in other layers": WINDOWS_MOVED,
    },
    "flint": {
        "softmax": router_with(score=Score.SOFTMAX),
        "sinks of the wrong sign": SINKS_NEGATED,
        "windows in other layers": WINDOWS_MOVED,
    },
    "granitemoe_swa": {
        "softmax of all": router_with(score=Score.SOFTMAX),
        "sinks of the wrong sign": SINKS_NEGATED,
        "windows in other layers": WINDOWS_MOVED,
        "shared gate and up swapped": SHARED_SWAPPED,
    },
    "hy_v3": {
        "softmax": router_with(score=Score.SOFTMAX),
        "not scaled": router_with(scale=1.0),
        "bias of the choice left out": CHOICE_BIAS_ZERO,
        "normed after they rotate": attention_with(qk_norm_rotated=True),
    },
    "mellum": {
        "not renormalized": router_with(renormalize=False),
        "windows in other layers": WINDOWS_MOVED,
        "normed after they rotate": attention_with(qk_norm_rotated=True),
    },
}


def made(family: str, which: int) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    name, fields = CONFIGS[family]
    config = getattr(transformers, f"{name}Config")(**fields[which])
    return getattr(transformers, f"{name}ForCausalLM"), config


@pytest.mark.parametrize(
    ("family", "which"), [(family, which) for family in CONFIGS for which in range(len(CONFIGS[family][1]))]
)
def test_mixtures(family: str, which: int, agrees: Callable[..., None]) -> None:
    kind, config = made(family, which)
    agrees(kind, config, 7 + which)


@pytest.mark.parametrize("family", CONFIGS)
def test_wrong_mappings_are_seen(family: str, catches: Callable[..., None]) -> None:
    catches(*made(family, 1), WRONG[family])


LEFT_OUT: dict[str, dict[str, Any]] = {
    "cohere2_moe": {"first_k_dense_replace": 2, "num_shared_experts": 1},
    "exaone_moe": {},
    "flint": {},
    "granitemoe_swa": {},
    "hy_v3": {},
    "mellum": {"layer_types": [FULL, SLIDING] * 4},
}


@pytest.mark.parametrize("family", LEFT_OUT)
def test_absent_fields_mean_what_the_class_takes_them_for(family: str) -> None:
    """Which layers have windows and experts among them, for the classes write these out when a model is saved."""
    kind = getattr(transformers, f"{CONFIGS[family][0]}Config")
    reads_alike(kind, SIZES | {"num_hidden_layers": 8, "model_type": family} | LEFT_OUT[family])
