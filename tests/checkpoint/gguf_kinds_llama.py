"""Models of the GGUF architectures that have LLaMA's norms, root mean squares."""

import math
from typing import Any

import transformers as hf
from hypothesis import strategies as st

from twinfer.checkpoint.gguf.architectures import Windows
from twinfer.spec.config import Activation, RotaryLayout

from .gguf_converter import base_keys, gemma_keys, granite_keys, llama_keys, offset, olmo_keys, permuted, phi3_keys
from .gguf_kind import RMS, ROPES, TIED, Kind, parts, ropes, windows, yes_or_no

INTERLEAVED = RotaryLayout.INTERLEAVED
GEMMA = {"head_dim": st.sampled_from([4, 6, 16]), **RMS}


def long_ropes() -> st.SearchStrategy[dict[str, Any]]:
    """LongRoPE's for heads of 8 elements; factors that float32 holds."""
    return st.lists(st.sampled_from([1.0, 1.5, 4.0]), min_size=8, max_size=8).map(
        lambda factors: {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "long_factor": factors[:4],
            "short_factor": factors[4:],
            "attention_factor": 1.25,
        }
    )


def gemma3_ropes(factor: float) -> dict[str, Any]:
    return {
        "full_attention": {"rope_type": "linear", "factor": factor, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }


def olmo3_ropes(factor: float) -> dict[str, Any]:
    yarn = ROPES[3] | {"factor": factor, "attention_factor": 0.1 * math.log(factor) + 1.0}
    return {"full_attention": yarn, "sliding_attention": {"rope_type": "default", "rope_theta": yarn["rope_theta"]}}


LLAMA_KINDS = [
    Kind(
        architecture="llama",
        model=hf.LlamaForCausalLM,
        config=hf.LlamaConfig,
        options={
            **TIED,
            "head_dim": st.sampled_from([4, 6]),
            "attention_bias": yes_or_no,
            "mlp_bias": yes_or_no,
            "rope_parameters": ropes,
            **RMS,
        },
        keys=llama_keys,
        rows=permuted,
        wrong=({"permuted": False}, {"activation": Activation.GELU_TANH}),
        read_by_transformers=True,
    ),
    Kind(
        architecture="internlm2",
        model=hf.LlamaForCausalLM,  # with one tensor for queries, keys and values, which the converter takes apart
        config=hf.LlamaConfig,
        options={**TIED, **RMS},
        keys=base_keys,
        rows=permuted,
        wrong=({"permuted": False},),
    ),
    Kind(
        architecture="smollm3",
        model=hf.SmolLM3ForCausalLM,
        config=hf.SmolLM3Config,
        options={**TIED, **RMS, "attention_bias": yes_or_no, "mlp_bias": yes_or_no, "layers": st.integers(1, 5)},
        keys=llama_keys,
        rows=permuted,
        chosen={"layers": 4},
        wrong=({"unrotated": None}, {"unrotated": 3}, {"permuted": False}),
    ),
    Kind(
        architecture="granite",
        model=hf.GraniteForCausalLM,
        config=hf.GraniteConfig,
        options={
            **RMS,
            **TIED,
            "attention_bias": yes_or_no,
            "mlp_bias": yes_or_no,
            "embedding_multiplier": st.sampled_from([1.0, 12.0]),
            "attention_multiplier": st.sampled_from([0.015625, 1.0]),
            "residual_multiplier": st.sampled_from([0.25, 1.0]),
            "logits_scaling": st.sampled_from([1.0, 3.0, 8.0]),
        },
        keys=granite_keys,
        rows=permuted,
        chosen={"logits_scaling": 8.0, "attention_multiplier": 0.25, "residual_multiplier": 0.5},
        wrong=({"logit_divisor": False}, {"permuted": False}),
    ),
    Kind(
        architecture="qwen2",
        model=hf.Qwen2ForCausalLM,
        config=hf.Qwen2Config,
        options={**TIED, **RMS, "rope_parameters": ropes},
        keys=base_keys,
        wrong=({"permuted": True}, {"rotary": INTERLEAVED}),
        read_by_transformers=True,
    ),
    Kind(
        architecture="qwen3",
        model=hf.Qwen3ForCausalLM,
        config=hf.Qwen3Config,
        options={
            **TIED,
            **RMS,
            "head_dim": st.sampled_from([4, 6]),
            "attention_bias": yes_or_no,
            "rope_parameters": ropes,
        },
        keys=base_keys,
        wrong=({"permuted": True}, {"rotary": INTERLEAVED}),
        read_by_transformers=True,
    ),
    Kind(
        architecture="olmo2",
        model=hf.Olmo2ForCausalLM,
        config=hf.Olmo2Config,
        options={**TIED, **RMS, "attention_bias": yes_or_no, "rope_parameters": ropes},
        keys=olmo_keys,
        wrong=({"rotary": INTERLEAVED}, {"activation": Activation.GELU}),
    ),
    Kind(
        architecture="olmo2",
        model=hf.Olmo3ForCausalLM,
        config=hf.Olmo3Config,
        options={
            **RMS,
            **TIED,
            "layers": st.integers(1, 5),
            "sliding_window": windows,
            "rope_parameters": st.sampled_from([4.0, 2.5]).map(olmo3_ropes),
        },
        keys=olmo_keys,
        chosen={"layers": 4, "sliding_window": 3, "rope_parameters": olmo3_ropes(4.0)},
        wrong=({"windows": Windows(period=4, scaled=True)}, {"windows": Windows(period=4, base=7.0, scaled=False)}),
    ),
    Kind(
        architecture="phi3",
        model=hf.Phi3ForCausalLM,
        config=hf.Phi3Config,
        options={
            **RMS,
            **TIED,
            "size": st.just(8),
            "sliding_window": st.one_of(st.none(), windows),
            "original_max_position_embeddings": st.sampled_from([4, 40]),
            "rope_parameters": st.one_of(parts, long_ropes()),
        },
        keys=phi3_keys,
        chosen={"sliding_window": 3},
        wrong=({"rotary": INTERLEAVED}, {"windows": Windows(period=2, absent=None)}),
        read_by_transformers=True,
    ),
    Kind(
        architecture="gemma",
        model=hf.GemmaForCausalLM,
        config=hf.GemmaConfig,
        options={**GEMMA},
        keys=gemma_keys,
        rows=offset,
        chosen={"head_dim": 6},
        wrong=({"embedding_root": False}, {"activation": Activation.GELU}, {"rotary": INTERLEAVED}),
    ),
    Kind(
        architecture="gemma2",
        model=hf.Gemma2ForCausalLM,
        config=hf.Gemma2Config,
        options={
            "head_dim": st.just(6),
            "query_pre_attn_scalar": st.just(6),
            **RMS,
            "sliding_window": windows,
            "attn_logit_softcapping": st.sampled_from([50.0, 0.5]),
            "final_logit_softcapping": st.sampled_from([30.0, 0.5]),
        },
        keys=gemma_keys,
        rows=offset,
        chosen={"head_dim": 6, "query_pre_attn_scalar": 6, "sliding_window": 3},
        wrong=({"windows": Windows(period=1)}, {"windows": Windows(period=3)}, {"embedding_root": False}),
        read_by_transformers=True,
    ),
    Kind(
        architecture="gemma3",
        model=hf.Gemma3ForCausalLM,
        config=hf.Gemma3TextConfig,
        options={
            "layers": st.sampled_from([1, 6, 7]),
            "head_dim": st.just(6),
            "query_pre_attn_scalar": st.just(6),
            **RMS,
            "sliding_window": windows,
            "final_logit_softcapping": st.sampled_from([None, 0.5]),
            "rope_parameters": st.sampled_from([1.0, 8.0]).map(gemma3_ropes),
        },
        keys=gemma_keys,
        rows=offset,
        chosen={
            "layers": 6,
            "head_dim": 6,
            "query_pre_attn_scalar": 6,
            "sliding_window": 3,
            "rope_parameters": gemma3_ropes(8.0),
        },
        wrong=(
            {"windows": Windows(period=6, scaled=False)},
            {"windows": Windows(period=5, base=10000.0, scaled=False)},
            {"embedding_root": False},
        ),
        read_by_transformers=True,
    ),
]
