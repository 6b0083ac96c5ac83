"""Valid models to be damaged: small, of many families, in every form in which a model is opened."""

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers as hf
from tokenizers import decoders, models, pre_tokenizers

from twinfer.checkpoint import open_model
from twinfer.converting import convert
from twinfer.spec.config import Storage

from ..checkpoint.test_gguf import KINDS, write
from ..checkpoint.test_gguf import tiny as tiny_llama

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
}
GPT = {"vocab_size": 40, "hidden_size": 16, "bos_token_id": 0, "eos_token_id": 0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 32}
LONG |= {"rope_type": "longrope", "rope_theta": 10000.0}

MODELS: dict[str, tuple[type[Any], type[Any], dict[str, Any]]] = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, SIZES | {"rope_parameters": YARN, "tie_word_embeddings": True}),
    "phi3": (hf.Phi3ForCausalLM, hf.Phi3Config, SIZES | {"rope_parameters": LONG, "sliding_window": 8}),
    "gemma3": (
        hf.Gemma3ForCausalLM,
        hf.Gemma3TextConfig,
        SIZES | {"head_dim": 8, "sliding_window": 8, "num_key_value_heads": 1},
    ),
    "cohere2": (hf.Cohere2ForCausalLM, hf.Cohere2Config, SIZES | {"sliding_window": 8}),
    "opt": (
        hf.OPTForCausalLM,
        hf.OPTConfig,
        {name: size for name, size in SIZES.items() if name != "intermediate_size"}
        | {"ffn_dim": 12, "layer_norm_elementwise_affine": False, "word_embed_proj_dim": 16},
    ),
    "bloom": (hf.BloomForCausalLM, hf.BloomConfig, GPT | {"n_layer": 2, "n_head": 2}),
    "mpt": (
        hf.MptForCausalLM,
        hf.MptConfig,
        {"vocab_size": 40, "d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 64},
    ),
    "gpt_neo": (
        hf.GPTNeoForCausalLM,
        hf.GPTNeoConfig,
        {
            "vocab_size": 40,
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 2,
            "max_position_embeddings": 64,
            "attention_types": [[["global", "local"], 1]],
        },
    ),
    "bert": (hf.BertModel, hf.BertConfig, SIZES),
}

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}a{{ message['content'] | trim }}"
    "{% else %}b{% endif %}{% endfor %}{% if add_generation_prompt %}c{% endif %}"
)


def make(folder: Path) -> list[Path]:
    """Write them all; returns their folders and files."""
    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    torch.manual_seed(0)
    paths = [_saved(folder / name, *parts) for name, parts in MODELS.items()]
    _sentence_files(folder / "bert")
    sharded = folder / "sharded"
    model, config, fields = MODELS["llama"]
    model(config(**fields)).eval().save_pretrained(sharded, max_shard_size="4KB")
    _surround(sharded)
    own = folder / "own"
    convert(open_model(str(folder / "llama")), own, Storage.INT8, lambda line: None)
    return [*paths, sharded, own, *_gguf_files(folder)]


def _saved(folder: Path, model: type[Any], config: type[Any], fields: dict[str, Any]) -> Path:
    model(config(**fields)).eval().save_pretrained(folder)
    _surround(folder)
    return folder


def _surround(folder: Path) -> None:
    tokens = [*"<>|abcdefghijklmnopqrstuvwxyz", "ab", "abc", "th", "the"]
    merges = [("a", "b"), ("ab", "c"), ("t", "h"), ("th", "e")]
    ids = {token: index for index, token in enumerate(tokens)}
    inner = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="|"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<", ">"])
    inner.save(str(folder / "tokenizer.json"))
    about = {"bos_token": "<", "eos_token": {"content": ">"}, "chat_template": TEMPLATE, "model_max_length": 64}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1]}))


def _sentence_files(folder: Path) -> None:
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [{"idx": i, "name": str(i), "path": path, "type": f"x.{kind}"} for i, (path, kind) in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"embedding_dimension": 16, "pooling_mode": "mean"}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 32, "do_lower_case": True}))


def _gguf_files(folder: Path) -> list[Path]:
    tokens = [*"<>|abcdefghi", "ab"]

    def with_tokenizer(writer: Any) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("llama-bpe")
        writer.add_token_list(tokens)
        writer.add_token_merges(["a b"])
        writer.add_token_types([3, 3, *[1] * (len(tokens) - 2)])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        writer.add_add_bos_token(True)
        writer.add_chat_template(TEMPLATE)

    for name, kind in (("plain", KINDS.F32), ("packed", KINDS.Q4_1)):
        model = tiny_llama(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=32)
        write(folder / f"{name}.gguf", model, kind, change=with_tokenizer)
    return [folder / "plain.gguf", folder / "packed.gguf"]
