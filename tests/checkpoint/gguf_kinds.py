"""Models of every GGUF architecture: how they are drawn and written, and which wrong readings must be seen."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gguf
import transformers as hf
from hypothesis import strategies as st

from twinfer.checkpoint.gguf_architectures import Windows
from twinfer.spec.config import Activation, Residual, RotaryLayout

from .gguf_converter import (
    Config,
    Rows,
    base_keys,
    bert_keys,
    by_kind,
    cohere_keys,
    gemma_keys,
    gpt_keys,
    granite_keys,
    kept,
    llama_keys,
    offset,
    olmo_keys,
    partly_rotating_keys,
    permuted,
    phi3_keys,
    turned,
)

NO_TOKENS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


def llama_sizes(sizes: dict[str, int]) -> dict[str, Any]:
    heads = sizes["kv_heads"] * sizes["group"]
    return {
        "vocab_size": sizes["vocabulary"],
        "hidden_size": heads * sizes["size"],
        "intermediate_size": sizes["width"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": sizes["kv_heads"],
        "max_position_embeddings": 40,
        **NO_TOKENS,
    }


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


SIZES = st.fixed_dictionaries(
    {
        "vocabulary": st.integers(3, 30),
        "layers": st.integers(1, 3),
        "kv_heads": st.integers(1, 3),
        "group": st.integers(1, 2),
        "size": st.sampled_from([4, 8]),
        "width": st.integers(1, 20),
    }
)
CHOSEN = {"vocabulary": 20, "layers": 2, "kv_heads": 3, "group": 2, "size": 8, "width": 12}

yes_or_no = st.booleans()
windows = st.integers(1, 14)
ROPES: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 10000.0},
    {"rope_type": "default", "rope_theta": 100.0},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 10},
    {
        "rope_type": "yarn",
        "rope_theta": 500.0,
        "factor": 2.5,
        "original_max_position_embeddings": 16,
        "beta_fast": 8.0,
    },
]
ropes = st.sampled_from(ROPES)
HALF = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
parts = st.sampled_from([0.25, 0.5, 1.0]).map(lambda part: HALF | {"partial_rotary_factor": part})
USUAL = 2.0**-17
epsilons = st.sampled_from([USUAL, 0.25])


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


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How to draw and write a model of an architecture."""

    architecture: str
    model: type[hf.PreTrainedModel]
    config: type[Config]
    options: dict[str, st.SearchStrategy[Any]]
    keys: Callable[[gguf.GGUFWriter, Config], None]
    rows: Callable[[str, Rows, Config], Rows] = kept
    sizes: Callable[[dict[str, int]], dict[str, Any]] = llama_sizes
    chosen: dict[str, Any] = field(default_factory=dict)
    wrong: tuple[dict[str, Any], ...] = ()
    """Changes of the architecture's record that must be seen."""
    read_by_transformers: bool = False

    def usual(self) -> Config:
        """The model on which wrong mappings are tried."""
        exact = {name: USUAL for name in (*RMS, *LAYER, *GPT) if name in self.options}
        return self.made(CHOSEN, exact | self.chosen)

    def drawn(self) -> st.SearchStrategy[Config]:
        return st.builds(lambda sizes, options: self.made(sizes, options), SIZES, st.fixed_dictionaries(self.options))

    def made(self, sizes: dict[str, int], options: dict[str, Any]) -> Config:
        options = dict(options)
        sizes = sizes | {"layers": options.pop("layers", sizes["layers"]), "size": options.pop("size", sizes["size"])}
        return self.config(**self.sizes(sizes) | options)


INTERLEAVED, HALF_SPLIT = RotaryLayout.INTERLEAVED, RotaryLayout.HALF_SPLIT
TIED = {"tie_word_embeddings": yes_or_no}
RMS, LAYER, GPT = ({name: epsilons} for name in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"))
GEMMA = {"head_dim": st.sampled_from([4, 6, 16]), **RMS}

KINDS = [
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
IDS = [f"{kind.architecture}-{kind.model.__name__}-{index}" for index, kind in enumerate(KINDS)]
