"""The same weights in other libraries' forms, so that a comparison is of implementations and not of models.

Shapes: V vocabulary, M hidden, H query heads, K key/value heads, D head size, J rotating pairs.
"""

import ctypes
from collections.abc import Iterator
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
import torch
from torch import Tensor

from ...spec.config import Head
from ...spec.errors import RequestError
from ...spec.weights import WeightSource, tensors
from .libraries import llama_cpp
from .llama_like import check_llama_like, plain_frequencies, rotary_base

_TRANSFORMERS = {
    "attention_norm.gain_M": "input_layernorm.weight",
    "attention.query.weight_NI": "self_attn.q_proj.weight",
    "attention.key.weight_NI": "self_attn.k_proj.weight",
    "attention.value.weight_NI": "self_attn.v_proj.weight",
    "attention.output.weight_NI": "self_attn.o_proj.weight",
    "mlp_norm.gain_M": "post_attention_layernorm.weight",
    "mlp.gate.weight_NI": "mlp.gate_proj.weight",
    "mlp.up.weight_NI": "mlp.up_proj.weight",
    "mlp.down.weight_NI": "mlp.down_proj.weight",
}
_GGUF = {
    "attention_norm.gain_M": "attn_norm.weight",
    "attention.query.weight_NI": "attn_q.weight",
    "attention.key.weight_NI": "attn_k.weight",
    "attention.value.weight_NI": "attn_v.weight",
    "attention.output.weight_NI": "attn_output.weight",
    "mlp_norm.gain_M": "ffn_norm.weight",
    "mlp.gate.weight_NI": "ffn_gate.weight",
    "mlp.up.weight_NI": "ffn_up.weight",
    "mlp.down.weight_NI": "ffn_down.weight",
}
_FREQUENCIES = "attention.rotary_frequency_J"
_USUAL_BASE = 10000.0


class Exports:
    """A plain LLaMA's weights, in each form made when it is first asked for; files lie in `folder`, the caller's.

    Raises `RequestError` where the model is no plain LLaMA.
    """

    def __init__(self, source: WeightSource, folder: Path) -> None:
        check_llama_like(source.config)
        self.source = source
        self.folder = folder

    @cached_property
    def transformers(self) -> Any:
        """A `transformers` LlamaForCausalLM in float32, in evaluation mode."""
        return transformers_llama(self.source)

    @cached_property
    def transformers_folder(self) -> Path:
        """What `from_pretrained` reads; its tokenizer is made up: token 7 is written "<7>".

        Raises `RequestError` for scaled frequencies, which only the module in memory has.
        """
        if rotary_base(_frequencies(self.source)) is None:
            raise RequestError("the model's rotary frequencies are scaled; a folder is written of plain ones alone")
        folder = self.folder / "transformers"
        if folder.exists():  # another process has written it
            return folder
        unfinished = folder.with_suffix(".unfinished")
        self.transformers.save_pretrained(unfinished)
        vocabulary = {f"<{token}>": token for token in range(self.source.config.vocabulary)}
        made_up = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<0>"))
        library: Any = import_module("transformers")
        names = {"unk_token": "<0>", "bos_token": "<0>", "eos_token": "<0>"}
        library.PreTrainedTokenizerFast(tokenizer_object=made_up, **names).save_pretrained(unfinished)
        return unfinished.rename(folder)

    @cached_property
    def gguf_float32(self) -> Path:
        """A GGUF file of float32 tensors, without a tokenizer."""
        path = self.folder / "F32.gguf"
        if not path.exists():  # else another process has written it
            unfinished = path.with_suffix(".unfinished")
            write_gguf(self.source, unfinished)
            unfinished.rename(path)
        return path

    def gguf(self, kind: str) -> Path:
        """A GGUF file as llama.cpp's own tool makes it of the float32 one: "F32", "F16", "Q8_0", "Q4_1" and so on."""
        if kind == "F32":
            return self.gguf_float32
        library = llama_cpp()
        path = self.folder / f"{kind}.gguf"
        settings = library.llama_model_quantize_default_params()
        settings.ftype = getattr(library, f"LLAMA_FTYPE_MOSTLY_{kind}")
        settings.nthread = torch.get_num_threads()
        status = library.llama_model_quantize(
            str(self.gguf_float32).encode(), str(path).encode(), ctypes.byref(settings)
        )
        if status != 0:
            raise RequestError(f"llama.cpp could not make a {kind} file of this model (status {status})")
        return path


def transformers_llama(source: WeightSource) -> Any:
    """A `transformers` LlamaForCausalLM in float32 with the source's weights, in evaluation mode.

    Raises `RequestError` where the model is no plain LLaMA.
    """
    config = source.config
    check_llama_like(config)
    library: Any = import_module("transformers")
    attention, mlp = config.layers[0].attention, config.layers[0].dense_mlp
    frequency_J = _frequencies(source)
    base = rotary_base(frequency_J) or _USUAL_BASE
    model: Any
    with torch.device("meta"):
        model = library.LlamaForCausalLM(
            library.LlamaConfig(
                hidden_size=config.hidden,
                vocab_size=config.vocabulary,
                intermediate_size=mlp.width,
                num_hidden_layers=len(config.layers),
                num_attention_heads=attention.heads,
                num_key_value_heads=attention.kv_heads,
                head_dim=attention.head_size,
                rms_norm_eps=config.layers[0].norm.epsilon,
                max_position_embeddings=config.context,
                tie_word_embeddings=config.head is Head.TIED,
                rope_parameters={"rope_type": "default", "rope_theta": base},
                bos_token_id=0,
                eos_token_id=0,
            )
        )
    model = model.to_empty(device="cpu").eval()
    model.load_state_dict(dict(_transformers_state(source)), strict=True)
    model.tie_weights()
    model.model.rotary_emb.inv_freq = frequency_J.to(torch.float32)  # whatever base or scaling they come from
    return model


def write_gguf(source: WeightSource, path: Path) -> None:
    """Write a plain LLaMA as llama.cpp reads it, in float32 and without a tokenizer, one part at a time."""
    config = source.config
    check_llama_like(config)
    attention, frequency_J = config.layers[0].attention, _frequencies(source)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.hidden)
    writer.add_block_count(len(config.layers))
    writer.add_feed_forward_length(config.layers[0].dense_mlp.width)
    writer.add_head_count(attention.heads)
    writer.add_head_count_kv(attention.kv_heads)
    writer.add_key_length(attention.head_size)
    writer.add_value_length(attention.head_size)
    writer.add_rope_dimension_count(attention.head_size)
    writer.add_rope_freq_base(rotary_base(frequency_J) or _USUAL_BASE)
    writer.add_layer_norm_rms_eps(config.layers[0].norm.epsilon)
    writer.add_vocab_size(config.vocabulary)
    writer.add_tokenizer_model("none")
    for name, array in _gguf_tensors(source):
        writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, array in _gguf_tensors(source):
        writer.write_tensor_data(array)
    writer.close()


def _frequencies(source: WeightSource) -> Tensor:
    frequency_J = source.layer(0).attention.rotary_frequency_J
    assert frequency_J is not None, "LLaMA-like models rotate"
    return frequency_J


def _ends(source: WeightSource) -> tuple[Tensor, Tensor, Tensor | None]:
    """Token table, final norm's gain, and the head where it is not the table."""
    head = source.head()
    assert head.norm is not None, "LLaMA-like models have a final norm"
    projection_VM = None if head.projection is None else head.projection.weight_NI
    return source.embedding().token_VW, head.norm.gain_M, projection_VM


def _layers(source: WeightSource) -> Iterator[tuple[int, str, Tensor]]:
    for index in range(len(source.config.layers)):
        for name, tensor in tensors(source.layer(index)):
            if name != _FREQUENCIES:
                yield index, name, tensor


def _transformers_state(source: WeightSource) -> Iterator[tuple[str, Tensor]]:
    token_VM, gain_M, head_VM = _ends(source)
    yield "model.embed_tokens.weight", token_VM
    yield "model.norm.weight", gain_M
    yield "lm_head.weight", token_VM if head_VM is None else head_VM
    for index, name, tensor in _layers(source):
        yield f"model.layers.{index}.{_TRANSFORMERS[name]}", tensor


def _gguf_tensors(source: WeightSource) -> Iterator[tuple[str, "np.ndarray[Any, np.dtype[np.float32]]"]]:
    token_VM, gain_M, head_VM = _ends(source)
    yield "token_embd.weight", _array(token_VM)
    yield "output_norm.weight", _array(gain_M)
    if head_VM is not None:
        yield "output.weight", _array(head_VM)
    frequency_J = _frequencies(source)
    if rotary_base(frequency_J) is None:  # llama.cpp divides its own frequencies by these
        yield "rope_freqs.weight", _array(plain_frequencies(_USUAL_BASE, len(frequency_J)) / frequency_J)
    attention = source.config.layers[0].attention
    heads = {"attention.query.weight_NI": attention.heads, "attention.key.weight_NI": attention.kv_heads}
    for index, name, tensor in _layers(source):
        rows = interleaved_from_half_split(tensor, heads[name]) if name in heads else tensor
        yield f"blk.{index}.{_GGUF[name]}", _array(rows)


def interleaved_from_half_split(rows: Tensor, heads: int) -> Tensor:
    """Reorder rows [H * D, ...], head by head, so that those that rotate together are neighbors, as GGUF has them.

    Two heads of four:

        >>> interleaved_from_half_split(torch.tensor([0, 1, 2, 3, 10, 11, 12, 13]), heads=2).tolist()
        [0, 2, 1, 3, 10, 12, 11, 13]
        >>> interleaved_from_half_split(torch.tensor([0, 1, 2, 3, 4, 5]), heads=1).tolist()
        [0, 3, 1, 4, 2, 5]
    """
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])  # [H, 2, D/2, ...]
    return halves.transpose(1, 2).reshape(rows.shape)


def _array(tensor: Tensor) -> "np.ndarray[Any, np.dtype[np.float32]]":
    return tensor.detach().to(torch.float32).contiguous().numpy()
