"""Config.json files in which one field says what no model's does: refused in one line, and at no cost."""

import json
import math
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from twinfer.checkpoint import open_model
from twinfer.spec.errors import ConfigError, TwinferError, WeightError

from .test_published_configs import PARAMETERS, published

DEEP = "a list 985 levels deep"
"""Stands for one, which `json` reads but does not write."""

HOSTILE: list[Any] = [
    *(10**400, -(10**400), 2**64, 2**31, 2**31 - 1, 2**28, 0, -1),
    *(1e308, -1e308, 1e39, 1e-39, 1e-320, 1.0, 0.5, math.nan, math.inf),
    *("", "\ud800", "a" * 10_000, "\x1b[2J", True, None),
    *([], {}, [{}], [None], [[]], [1, "a"], {"a": {}}, {"\ud800": 1}, DEEP, [10**400], ["\ud800"], [1e308]),
]

ROPES: list[dict[str, Any]] = [
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1},
    {"type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0, "attention_factor": 1.0, "truncate": True},
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 4.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    {
        "rope_type": "longrope",
        "short_factor": [1.0] * 32,
        "long_factor": [2.0] * 32,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
]


def places(values: object, *before: str | int) -> Iterator[tuple[str | int, ...]]:
    """Every place at which a JSON value stands in another; of a list, the first three."""
    inside: list[tuple[str | int, Any]] = []
    if isinstance(values, dict):
        inside = list(values.items())
    elif isinstance(values, list):
        inside = list(enumerate(values[:3]))
    for key, value in inside:
        yield (*before, key)
        yield from places(value, *before, key)


def changed(values: Any, place: tuple[str | int, ...], value: object) -> Any:
    copy = json.loads(json.dumps(values))
    inner = copy
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return copy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hostile")
    save_file({"weight": torch.zeros(1)}, path / "model.safetensors")
    return path


def refusal(folder: Path, values: object) -> TwinferError:
    content = json.dumps(values).replace(json.dumps(DEEP), "[" * 985 + "]" * 985)
    (folder / "config.json").write_text(content)
    with pytest.raises(TwinferError) as caught:
        open_model(str(folder))
    assert str(caught.value).isprintable()
    return caught.value


@pytest.mark.parametrize("name", PARAMETERS)
def test_no_value_of_any_field_gets_past_the_reading(folder: Path, name: str) -> None:
    """Whatever a field holds, the folder, which lacks the weights, is refused by a `TwinferError` in one line."""
    values = published(name)
    everywhere = list(places(values))
    for index, value in enumerate(HOSTILE):
        for place in everywhere[index % 17 :: 17]:  # each value at a few fields of every model
            refusal(folder, changed(values, place, value))


@settings(max_examples=150)
@given(data=st.data())
def test_nor_any_value_in_a_rotations_fields(folder: Path, data: st.DataObject) -> None:
    """Of LLaMA, whose heads have 64 elements; up to three fields are replaced at once."""
    rope = data.draw(st.sampled_from(ROPES))
    for place in data.draw(st.lists(st.sampled_from([*list(places(rope)), ("rope_theta",)]), max_size=2)):
        rope = changed(rope, place, data.draw(st.sampled_from(HOSTILE)))
        if not all(isinstance(each, list) for each in (rope.get("short_factor", []), rope.get("long_factor", []))):
            break
    style = data.draw(st.sampled_from(["rope_scaling", "rope_parameters"]))
    sizes = {"hidden_size": 256, "intermediate_size": 8, "num_hidden_layers": 2, "vocab_size": 11}
    config = sizes | {"model_type": "llama", "num_attention_heads": 4, "max_position_embeddings": 128, style: rope}
    if data.draw(st.booleans()):
        config["rope_theta"] = data.draw(st.sampled_from(HOSTILE))
    refusal(folder, config)


LLAMA = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "vocab_size": 11,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is 1000"),
        ({"rms_norm_eps": 1e-320}, "rms_norm_eps is 1e-320; it must be a finite number above 0, from 1.18e-38 to 3.4e"),
        ({"rope_theta": 1.0, "rope_scaling": YARN}, "rope_theta is 1.0; with YaRN it must be above 1"),
        ({"rope_scaling": YARN | {"rope_theta": 0.5}}, "rope_theta is 0.5; with YaRN it must be above 1"),
        (
            {"rope_scaling": YARN | {"beta_fast": 1e308}},
            "beta_fast is 1e+308; it must be a finite number above 0, from",
        ),
        ({"rope_scaling": YARN | {"beta_slow": 1e-320}}, "beta_slow is 1e-320; it must be a finite number above 0"),
        (
            {"rope_scaling": ROPES[-1] | {"original_max_position_embeddings": 1}},
            "original_max_position_embeddings is 1; with LongRoPE it must be above 1",
        ),
        ({"hidden_act": "\ud800"}, r'config.json holds "\ud800", half a surrogate pair'),
    ],
)
def test_such_fields_are_named(folder: Path, fields: dict[str, Any], message: str) -> None:
    error = refusal(folder, LLAMA | fields)
    assert message in str(error)
    assert not isinstance(error, WeightError)


def test_no_depth_of_nesting_gets_past_the_reading(folder: Path) -> None:
    """Near the most that `json` reads, a message that writes the value again would fail itself."""
    for depth in range(800, 1000, 5):
        (folder / "config.json").write_text(json.dumps(LLAMA)[:-1] + ', "deep": ' + "[" * depth + "]" * depth + "}")
        with pytest.raises(TwinferError, match="JSON"):
            open_model(str(folder))


class Largest(TorchDispatchMode):
    """Notes the most elements of any tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def cost_of_refusing(path: Path) -> tuple[TwinferError, int, int]:
    """The error, the elements of the largest tensor made, and the most bytes that Python held."""
    tracemalloc.start()
    try:
        with Largest() as largest, pytest.raises(TwinferError) as caught:
            open_model(str(path))
        return caught.value, largest.elements, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


HUGE = 2**28
OVERSIZED: list[tuple[str, dict[str, Any]]] = [
    ("bloom-560m", {"n_head": HUGE, "num_attention_heads": HUGE, "n_embed": HUGE, "hidden_size": HUGE}),
    ("mpt-7b", {"n_heads": HUGE, "d_model": HUGE}),
    ("falcon-rw-1b", {"num_attention_heads": HUGE, "n_head": HUGE, "hidden_size": HUGE}),
    ("opt-125m", {"layer_norm_elementwise_affine": False, "hidden_size": HUGE, "num_attention_heads": 1}),
    (
        "stablelm-2-1_6b",
        {"num_attention_heads": 2**23, "num_key_value_heads": 2**23, "hidden_size": 2**28, "qk_layernorm": True},
    ),
    ("llama-7b", {"max_position_embeddings": 2**30, "max_sequence_length": 2**30}),
    ("gpt2-medium", {"n_positions": HUGE, "n_ctx": HUGE}),
    ("smollm2-135m", {"num_hidden_layers": 10_000}),
    ("gemma-3-1b-it", {"vocab_size": 2**31 - 1, "head_dim": 2**16}),
    ("gpt-neo-125m", {"num_layers": 10_000, "attention_types": [[["global"] * 100, 10_000]] * 100}),
]


@pytest.mark.parametrize(("name", "fields"), OVERSIZED, ids=[name for name, _ in OVERSIZED])
def test_nothing_of_a_configs_sizes_is_made_before_the_file_has_them(
    folder: Path, name: str, fields: dict[str, Any]
) -> None:
    values = {**published(name), **fields}
    (folder / "config.json").write_text(json.dumps(values))
    error, elements, held = cost_of_refusing(folder)
    assert isinstance(error, ConfigError if name == "gpt-neo-125m" else WeightError), error
    assert elements <= 2**16
    assert held < 2**25, f"{held:,} bytes"


@pytest.mark.parametrize("architecture", ["bloom", "mpt"])
def test_nor_of_a_gguf_files(tmp_path: Path, architecture: str) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", architecture)
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(HUGE)
    writer.add_feed_forward_length(64)
    writer.add_head_count(HUGE)
    writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(11)
    if architecture == "mpt":
        writer.add_max_alibi_bias(8.0)
    writer.add_tensor("token_embd.weight", torch.zeros(11, 64).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    error, elements, held = cost_of_refusing(tmp_path / "m.gguf")
    assert isinstance(error, WeightError), error
    assert elements <= 2**16
    assert held < 2**25, f"{held:,} bytes"
