"""Hugging Face folders that transformers itself saved, read back: every weight bitwise, every config field."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from twinfer.checkpoint import open_model
from twinfer.checkpoint.families import FAMILIES
from twinfer.checkpoint.family import IGNORED
from twinfer.spec.config import Activation, Head, NormKind
from twinfer.spec.errors import WeightError
from twinfer.spec.weights import WeightSource, tensors, validate_embedding, validate_head, validate_layer

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
few = settings(max_examples=15)


def randomized(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Every parameter drawn, so that no two are alike: fresh norms are all ones, fresh biases all zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@st.composite
def sizes(draw: st.DrawFn) -> dict[str, int]:
    kv_heads, group, head_size = draw(st.integers(1, 3)), draw(st.integers(1, 3)), 2 * draw(st.integers(1, 4))
    return {
        "kv_heads": kv_heads,
        "heads": kv_heads * group,
        "head_size": head_size,
        "hidden": kv_heads * group * draw(st.integers(1, 9)),
        "width": draw(st.integers(1, 20)),
        "vocabulary": draw(st.integers(3, 40)),
        "layers": draw(st.integers(1, 3)),
    }


@st.composite
def llamas(draw: st.DrawFn) -> PreTrainedModel:
    size = draw(sizes())
    config = {
        "vocab_size": size["vocabulary"],
        "hidden_size": size["hidden"],
        "intermediate_size": size["width"],
        "num_hidden_layers": size["layers"],
        "num_attention_heads": size["heads"],
        "num_key_value_heads": size["kv_heads"],
        "head_dim": size["head_size"],
        "hidden_act": draw(st.sampled_from(["silu", "gelu", "gelu_pytorch_tanh", "relu"])),
        "max_position_embeddings": draw(st.integers(16, 64)),
        "rms_norm_eps": draw(st.sampled_from([1e-5, 1e-6, 0.25])),
        "tie_word_embeddings": draw(st.booleans()),
        "bos_token_id": 0,
        "eos_token_id": draw(st.sampled_from([1, [1, 2]])),
    }
    if draw(st.booleans()):
        window = draw(st.one_of(st.none(), st.integers(1, 6)))
        model = MistralForCausalLM(MistralConfig(**config, sliding_window=window))
    else:
        scaling = draw(
            st.sampled_from(
                [
                    None,
                    {"rope_type": "linear", "factor": 4.0},
                    {
                        "rope_type": "llama3",
                        "factor": 8.0,
                        "low_freq_factor": 1.0,
                        "high_freq_factor": 4.0,
                        "original_max_position_embeddings": 8,
                    },
                ]
            )
        )
        theta = {"rope_theta": draw(st.sampled_from([50.0, 10000.0])), **(scaling or {"rope_type": "default"})}
        biases = {"attention_bias": draw(st.booleans()), "mlp_bias": draw(st.booleans())}
        model = LlamaForCausalLM(LlamaConfig(**config, **biases, rope_parameters=theta))
    return randomized(model, draw(st.integers(0, 2**31)))


@st.composite
def gpt2s(draw: st.DrawFn) -> PreTrainedModel:
    heads = draw(st.integers(1, 4))
    config = GPT2Config(
        vocab_size=draw(st.integers(3, 40)),
        n_positions=draw(st.integers(16, 64)),
        n_embd=heads * draw(st.integers(1, 9)),
        n_layer=draw(st.integers(1, 3)),
        n_head=heads,
        n_inner=draw(st.one_of(st.none(), st.integers(1, 20))),
        activation_function=draw(st.sampled_from(["gelu_new", "gelu", "relu"])),
        layer_norm_epsilon=draw(st.sampled_from([1e-5, 0.25])),
        scale_attn_weights=draw(st.booleans()),
        scale_attn_by_inverse_layer_idx=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
        bos_token_id=0,
        eos_token_id=1,
    )
    return randomized(GPT2LMHeadModel(config), draw(st.integers(0, 2**31)))


def llama_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The module's parameters under our names: the mapping that the LLaMA table promises, written out again."""
    ours = {
        "embedding.token_VW": model.model.embed_tokens.weight,
        "head.norm.gain_M": model.model.norm.weight,
    }
    for index, layer in enumerate(model.model.layers):
        linears = {
            "attention.query": layer.self_attn.q_proj,
            "attention.key": layer.self_attn.k_proj,
            "attention.value": layer.self_attn.v_proj,
            "attention.output": layer.self_attn.o_proj,
            "mlp.gate": layer.mlp.gate_proj,
            "mlp.up": layer.mlp.up_proj,
            "mlp.down": layer.mlp.down_proj,
        }
        ours[f"{index}.attention_norm.gain_M"] = layer.input_layernorm.weight
        ours[f"{index}.mlp_norm.gain_M"] = layer.post_attention_layernorm.weight
        for name, linear in linears.items():
            ours[f"{index}.{name}.weight_NI"] = linear.weight
            if linear.bias is not None:
                ours[f"{index}.{name}.bias_N"] = linear.bias
    return ours | head_weights(model)


def gpt2_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The same for GPT-2, whose linears are kept [inputs, outputs] and whose query, key and value lie side by side."""
    ours = {
        "embedding.token_VW": model.transformer.wte.weight,
        "embedding.position_PM": model.transformer.wpe.weight,
        "head.norm.gain_M": model.transformer.ln_f.weight,
        "head.norm.bias_M": model.transformer.ln_f.bias,
    }
    for index, layer in enumerate(model.transformer.h):
        ours[f"{index}.attention_norm.gain_M"], ours[f"{index}.attention_norm.bias_M"] = layer.ln_1.parameters()
        ours[f"{index}.mlp_norm.gain_M"], ours[f"{index}.mlp_norm.bias_M"] = layer.ln_2.parameters()
        hidden = model.config.n_embd
        for third, name in enumerate(("query", "key", "value")):
            columns = slice(third * hidden, (third + 1) * hidden)
            ours[f"{index}.attention.{name}.weight_NI"] = layer.attn.c_attn.weight[:, columns].T
            ours[f"{index}.attention.{name}.bias_N"] = layer.attn.c_attn.bias[columns]
        for name, conv in (
            ("attention.output", layer.attn.c_proj),
            ("mlp.up", layer.mlp.c_fc),
            ("mlp.down", layer.mlp.c_proj),
        ):
            ours[f"{index}.{name}.weight_NI"], ours[f"{index}.{name}.bias_N"] = conv.weight.T, conv.bias
    return ours | head_weights(model)


def head_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    return {} if model.config.tie_word_embeddings else {"head.projection.weight_NI": model.lm_head.weight}


def all_weights(source: WeightSource) -> dict[str, Tensor]:
    """Every tensor of a source but the rotary frequencies, which no file holds."""
    found = dict(tensors(source.embedding(), "embedding.")) | dict(tensors(source.head(), "head."))
    for index in range(len(source.config.layers)):
        found |= dict(tensors(source.layer(index), f"{index}."))
    return {name: tensor for name, tensor in found.items() if not name.endswith("rotary_frequency_J")}


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
        one, other = found[name].contiguous(), tensor.detach().contiguous()
        assert torch.equal(one.view(words), other.view(words)), name


def assert_valid(source: WeightSource) -> None:
    validate_embedding(source.embedding(), source.config)
    for index in range(len(source.config.layers)):
        validate_layer(source.layer(index), source.config, index)
    validate_head(source.head(), source.config)


@few
@given(model=llamas(), dtype=st.sampled_from(DTYPES), sharded=st.booleans())
def test_llama_and_mistral_weights_are_the_modules(model: PreTrainedModel, dtype: torch.dtype, sharded: bool) -> None:
    """Bitwise, in the file's own dtype, from one file or from shards of at most 2 kB."""
    with TemporaryDirectory() as folder:
        model.to(dtype).save_pretrained(folder, max_shard_size="2KB" if sharded else "1GB")
        checkpoint = open_model(folder)
        assert_valid(checkpoint.source)
        assert_same_bits(all_weights(checkpoint.source), llama_weights(model))
        frequencies = [checkpoint.source.layer(i).attention.rotary_frequency_J for i in range(len(model.model.layers))]
        assert all(frequency_J is frequencies[0] for frequency_J in frequencies)
        end = model.config.eos_token_id
        assert checkpoint.end_tokens == tuple(end if isinstance(end, list) else [end])
        assert checkpoint.tokenizer is None


@few
@given(model=gpt2s(), dtype=st.sampled_from(DTYPES), sharded=st.booleans())
def test_gpt2_weights_are_the_modules(model: PreTrainedModel, dtype: torch.dtype, sharded: bool) -> None:
    with TemporaryDirectory() as folder:
        model.to(dtype).save_pretrained(folder, max_shard_size="2KB" if sharded else "1GB")
        checkpoint = open_model(folder)
        assert_valid(checkpoint.source)
        assert_same_bits(all_weights(checkpoint.source), gpt2_weights(model))


def test_a_merged_projection_is_handed_out_as_views() -> None:
    """GPT-2's query, key and value are three views of one tensor of the file, not copies."""
    with TemporaryDirectory() as folder:
        randomized(GPT2LMHeadModel(gpt2_config()), 1).save_pretrained(folder)
        attention = open_model(folder).source.layer(0).attention
        storages = {part.weight_NI.untyped_storage().data_ptr() for part in (attention.query, attention.key)}
        assert len(storages) == 1


@few
@given(model=llamas())
def test_llama_configs_say_what_the_modules_do(model: PreTrainedModel) -> None:
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = open_model(folder).config
    theirs = model.config
    layer = config.layers[0]
    assert (config.hidden, config.vocabulary, config.context) == (
        theirs.hidden_size,
        theirs.vocab_size,
        theirs.max_position_embeddings,
    )
    assert (layer.attention.heads, layer.attention.kv_heads, layer.attention.head_size) == (
        theirs.num_attention_heads,
        theirs.num_key_value_heads,
        theirs.head_dim,
    )
    assert layer.attention.scale == model.model.layers[0].self_attn.scaling
    assert layer.attention.window == getattr(theirs, "sliding_window", None)
    assert layer.norm.epsilon == config.final_norm.epsilon == model.model.norm.variance_epsilon
    assert (layer.norm.kind, layer.mlp.gated, layer.mlp.width) == (NormKind.RMS, True, theirs.intermediate_size)
    assert config.layers == (layer,) * theirs.num_hidden_layers
    assert (config.head is Head.TIED) == theirs.tie_word_embeddings
    assert config.family == theirs.model_type


@few
@given(model=llamas())
def test_the_older_config_style_reads_the_same(model: PreTrainedModel) -> None:
    """transformers 4 wrote rope_theta and rope_scaling, and `type` before that."""
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        newer = open_model(folder)
        rewrite(Path(folder), older_style)
        older = open_model(folder)
        assert older.config == newer.config
        layers = [checkpoint.source.layer(0).attention.rotary_frequency_J for checkpoint in (older, newer)]
        assert torch.equal(layers[0], layers[1])


def test_names_without_the_prefix_are_the_same_weights() -> None:
    """The base classes save without `model.` or `transformer.`, and without a head: so does the first GPT-2."""
    for model, base in (
        (LlamaForCausalLM(llama_config(tie_word_embeddings=True)), LlamaModel),
        (GPT2LMHeadModel(gpt2_config()), GPT2Model),
    ):
        randomized(model, 7)
        with TemporaryDirectory() as folder, TemporaryDirectory() as bare:
            model.save_pretrained(folder)
            base.from_pretrained(folder).save_pretrained(bare)
            names = load_file(Path(bare) / "model.safetensors")
            assert not any(name.startswith(("model.", "transformer.")) for name in names)
            assert_same_bits(all_weights(open_model(bare).source), all_weights(open_model(folder).source))


def test_gpt2s_mask_buffers_are_ignored() -> None:
    model = randomized(GPT2LMHeadModel(gpt2_config()), 3)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        add_tensors(
            Path(folder),
            {
                "transformer.h.0.attn.bias": torch.ones(1, 1, 16, 16, dtype=torch.bool),
                "transformer.h.1.attn.masked_bias": torch.tensor(-1e4),
            },
        )
        assert_same_bits(all_weights(open_model(folder).source), gpt2_weights(model))


def test_a_tied_head_may_be_repeated_but_not_differ() -> None:
    model = randomized(GPT2LMHeadModel(gpt2_config()), 3)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        table = model.transformer.wte.weight.detach()
        add_tensors(Path(folder), {"lm_head.weight": table.clone()})
        assert open_model(folder).source.head().projection is None
        add_tensors(Path(folder), {"lm_head.weight": table.flip(0).contiguous()})
        with pytest.raises(WeightError, match=r"lm_head\.weight differs from transformer\.wte\.weight"):
            open_model(folder)


def test_a_hub_caches_links_are_followed() -> None:
    """There, each file of snapshots/<revision> is a link into the blobs beside."""
    with TemporaryDirectory() as root:
        blobs, snapshot = Path(root) / "blobs", Path(root) / "snapshots" / "abc"
        model = randomized(LlamaForCausalLM(llama_config()), 5)
        model.save_pretrained(blobs, max_shard_size="1KB")
        snapshot.mkdir(parents=True)
        for file in blobs.iterdir():
            (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / file.name)
        assert_same_bits(all_weights(open_model(str(snapshot)).source), llama_weights(model))


def test_activations_are_not_confused() -> None:
    """GPT-2's gelu_new is the tanh approximation; gelu is not."""
    found = {}
    for name in ("gelu_new", "gelu"):
        with TemporaryDirectory() as folder:
            GPT2LMHeadModel(gpt2_config(activation_function=name)).save_pretrained(folder)
            found[name] = open_model(folder).config.layers[0].mlp.activation
    assert found == {"gelu_new": Activation.GELU_TANH, "gelu": Activation.GELU}


def test_no_field_is_both_ignored_and_read() -> None:
    """Nor listed twice: a family's own list adds to the common one."""
    common = " ".join(IGNORED.values()).split()
    for family in FAMILIES:
        names = [*common, *family.ignored]
        assert len(names) == len(set(names))
    assert not {"hidden_act", "rope_theta", "sliding_window", "layer_norm_epsilon", "rms_norm_eps"} & set(common)


def llama_config(**fields: Any) -> LlamaConfig:
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 2}
    return LlamaConfig(**sizes | {"num_attention_heads": 2, "num_key_value_heads": 1, **fields})


def gpt2_config(**fields: Any) -> GPT2Config:
    return GPT2Config(**{"vocab_size": 11, "n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2, **fields})


def rewrite(folder: Path, change: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def older_style(config: dict[str, Any]) -> dict[str, Any]:
    parameters = config.pop("rope_parameters")
    config["rope_theta"] = parameters.pop("rope_theta")
    kind = parameters.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **parameters}
    config["torch_dtype"] = config.pop("dtype")
    return config


def add_tensors(folder: Path, more: dict[str, Tensor]) -> None:
    path = folder / "model.safetensors"
    save_file(load_file(path) | more, path, metadata={"format": "pt"})
