"""Models of the GGUF architectures with experts, and what converters do to these."""

from dataclasses import replace
from typing import Any

import gguf
import numpy as np
import transformers as hf
from hypothesis import strategies as st

from twinfer.checkpoint.gguf.architectures import ARCHITECTURES, Windows
from twinfer.spec.config import Activation, NormKind

from .gguf_converter import Config, Rows, base_keys, granite_keys, llama_keys, permuted, phi3_keys, rope_keys
from .gguf_kind import RMS, TIED, Kind, epsilons, llama_sizes, windows, yes_or_no
from .gguf_kinds_llama import long_ropes


def one_map_a_tensor(found: dict[str, Rows], config: Config) -> dict[str, Rows]:
    """Take gate and up apart, under the names that files have which hold one tensor an expert."""
    renamed: dict[str, Rows] = {}
    for name, values in found.items():
        before, last = name.rpartition(".")[0], name.rpartition(".")[2]
        before = before.replace("block_sparse_moe.experts", "mlp.experts")
        turned = config.model_type == "gpt_oss" and values.ndim == 3
        values = values.swapaxes(1, 2) if turned else values
        if last in ("gate_up_proj", "gate_up_proj_bias"):
            ending = "bias" if last.endswith("bias") else "weight"
            if config.model_type == "gpt_oss":
                pair = values[:, ::2], values[:, 1::2]
            else:
                pair = values[:, : values.shape[1] // 2], values[:, values.shape[1] // 2 :]
            renamed |= {f"{before}.{map_}_proj.{ending}": each for map_, each in zip(("gate", "up"), pair, strict=True)}
        elif last in ("down_proj", "down_proj_bias") and values.ndim == 3 - last.endswith("bias"):
            renamed[f"{before}.down_proj.{'bias' if last.endswith('bias') else 'weight'}"] = values
        elif config.model_type == "dbrx" and last in ("w1", "v1", "w2"):
            each = values.reshape(config.ffn_config.moe_num_experts, -1, config.hidden_size)
            renamed[f"{name}.weight"] = each.swapaxes(1, 2) if last == "w2" else each
        elif name.endswith("shared_mlp.input_linear.weight"):
            halves = np.split(values, 2)
            named = before.replace("shared_mlp.input_linear", "mlp.shared_expert")
            renamed |= {f"{named}.{map_}_proj.weight": each for map_, each in zip(("gate", "up"), halves, strict=True)}
        elif last == "e_score_correction_bias":
            renamed[f"{before}.e_score_correction.bias"] = values
        elif last == "sinks":
            renamed[f"{name}.weight"] = values
        else:
            name = name.replace("block_sparse_moe.router.weight", "block_sparse_moe.router.layer.weight")
            renamed[name] = values[0] if name.endswith("shared_expert_gate.weight") else values
    return renamed


def expert_keys(writer: gguf.GGUFWriter, config: Config) -> None:
    """Which those of a config with LLaMA's names are, beside the rest."""
    counts = ("num_local_experts", "num_experts", "n_routed_experts")
    writer.add_expert_count(next(getattr(config, name) for name in counts if hasattr(config, name)))
    writer.add_expert_used_count(config.num_experts_per_tok)
    if hasattr(config, "n_group"):
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)
    if hasattr(config, "moe_intermediate_size"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if hasattr(config, "shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)


def mixtral_keys(writer: gguf.GGUFWriter, config: Config) -> None:
    llama_keys(writer, config)
    expert_keys(writer, config)


def qwen_keys(writer: gguf.GGUFWriter, config: Config) -> None:
    base_keys(writer, config)
    expert_keys(writer, config)


def granite_moe_keys(writer: gguf.GGUFWriter, config: Config) -> None:
    granite_keys(writer, config)
    expert_keys(writer, config)
    if hasattr(config, "shared_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(config.shared_intermediate_size)


def phimoe_keys(writer: gguf.GGUFWriter, config: Config) -> None:
    config.original_max_position_embeddings = config.rope_parameters["original_max_position_embeddings"]
    phi3_keys(writer, config)
    expert_keys(writer, config)


def phimoe_rope(long: dict[str, Any]) -> dict[str, Any]:
    """LongRoPE as Phi's mixtures have it, for a first context of 40: of longer ones transformers takes no notice."""
    factor = {"short_mscale": long["attention_factor"], "long_mscale": long["attention_factor"]}
    return long | factor | {"original_max_position_embeddings": 40}


def dbrx_keys(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_block_count(config.n_layers)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.ffn_config.ffn_hidden_size)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.attn_config.kv_n_heads)
    rope_keys(writer, config)
    writer.add_clamp_kqv(config.attn_config.clip_qkv)
    writer.add_expert_count(config.ffn_config.moe_num_experts)
    writer.add_expert_used_count(config.ffn_config.moe_top_k)
    writer.add_layer_norm_eps(1e-5)


def gpt_oss_keys(writer: gguf.GGUFWriter, config: Config) -> None:
    qwen_keys(writer, config)
    writer.add_sliding_window(config.sliding_window)
    writer.add_expert_feed_forward_length(config.intermediate_size)


def hunyuan_keys(writer: gguf.GGUFWriter, config: Config) -> None:
    qwen_keys(writer, config)
    writer.add_expert_feed_forward_length(config.intermediate_size)
    writer.add_expert_shared_feed_forward_length(config.intermediate_size)
    writer.add_expert_shared_count(1)
    if (alpha := config.rope_parameters.get("alpha")) is not None:
        power = config.head_dim / (config.head_dim - 2)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"] * alpha**power)
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
        writer.add_rope_scaling_factor(1)
        writer.add_rope_scaling_orig_ctx_len(config.max_position_embeddings)


def dbrx_sizes(sizes: dict[str, int]) -> dict[str, Any]:
    plain = llama_sizes(sizes)
    ffn = {"ffn_hidden_size": sizes["width"], "hidden_size": plain["hidden_size"], "moe_num_experts": 4, "moe_top_k": 2}
    return {
        "d_model": plain["hidden_size"],
        "n_heads": plain["num_attention_heads"],
        "n_layers": sizes["layers"],
        "max_seq_len": 40,
        "vocab_size": sizes["vocabulary"],
        "attn_config": {"kv_n_heads": sizes["kv_heads"], "rope_theta": 10000.0, "clip_qkv": 0.5},
        "ffn_config": ffn,
        "tie_word_embeddings": False,
    }


PHIMOE_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "long_factor": [1.0, 1.5, 4.0, 1.0],
    "short_factor": [1.0] * 4,
    "attention_factor": 1.25,
}
HUNYUAN_ROPE = {"rope_type": "dynamic", "rope_theta": 4.0, "factor": 1.0, "alpha": 16.0}
"""With heads of 4 elements a base of 4 * 16^2, which float32 holds."""
OSS_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 150.0,
    "factor": 4.0,
    "original_max_position_embeddings": 12,
    "truncate": False,
    "beta_fast": 5.0,
}
LOCAL = {"num_local_experts": st.sampled_from([2, 4]), "num_experts_per_tok": st.sampled_from([1, 2])}
QWEN = {
    "num_experts": st.sampled_from([4, 5]),
    "num_experts_per_tok": st.sampled_from([1, 2, 4]),
    "moe_intermediate_size": st.integers(1, 9),
}
FOUR = {"num_local_experts": 4, "num_experts_per_tok": 2}
FEW = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 8}
GRANITE = {
    "embedding_multiplier": st.sampled_from([1.0, 12.0]),
    "attention_multiplier": st.sampled_from([0.015625, 1.0]),
    "residual_multiplier": st.sampled_from([0.25, 1.0]),
    "logits_scaling": st.sampled_from([1.0, 3.0]),
}


def otherwise(architecture: str, **fields: Any) -> dict[str, Any]:
    """A wrong record: the experts in these ways otherwise."""
    mixture = ARCHITECTURES[architecture].experts
    assert mixture is not None
    return {"experts": replace(mixture, **fields)}


MOE_KINDS = [
    Kind(
        architecture="llama",
        model=hf.MixtralForCausalLM,
        config=hf.MixtralConfig,
        options={**RMS, **TIED, **LOCAL},
        keys=mixtral_keys,
        rows=permuted,
        chosen=FOUR,
        wrong=({"experts": None}, otherwise("llama", recipe="qwen2-moe")),
    ),
    Kind(
        architecture="qwen2moe",
        model=hf.Qwen2MoeForCausalLM,
        config=hf.Qwen2MoeConfig,
        options={**RMS, **QWEN, "shared_expert_intermediate_size": st.integers(1, 9)},
        keys=qwen_keys,
        chosen=FEW | {"shared_expert_intermediate_size": 10},
        wrong=(otherwise("qwen2moe", recipe="qwen3-moe"), {"activation": Activation.GELU_TANH}),
    ),
    Kind(
        architecture="qwen3moe",
        model=hf.Qwen3MoeForCausalLM,
        config=hf.Qwen3MoeConfig,
        options={**RMS, **QWEN, **TIED, "head_dim": st.sampled_from([4, 6]), "norm_topk_prob": st.just(True)},
        keys=qwen_keys,
        chosen=FEW | {"norm_topk_prob": True, "head_dim": 4},
        wrong=(otherwise("qwen3moe", recipe="qwen2-moe"), {"permuted": True}),
    ),
    Kind(
        architecture="olmoe",
        model=hf.OlmoeForCausalLM,
        config=hf.OlmoeConfig,
        options={**RMS, "num_experts": st.sampled_from([4, 5]), "num_experts_per_tok": st.sampled_from([1, 4])},
        keys=qwen_keys,
        chosen={"num_experts": 6, "num_experts_per_tok": 3},
        wrong=(otherwise("olmoe", recipe="qwen3-moe"), {"permuted": True}),
    ),
    Kind(
        architecture="granitemoe",
        model=hf.GraniteMoeForCausalLM,
        config=hf.GraniteMoeConfig,
        options={**RMS, **TIED, **LOCAL, **GRANITE},
        keys=granite_moe_keys,
        rows=permuted,
        chosen=FOUR | {"logits_scaling": 8.0, "attention_multiplier": 0.25, "residual_multiplier": 0.5},
        wrong=(otherwise("granitemoe", recipe="qwen2-moe"), {"permuted": False}),
    ),
    Kind(
        architecture="granitemoe",
        model=hf.GraniteMoeSharedForCausalLM,
        config=hf.GraniteMoeSharedConfig,
        options={**RMS, **LOCAL, **GRANITE, "shared_intermediate_size": st.integers(1, 9)},
        keys=granite_moe_keys,
        rows=permuted,
        chosen=FOUR | {"shared_intermediate_size": 7},
        wrong=(otherwise("granitemoe", shared=None), otherwise("granitemoe", shared_gate=True)),
    ),
    Kind(
        architecture="phimoe",
        model=hf.PhimoeForCausalLM,
        config=hf.PhimoeConfig,
        options={
            "rms_norm_eps": epsilons,
            "num_local_experts": st.sampled_from([2, 4]),
            "attention_bias": yes_or_no,
            "lm_head_bias": yes_or_no,
            "sliding_window": st.one_of(st.none(), windows),
            "size": st.just(8),
            "rope_parameters": long_ropes().map(phimoe_rope),
        },
        keys=phimoe_keys,
        chosen={
            "sliding_window": 3,
            "attention_bias": True,
            "lm_head_bias": True,
            "num_local_experts": 4,
            "rope_parameters": phimoe_rope(PHIMOE_ROPE),
        },
        wrong=({"norm": NormKind.RMS}, otherwise("phimoe", recipe="mixtral")),
    ),
    Kind(
        architecture="dbrx",
        model=hf.DbrxForCausalLM,
        config=hf.DbrxConfig,
        options={},
        keys=dbrx_keys,
        sizes=dbrx_sizes,
        wrong=(otherwise("dbrx", recipe="qwen2-moe"), {"mlp_norm": "ffn_norm"}, {"norm": NormKind.RMS}),
    ),
    Kind(
        architecture="gpt-oss",
        model=hf.GptOssForCausalLM,
        config=hf.GptOssConfig,
        options={
            **RMS,
            **LOCAL,
            "head_dim": st.just(16),
            "sliding_window": windows,
            "layers": st.integers(1, 4),
            "rope_parameters": st.just(OSS_ROPE),
        },
        keys=gpt_oss_keys,
        chosen=FOUR | {"head_dim": 16, "sliding_window": 4, "layers": 3, "rope_parameters": OSS_ROPE},
        wrong=(
            {"whole_yarn": True},
            {"sinks": False},
            {"windows": Windows(period=3, absent=None)},
            otherwise("gpt-oss", expert={"bias": True, "up_offset": 1.0, "clamp": 1.0}),
        ),
    ),
    Kind(
        architecture="hunyuan-moe",
        model=hf.HunYuanMoEV1ForCausalLM,
        config=hf.HunYuanMoEV1Config,
        options={
            **RMS,
            **TIED,
            "head_dim": st.just(4),
            "num_experts": st.sampled_from([2, 4]),
            "moe_topk": st.sampled_from([1, 2]),
            "rope_parameters": st.sampled_from([HUNYUAN_ROPE, {"rope_type": "default", "rope_theta": 100.0}]),
        },
        keys=hunyuan_keys,
        chosen={"num_experts": 6, "moe_topk": 3, "head_dim": 8},
        wrong=({"qk_norm_rotated": False}, otherwise("hunyuan-moe", recipe="qwen2-moe")),
    ),
]
