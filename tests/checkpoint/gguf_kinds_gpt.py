"""Models of the GGUF architectures that have GPT-2's norms, layer norms."""

from typing import Any

import transformers as hf
from hypothesis import strategies as st

from twinfer.checkpoint.gguf.architectures import Windows
from twinfer.spec.config import Activation, Residual, RotaryLayout

from .gguf_converter import base_keys, bert_keys, by_kind, cohere_keys, gpt_keys, partly_rotating_keys, turned
from .gguf_kind import (
    GPT,
    HALF,
    LAYER,
    NO_TOKENS,
    STARCODER2,
    TIED,
    Kind,
    epsilons,
    llama_sizes,
    parts,
    ropes,
    windows,
    yes_or_no,
)

INTERLEAVED, HALF_SPLIT = RotaryLayout.INTERLEAVED, RotaryLayout.HALF_SPLIT


def one_to_one(sizes: dict[str, int]) -> dict[str, Any]:
    """As many key/value heads as heads, and an MLP of the usual width."""
    found = llama_sizes(sizes)
    return found | {
        "num_key_value_heads": found["num_attention_heads"],
        "intermediate_size": 4 * found["hidden_size"],
    }


def gpt_sizes(sizes: dict[str, int]) -> dict[str, Any]:
    heads = sizes["kv_heads"] * sizes["group"]
    return {
        "vocab_size": sizes["vocabulary"],
        "n_embd": heads * sizes["size"],
        "n_layer": sizes["layers"],
        "n_head": heads,
        "n_positions": 40,
        **NO_TOKENS,
    }


def plain_sizes(sizes: dict[str, int]) -> dict[str, Any]:
    heads = sizes["kv_heads"] * sizes["group"]
    return {
        "vocab_size": sizes["vocabulary"],
        "hidden_size": heads * sizes["size"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": heads,
        **NO_TOKENS,
    }


def falcon_sizes(sizes: dict[str, int]) -> dict[str, Any]:
    return plain_sizes(sizes) | {"num_kv_heads": sizes["kv_heads"], "parallel_attn": True, "bias": False}


def mpt_sizes(sizes: dict[str, int]) -> dict[str, Any]:
    heads = sizes["kv_heads"] * sizes["group"]
    return {
        "vocab_size": sizes["vocabulary"],
        "d_model": heads * sizes["size"],
        "n_layers": sizes["layers"],
        "n_heads": heads,
        "max_seq_len": 40,
    }


GPT_KINDS = [
    Kind(
        architecture="stablelm",
        model=hf.StableLmForCausalLM,
        config=hf.StableLmConfig,
        options={
            "size": st.just(8),
            "use_qkv_bias": yes_or_no,
            "qk_layernorm": st.just(False),
            "use_parallel_residual": yes_or_no,
            "rope_parameters": parts,
            **LAYER,
        },
        keys=partly_rotating_keys,
        chosen={"rope_parameters": HALF},
        wrong=({"rotary": INTERLEAVED}, {"activation": Activation.GELU}),
        read_by_transformers=True,
    ),
    Kind(
        architecture="stablelm",
        model=hf.StableLmForCausalLM,
        config=hf.StableLmConfig,
        options={
            **LAYER,
            "size": st.just(8),
            "qk_layernorm": st.just(True),
            "use_parallel_residual": yes_or_no,
            "rope_parameters": parts,
        },
        keys=partly_rotating_keys,
        chosen={"qk_layernorm": True, "rope_parameters": HALF},
        wrong=({"rotary": INTERLEAVED},),
    ),
    Kind(
        architecture="command-r",
        model=hf.CohereForCausalLM,
        config=hf.CohereConfig,
        options={
            "attention_bias": yes_or_no,
            "use_qk_norm": yes_or_no,
            "logit_scale": st.sampled_from([0.0625, 2.0]),
            "layer_norm_eps": epsilons,
        },
        keys=cohere_keys,
        chosen={"logit_scale": 0.25},
        wrong=({"rotary": HALF_SPLIT}, {"logit_divisor": True}),
    ),
    Kind(
        architecture="cohere2",
        model=hf.Cohere2ForCausalLM,
        config=hf.Cohere2Config,
        options={
            **LAYER,
            "layers": st.integers(1, 5),
            "sliding_window": windows,
            "logit_scale": st.sampled_from([0.0625, 2.0]),
        },
        keys=cohere_keys,
        chosen={"layers": 4, "sliding_window": 3},
        wrong=(
            {"rotary": HALF_SPLIT},
            {"windows": Windows(period=4, absent=None)},
            {"windows": Windows(period=3, absent=None, alone=True)},
        ),
    ),
    Kind(
        architecture="gpt2",
        model=hf.GPT2LMHeadModel,
        config=hf.GPT2Config,
        options={**TIED, **GPT},
        sizes=gpt_sizes,
        keys=gpt_keys,
        rows=turned,
        wrong=({"activation": Activation.GELU},),
        read_by_transformers=True,
    ),
    Kind(
        architecture="starcoder",
        model=hf.GPTBigCodeForCausalLM,
        config=hf.GPTBigCodeConfig,
        options={**TIED, **GPT},
        sizes=gpt_sizes,
        keys=gpt_keys,
        wrong=({"activation": Activation.GELU},),
    ),
    Kind(
        architecture="starcoder2",
        model=hf.Starcoder2ForCausalLM,
        config=hf.Starcoder2Config,
        options={
            **TIED,
            **STARCODER2,
            "use_bias": yes_or_no,
            "rope_parameters": ropes,
            "sliding_window": st.sampled_from([None, 4096]),  # no key says which; 4096 is beyond the context here
        },
        keys=base_keys,
        wrong=(
            {"activation": Activation.GELU},
            {"rotary": INTERLEAVED},
            {"permuted": True},
            {"windows": Windows(period=None, absent=3)},
        ),
        read_by_transformers=True,
    ),
    Kind(
        architecture="bloom",
        model=hf.BloomForCausalLM,
        config=hf.BloomConfig,
        options={**GPT},
        sizes=plain_sizes,
        keys=gpt_keys,
        rows=by_kind,
        wrong=({"alibi": 4.0}, {"activation": Activation.GELU}),
        read_by_transformers=True,
    ),
    Kind(
        architecture="mpt",
        model=hf.MptForCausalLM,
        config=hf.MptConfig,
        options={
            "attn_config": st.fixed_dictionaries(
                {"clip_qkv": st.sampled_from([None, 0.5])}  # another alibi_bias_max than 8 transformers ignores
            )
        },
        sizes=mpt_sizes,
        keys=gpt_keys,
        chosen={"attn_config": {"clip_qkv": 0.5}},
        wrong=({"activation": Activation.GELU_TANH}, {"optional": ()}),
    ),
    Kind(
        architecture="gptneox",
        model=hf.GPTNeoXForCausalLM,
        config=hf.GPTNeoXConfig,
        options={
            **TIED,
            **LAYER,
            "size": st.just(8),
            "use_parallel_residual": yes_or_no,
            "rope_parameters": parts,
            "attention_bias": yes_or_no,
        },
        sizes=one_to_one,
        keys=partly_rotating_keys,
        rows=by_kind,
        chosen={"rope_parameters": HALF},
        wrong=(
            {"residuals": (Residual.SEQUENTIAL, Residual.PARALLEL)},
            {"activation": Activation.GELU_TANH},
            {"rotary": INTERLEAVED},
        ),
    ),
    Kind(
        architecture="falcon",
        model=hf.FalconForCausalLM,
        config=hf.FalconConfig,
        options={"multi_query": st.just(True), **GPT},  # 7B: one group, in which nothing moves
        sizes=falcon_sizes,
        keys=gpt_keys,
        wrong=({"activation": Activation.GELU_TANH}, {"rotary": INTERLEAVED}),
        read_by_transformers=True,
    ),
    Kind(
        architecture="falcon",
        model=hf.FalconForCausalLM,
        config=hf.FalconConfig,
        options={
            **GPT,
            "new_decoder_architecture": st.just(True),  # 40B and 11B
            "num_ln_in_parallel_attn": st.sampled_from([1, 2]),
            **TIED,
        },
        sizes=falcon_sizes,
        keys=gpt_keys,
        rows=by_kind,
        chosen={"new_decoder_architecture": True},
        wrong=({"activation": Activation.GELU_TANH},),
    ),
    Kind(
        architecture="phi2",
        model=hf.PhiForCausalLM,
        config=hf.PhiConfig,
        options={"size": st.just(8), "rope_parameters": parts, **LAYER},
        sizes=one_to_one,
        keys=partly_rotating_keys,
        chosen={"rope_parameters": HALF},
        wrong=({"activation": Activation.GELU}, {"rotary": INTERLEAVED}),
    ),
    Kind(
        architecture="bert",
        model=hf.BertModel,
        config=hf.BertConfig,
        options={"type_vocab_size": st.integers(1, 2), **LAYER},
        sizes=one_to_one,
        keys=bert_keys,
        wrong=({"activation": Activation.GELU_TANH},),
    ),
]
