"""A LLaMA of one layer as files: a safetensors folder and a GGUF file, written by hand."""

import json
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf.quants import quantize
from safetensors.torch import save_file
from torch import Tensor

M, F, V = 32, 64, 40
SHAPES = {
    "model.embed_tokens.weight": (V, M),
    "model.layers.0.input_layernorm.weight": (M,),
    "model.layers.0.self_attn.q_proj.weight": (M, M),
    "model.layers.0.self_attn.k_proj.weight": (M // 2, M),
    "model.layers.0.self_attn.v_proj.weight": (M // 2, M),
    "model.layers.0.self_attn.o_proj.weight": (M, M),
    "model.layers.0.post_attention_layernorm.weight": (M,),
    "model.layers.0.mlp.gate_proj.weight": (F, M),
    "model.layers.0.mlp.up_proj.weight": (F, M),
    "model.layers.0.mlp.down_proj.weight": (M, F),
    "model.norm.weight": (M,),
}
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": M,
    "intermediate_size": F,
    "vocab_size": V,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "rope_theta": 10000.0,
}
_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.norm": "output_norm",
    "model.layers.": "blk.",
}


def weights(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def write_folder(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    save_file({name: each.to(dtype) for name, each in weights(seed).items()}, folder / "model.safetensors")
    return str(folder)


def write_gguf(path: Path, kind: gguf.GGMLQuantizationType, *, seed: int = 0) -> str:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(M)
    writer.add_feed_forward_length(F)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(V)
    for name, tensor in weights(seed).items():
        for theirs, ours in _GGUF_NAMES.items():
            name = name.replace(theirs, ours)
        how = kind if tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
        values = tensor.numpy()
        writer.add_tensor(name, quantize(values, how), raw_dtype=how)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)
