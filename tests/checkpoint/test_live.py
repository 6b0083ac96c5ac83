"""Live transformers models: what is shared, what is refused, and that they run. (That they are the same as their
folders, in every family, tests/families checks.)"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import twinfer
from twinfer.checkpoint import from_transformers
from twinfer.spec.errors import CheckpointError, ConfigError, RequestError, TwinferError, WeightError

SIZES = {"vocab_size": 30, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2}
LLAMA = {**SIZES, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}


def llama(**changes: Any) -> hf.LlamaForCausalLM:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**LLAMA, **changes})).eval()


def gpt2() -> hf.GPT2LMHeadModel:
    torch.manual_seed(0)
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=30, n_positions=32, n_embd=12, n_layer=2, n_head=2)).eval()


def qwen3() -> hf.Qwen3ForCausalLM:
    torch.manual_seed(0)
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**LLAMA, head_dim=8)).eval()


def with_integers() -> hf.LlamaForCausalLM:
    module = llama()
    for parameter in module.parameters():
        parameter.requires_grad_(False).data = parameter.data.to(torch.int8)
    return module


class Quantized(Tensor):
    """A weight of a quantization library: a float to whoever asks, and what it computes depends on the library."""

    @staticmethod
    def __new__(cls, weight: Tensor) -> "Quantized":
        made: Quantized = Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)
        return made

    def __init__(self, weight: Tensor):
        self.codes = weight.to(torch.int8)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes.float())
        raise NotImplementedError(f"{cls.__name__} has no {func}")


def with_weight(change: Callable[[Tensor], Tensor], *, tied: bool = False) -> hf.LlamaForCausalLM:
    """A module with one weight changed: that of a query projection, or the one that its ends share."""
    module = llama(tie_word_embeddings=tied)
    changed = [module.model.embed_tokens, module.lm_head] if tied else [module.model.layers[0].self_attn.q_proj]
    weight = torch.nn.Parameter(change(changed[0].weight.detach()), requires_grad=False)
    for each in changed:
        each.weight = weight
    return module


class Packed(torch.nn.Linear):
    """Keeps something beside its tensors, as modules of quantization libraries do."""

    def get_extra_state(self) -> Any:
        return ("packed", 8)


def with_packed_parameters() -> hf.LlamaForCausalLM:
    module = llama()
    module.model.layers[0].self_attn.q_proj = Packed(12, 12, bias=False)
    return module


def shares(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def test_storage_is_shared_where_layouts_allow() -> None:
    module = llama()
    source = from_transformers(module)
    layer, theirs = source.layer(1), module.model.layers[1]
    assert shares(layer.attention.query.weight_NI, theirs.self_attn.q_proj.weight)
    assert shares(source.embedding().token_VE, module.model.embed_tokens.weight)
    with torch.no_grad():
        theirs.mlp.up_proj.weight[3, 4] = 7.0
    assert source.layer(1).mlp.up.weight_NI[3, 4] == 7.0
    merged = gpt2()
    projection = merged.transformer.h[0].attn.c_attn.weight
    assert shares(from_transformers(merged).layer(0).attention.value.weight_NI, projection)  # a view of a merged tensor


@pytest.mark.parametrize("module", [llama(), gpt2(), qwen3()], ids=["llama", "gpt2", "qwen3"])
def test_a_live_model_says_what_transformers_says(module: Any) -> None:
    prompt = [3, 1, 4, 1, 5]
    with torch.no_grad():
        theirs = module.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None)
    model = twinfer.load(from_transformers(module), path="reference")
    assert list(model.generate([prompt], max_new_tokens=6).outputs()[0].ids) == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("module", "error", "message"),
    [
        (torch.nn.Linear(2, 2), RequestError, "module is a Linear; it must be a transformers model"),
        ("smollm2", RequestError, "module is a str; it must be a transformers model"),
        (
            hf.LlamaForSequenceClassification(hf.LlamaConfig(**LLAMA, pad_token_id=0)),
            CheckpointError,
            "architectures is ['LlamaForSequenceClassification'], but model_type is 'llama'",
        ),
        (hf.MambaForCausalLM(hf.MambaConfig(**SIZES)), CheckpointError, "model_type is 'mamba'"),
        (llama().to("meta"), WeightError, "this LlamaForCausalLM: model.embed_tokens.weight is on the meta device"),
        (llama(tie_word_embeddings=True).to("meta"), WeightError, "lm_head.weight is on the meta device"),
        (with_integers(), WeightError, "kept as torch.int8; only torch.float64, torch.float32, torch.float16"),
        (with_weight(lambda weight: weight.to(torch.float8_e4m3fn)), WeightError, "kept as torch.float8_e4m3fn; only"),
        (with_weight(lambda weight: weight.to_sparse()), WeightError, "kept as torch.sparse_coo; only strided"),
        (with_weight(Quantized), WeightError, "kept as a Quantized; only plain tensors can be read"),
        (with_weight(Quantized, tied=True), WeightError, "kept as a Quantized; only plain tensors can be read"),
        (
            with_packed_parameters(),
            WeightError,
            "holds model.layers.0.self_attn.q_proj._extra_state, which a llama model",
        ),
    ],
    ids=[
        *("no config", "a name", "a classifier", "unknown", "meta", "meta, tied", "integers", "float8", "sparse"),
        *("a subclass", "a subclass, tied", "packed"),
    ],
)
def test_what_is_not_understood_is_refused(module: Any, error: type[TwinferError], message: str) -> None:
    with pytest.raises(error) as raised:
        from_transformers(module)
    assert message in str(raised.value)


def test_a_field_that_is_not_understood_is_named() -> None:
    module = llama()
    module.config.attention_twist = 0.5
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM\.config: attention_twist is 0\.5; this version does not"):
        from_transformers(module)


def test_a_shorter_context() -> None:
    assert twinfer.from_transformers(llama(), context=9).config.context == 9
    with pytest.raises(ConfigError, match="the context asked for is 33 tokens"):
        twinfer.from_transformers(llama(), context=33)
