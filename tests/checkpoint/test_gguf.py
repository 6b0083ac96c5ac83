"""GGUF files, written with the format's own library, against the model that they were made from."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from twinfer.checkpoint import open_model, rotary
from twinfer.checkpoint.permutation import half_split_from_interleaved
from twinfer.spec.config import Head, RotaryLayout
from twinfer.spec.errors import CheckpointError, ConfigError, RequestError, TwinferError, WeightError
from twinfer.spec.weights import tensors, validate_embedding, validate_head, validate_layer

KINDS = gguf.GGMLQuantizationType
few = settings(max_examples=15)

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OURS = {
    "attn_q": "attention.query",
    "attn_k": "attention.key",
    "attn_v": "attention.value",
    "attn_output": "attention.output",
    "ffn_gate": "mlp.gate",
    "ffn_up": "mlp.up",
    "ffn_down": "mlp.down",
}


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """What converters do to query and key rows, one row at a time: row j of a head goes to 2j, or 2j - D + 1."""
    size = len(rows) // heads
    order = [0] * len(rows)
    for head in range(heads):
        for row in range(size):
            order[head * size + (2 * row if row < size // 2 else 2 * row - size + 1)] = head * size + row
    return rows[order]


def as_gguf(model: PreTrainedModel, kind: gguf.GGMLQuantizationType) -> dict[str, tuple[np.ndarray, Any]]:
    """The model's tensors under their GGUF names, as (float32 values in the file's row order, kind)."""
    config, found = model.config, {}
    found["token_embd.weight"] = (model.model.embed_tokens.weight, kind)
    found["output_norm.weight"] = (model.model.norm.weight, KINDS.F32)
    if not config.tie_word_embeddings:
        found["output.weight"] = (model.lm_head.weight, kind)
    for index, layer in enumerate(model.model.layers):
        found[f"blk.{index}.attn_norm.weight"] = (layer.input_layernorm.weight, KINDS.F32)
        found[f"blk.{index}.ffn_norm.weight"] = (layer.post_attention_layernorm.weight, KINDS.F32)
        for theirs, name in NAMES.items():
            linear = layer.get_submodule(theirs)
            found[f"blk.{index}.{name}.weight"] = (linear.weight, kind)
            if linear.bias is not None:
                found[f"blk.{index}.{name}.bias"] = (linear.bias, KINDS.F32)
    arrays = {}
    for name, (tensor, how) in found.items():
        values = tensor.detach().float().numpy()
        if ".attn_q." in name:
            values = interleaved(values, config.num_attention_heads)
        if ".attn_k." in name:
            values = interleaved(values, config.num_key_value_heads)
        arrays[name] = (values, how)
    return arrays


def write(
    path: Path,
    model: PreTrainedModel,
    kind: gguf.GGMLQuantizationType = KINDS.F32,
    *,
    change: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    architecture: str = "llama",
    drop: str | None = None,
    add: dict[str, np.ndarray] | None = None,
) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    change(writer)
    for name, (values, how) in as_gguf(model, kind).items():
        if name != drop:
            writer.add_tensor(name, quantize(values, how), raw_dtype=how)
    for name, values in (add or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tiny(seed: int = 0, **fields: Any) -> PreTrainedModel:
    sizes = {"vocab_size": 13, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32, "rms_norm_eps": 1e-5}
    model = LlamaForCausalLM(LlamaConfig(**sizes | fields))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@st.composite
def models(draw: st.DrawFn) -> PreTrainedModel:
    """Widths are multiples of 32, the block of Q8_0 and Q4_1."""
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    return tiny(
        draw(st.integers(0, 2**31)),
        vocab_size=draw(st.integers(3, 20)),
        num_hidden_layers=draw(st.integers(1, 2)),
        hidden_size=32 * kv_heads * group,
        head_dim=draw(st.sampled_from([32, 64])),
        num_attention_heads=kv_heads * group,
        num_key_value_heads=kv_heads,
        intermediate_size=32 * draw(st.integers(1, 2)),
        attention_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
        rope_parameters={"rope_type": "default", "rope_theta": draw(st.sampled_from([100.0, 10000.0]))},
    )


def stored(tensor: Tensor, kind: gguf.GGMLQuantizationType) -> Tensor:
    """What is left of float32 values after being kept as `kind`."""
    values = tensor.detach().float().numpy()
    return torch.from_numpy(np.array(dequantize(quantize(values, kind), kind)))


@given(seed=st.integers(0, 2**31), heads=st.integers(1, 4), half=st.integers(1, 5), columns=st.integers(1, 3))
def test_the_permutation_undoes_the_converters(seed: int, heads: int, half: int, columns: int) -> None:
    """Of weights and of biases."""
    rows = np.random.default_rng(seed).standard_normal((heads * 2 * half, columns))
    for values in (rows, rows[:, 0]):
        undone = half_split_from_interleaved(torch.from_numpy(interleaved(values, heads)), heads)
        assert torch.equal(undone, torch.from_numpy(values))


@given(seed=st.integers(0, 2**31), kv_heads=st.integers(1, 3), group=st.integers(1, 3), half=st.integers(1, 5))
def test_transformers_undoes_the_permutation_alike(seed: int, kv_heads: int, group: int, half: int) -> None:
    """Its own GGUF reader turns a file's query and key rows into the same as ours."""
    heads, theirs = kv_heads * group, LlamaTensorProcessor()
    rows = np.random.default_rng(seed).standard_normal((heads * 2 * half, 3))
    expected = theirs._reverse_permute_weights(rows, heads, heads)
    assert torch.equal(half_split_from_interleaved(torch.from_numpy(rows), heads), torch.from_numpy(expected))
    rows = rows[: kv_heads * 2 * half]
    expected = theirs._reverse_permute_weights(rows, heads, kv_heads)
    assert torch.equal(half_split_from_interleaved(torch.from_numpy(rows), kv_heads), torch.from_numpy(expected))


@few
@given(model=models(), kind=st.sampled_from([KINDS.F32, KINDS.F16, KINDS.BF16, KINDS.Q8_0, KINDS.Q4_1]))
def test_weights_are_the_models_as_stored(model: PreTrainedModel, kind: gguf.GGMLQuantizationType) -> None:
    """Bitwise, rows back in their order: quantizing goes row by row, so it does not care for their order."""
    with TemporaryDirectory() as folder:
        write(Path(folder) / "m.gguf", model, kind)
        source = open_model(f"{folder}/m.gguf").source
        embedding, head = source.embedding(), source.head()
        validate_embedding(embedding, source.config)
        validate_head(head, source.config)
        assert torch.equal(embedding.token_VW, stored(model.model.embed_tokens.weight, kind))
        assert torch.equal(head.norm.gain_M, model.model.norm.weight)
        if not model.config.tie_word_embeddings:
            assert head.projection is not None
            assert torch.equal(head.projection.weight_NI, stored(model.lm_head.weight, kind))
        assert (source.config.head is Head.TIED) == model.config.tie_word_embeddings
        for index, layer in enumerate(model.model.layers):
            ours = source.layer(index)
            validate_layer(ours, source.config, index)
            found = dict(tensors(ours))
            assert torch.equal(found["attention_norm.gain_M"], layer.input_layernorm.weight)
            assert torch.equal(found["mlp_norm.gain_M"], layer.post_attention_layernorm.weight)
            for theirs, name in NAMES.items():
                linear = layer.get_submodule(theirs)
                assert torch.equal(found[f"{OURS[name]}.weight_NI"], stored(linear.weight, kind)), name
                if linear.bias is not None:
                    assert torch.equal(found[f"{OURS[name]}.bias_N"], linear.bias), name


def test_divisors_are_llama3_scaling() -> None:
    """A file that carries the frequency divisors of llama3 scaling means the frequencies of that scaling.

    The divisors are float32, so one rounding (half an ulp) apart.
    """
    model = tiny()
    plain_J = rotary.frequencies(10000.0, 16)
    scaled_J = rotary.scaled_by_band(plain_J, factor=8.0, low=1.0, high=4.0, original_context=64)
    with TemporaryDirectory() as folder:
        write(Path(folder) / "m.gguf", model, add={"rope_freqs.weight": (plain_J / scaled_J).float().numpy()})
        found_J = open_model(f"{folder}/m.gguf").source.layer(1).attention.rotary_frequency_J
    assert found_J is not None
    assert not torch.equal(scaled_J, plain_J)
    assert bool(((found_J / scaled_J - 1).abs() <= torch.finfo(torch.float32).eps / 2 * (1 + 2**-20)).all())


def test_linear_scaling_and_rotary_config() -> None:
    def scale(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    with TemporaryDirectory() as folder:
        write(Path(folder) / "m.gguf", tiny(), change=scale)
        source = open_model(f"{folder}/m.gguf").source
        found_J = source.layer(0).attention.rotary_frequency_J
        assert found_J is not None
        assert torch.equal(found_J, rotary.frequencies(10000.0, 16) / 4)
        rotating = source.config.layers[0].attention.rotary
        assert rotating is not None
        assert (rotating.layout, rotating.size) == (RotaryLayout.HALF_SPLIT, 16)


def test_reading_leaves_the_file_alone() -> None:
    """Tensors are writable in memory, and the file keeps its bytes even if someone does write to them."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "m.gguf"
        write(path, tiny())
        before = path.read_bytes()
        open_model(str(path)).source.embedding().token_VW.zero_()
        assert path.read_bytes() == before


ARRAY = gguf.gguf_writer.GGUFValue(["llama"], gguf.GGUFValueType.ARRAY)


def yarn(
    base: float = 10000.0, fast: float = 32.0, slow: float = 1.0, factor: float = 4.0
) -> Callable[[gguf.GGUFWriter], None]:
    """Numbers as 64-bit floats, which hold what 32-bit ones do not."""
    numbers = {"freq_base": base, "scaling.yarn_beta_fast": fast, "scaling.yarn_beta_slow": slow}

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        for name, number in {**numbers, "scaling.factor": factor}.items():
            writer.kv_data[0].pop(f"llama.rope.{name}", None)
            writer.add_float64(f"llama.rope.{name}", number)

    return add


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (
            {"architecture": "gptj"},
            CheckpointError,
            "of architecture 'gptj'; the GGUF architectures known here are: llama, internlm2, smollm3",
        ),
        ({"drop": "blk.1.attn_k.weight"}, WeightError, "lacks blk.1.attn_k.weight"),
        ({"add": {"blk.0.attn_q_norm.weight": np.ones(16, np.float32)}}, WeightError, "holds blk.0.attn_q_norm.weight"),
        ({"add": {"rope_freqs.weight": np.ones(3, np.float32)}}, WeightError, "has shape [3]; it must be [8]"),
        ({"add": {"rope_freqs.weight": np.zeros(8, np.float32)}}, ConfigError, "holds 0.0; all must be above 0"),
        (
            {"add": {"rope_freqs.weight": np.full(8, np.inf, np.float32)}},
            ConfigError,
            "holds inf; all must be",
        ),
        ({"add": {"rope_freqs.weight": np.ones(8, np.int32)}}, WeightError, "rope_freqs.weight is kept as I32"),
        ({"change": yarn(base=1.0)}, ConfigError, "llama.rope.freq_base is 1.0; it must be above 1, with YaRN"),
        ({"change": yarn(fast=np.inf)}, ConfigError, "yarn_beta_fast is Infinity; it must be a finite number above 0"),
        ({"change": yarn(slow=1e-320)}, ConfigError, "yarn_beta_slow is 1e-320; it must be a finite number above 0"),
        (
            {"change": yarn(factor=1e308)},
            ConfigError,
            "scaling.factor is 1e+308; it must be a finite number above",
        ),
        (
            {"change": lambda w: w.kv_data[0].__setitem__("general.architecture", ARRAY)},
            ConfigError,
            'general.architecture is ["llama"]; it must be a string',
        ),
        (
            {"change": lambda w: w.add_array("general.type", ["model"])},
            ConfigError,
            'general.type is ["model"]; it must be a string',
        ),
        ({"change": lambda w: w.add_string("split.count", "3")}, ConfigError, 'split.count is "3"; it must be a whole'),
        ({"change": lambda w: w.add_expert_count(8)}, ConfigError, "llama.expert_used_count is missing"),
        (
            {"architecture": "deepseek2", "change": lambda w: w.add_kv_lora_rank(512)},
            CheckpointError,
            "deepseek2.attention.kv_lora_rank is 512: its attention is multi-head latent attention (MLA)",
        ),
        ({"change": lambda w: w.add_logit_scale(2.0)}, ConfigError, "llama.logit_scale is 2.0; this version does not"),
        (
            {"change": lambda w: w.add_string("llama.rope.scaling.type", "ntk")},
            ConfigError,
            'llama.rope.scaling.type is "ntk"; it must be one of none, linear, yarn, longrope',
        ),
        ({"change": lambda w: w.add_type("adapter")}, CheckpointError, "holds a GGUF adapter; it must hold a model"),
        ({"change": lambda w: w.add_uint16("split.count", 3)}, CheckpointError, "one of 3 pieces; join them with"),
    ],
)
def test_files_of_other_kinds_are_refused(
    tmp_path: Path, arguments: dict[str, Any], kind: type[TwinferError], message: str
) -> None:
    write(tmp_path / "m.gguf", tiny(), **arguments)
    with pytest.raises(kind) as caught:
        open_model(str(tmp_path / "m.gguf"))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_another_kind_leaves_a_model_of_token_ids(tmp_path: Path) -> None:
    """And whoever has text is told which kind it is."""
    write(tmp_path / "m.gguf", tiny(), change=lambda writer: writer.add_tokenizer_model("llama"))
    checkpoint = open_model(str(tmp_path / "m.gguf"))
    assert checkpoint.tokenizer is None
    assert checkpoint.source.layer(1).mlp.up.weight_NI.shape == (32, 64)
    with pytest.raises(
        RequestError, match=r"m has no tokenizer \(.*tokenizer\.ggml\.model is 'llama'; the kinds known"
    ):
        checkpoint.needed_tokenizer()


def test_mis_shaped_tensors_are_named(tmp_path: Path) -> None:
    extra = {"blk.0.ffn_up.weight": np.ones((31, 64), np.float32)}
    write(tmp_path / "m.gguf", tiny(), drop="blk.0.ffn_up.weight", add=extra)
    with pytest.raises(
        WeightError, match=r"blk\.0\.ffn_up\.weight has shape \[31, 64\]; by its config it must be \[32"
    ):
        open_model(str(tmp_path / "m.gguf"))


def test_integer_tensors_are_refused_at_once(tmp_path: Path) -> None:
    extra = {"blk.0.ffn_up.weight": np.ones((32, 64), np.int8)}
    write(tmp_path / "m.gguf", tiny(), drop="blk.0.ffn_up.weight", add=extra)
    with pytest.raises(WeightError, match=r"blk\.0\.ffn_up\.weight is kept as I8"):
        open_model(str(tmp_path / "m.gguf"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "whole.gguf"
    write(path, tiny(num_hidden_layers=1))
    return path


@settings(max_examples=60)
@given(data=st.data())
def test_truncated_files_are_refused(whole: Path, data: st.DataObject) -> None:
    """Wherever the file ends. Only padding after the last tensor could go unmissed, and there is none."""
    content = whole.read_bytes()
    end = len(content) - data.draw(st.one_of(st.integers(1, 300), st.integers(1, len(content))), label="cut")
    cut = whole.with_name("cut.gguf")
    cut.write_bytes(content[:end])
    with pytest.raises(CheckpointError, match=r"it should reach byte|of which there are|not a GGUF file") as caught:
        open_model(str(cut))
    assert "\n" not in str(caught.value)


@settings(max_examples=200)
@given(data=st.data())
def test_damaged_headers_never_crash(whole: Path, data: st.DataObject) -> None:
    """With bytes of the header replaced, the file is refused by a `TwinferError` or read as some other valid model."""
    content = bytearray(whole.read_bytes())
    for _ in range(data.draw(st.integers(1, 4), label="bytes")):
        place = data.draw(st.integers(0, 2500), label="place")
        content[place] = data.draw(st.one_of(st.sampled_from([0, 1, 0x7F, 0xFF]), st.integers(0, 255)), label="value")
    damaged = whole.with_name("damaged.gguf")
    damaged.write_bytes(content)
    error, source = None, None
    try:
        source = open_model(str(damaged)).source
    except TwinferError as raised:
        error = str(raised)
    if source is None:
        assert error is not None
        assert error.isprintable()
        return
    validate_embedding(source.embedding(), source.config)
    validate_layer(source.layer(0), source.config, 0)
    validate_head(source.head(), source.config)
