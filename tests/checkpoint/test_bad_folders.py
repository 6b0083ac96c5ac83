"""Folders that cannot be used: each is refused in one line that names what is wrong and says what to do."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from twinfer.checkpoint import open_model
from twinfer.spec.errors import CheckpointError, ConfigError, TwinferError, WeightError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good folder, saved once; tests copy it."""
    folder = tmp_path_factory.mktemp("saved")
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return copied(saved, tmp_path / "model")


def copied(saved: Path, to: Path) -> Path:
    to.mkdir(exist_ok=True)
    for file in saved.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def refusal(folder: Path, kind: type[TwinferError] = CheckpointError) -> str:
    with pytest.raises(kind) as caught:
        open_model(str(folder))
    assert type(caught.value) is kind
    assert str(caught.value).isprintable()
    return str(caught.value)


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def shard(folder: Path) -> dict[str, str]:
    """Split the weights over two files under an index; returns its map."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    shards = {"one.safetensors": names[:6], "two.safetensors": names[6:]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    weight_map = {name: file for file, held in shards.items() for name in held}
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_unknown_names_list_what_is_known(tmp_path: Path) -> None:
    message = refusal(tmp_path / "nowhere")
    assert "built-in name (smollm2, minilm, tiny-moe)" in message
    assert ".gguf" in message
    assert "config.json" in message


def test_an_empty_folder_and_a_file_of_another_kind(tmp_path: Path) -> None:
    assert "holds no config.json" in refusal(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    assert "is not a GGUF file: it begins with b'hell'" in refusal(tmp_path / "notes.txt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "config.json is not valid JSON"),
        (b'{"model_type": "llama"', "config.json is not valid JSON"),
        (b"\xff\xfe\x00", "config.json is not valid JSON"),
        (b"[" * 100_000, "config.json is not valid JSON"),
        (b"[1, 2]", "config.json holds a JSON list; it must hold an object"),
        (b"{}", "model_type is missing; the families known here are: llama, mistral, gpt2"),
        (b'{"model_type": "mamba"}', "model_type is 'mamba' (architectures []); the families known here are: llama"),
        (
            b'{"model_type": "deepseek_v3", "kv_lora_rank": 512, "q_lora_rank": 1536}',
            "kv_lora_rank is 512 and q_lora_rank is 1536: its attention is multi-head latent attention (MLA)",
        ),
        (
            b'{"model_type": "deepseek_v2", "kv_lora_rank": 512, "q_lora_rank": null}',
            "config.json: kv_lora_rank is 512: its attention is multi-head latent attention (MLA)",
        ),
        (b'{"architectures": ["MambaModel"]}', "(architectures ['MambaModel']); the families known here are: llama"),
        (
            b'{"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}',
            "but model_type is 'llama', of which only LlamaForCausalLM and LlamaModel are known here",
        ),
        (
            b'{"model_type": "llama", "architectures": ["GPT2LMHeadModel"]}',
            "architectures is ['GPT2LMHeadModel'], but model_type is 'llama'",
        ),
    ],
)
def test_malformed_and_unknown_configs(folder: Path, content: bytes, message: str) -> None:
    (folder / "config.json").write_bytes(content)
    assert message in refusal(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": ...}, "hidden_size is missing; it must be a whole number from 1"),
        ({"hidden_size": "8"}, 'hidden_size is "8"; it must be a whole number'),
        ({"hidden_size": True}, "hidden_size is true; it must be a whole number"),
        ({"vocab_size": 0}, "vocab_size is 0; it must be a whole number from 1"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; it must be a whole number from 1 to 10000"),
        ({"head_dim": 10**9}, "the rotary size is 1000000000"),
        ({"head_dim": None, "hidden_size": 9}, "9 hidden elements do not divide into 2 heads"),
        ({"head_dim": 3}, "RotaryConfig.size is 4; it must be at most head_size, which is 3"),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, "AttentionConfig.kv_heads is 2; it must be a divisor"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is NaN; it must be a finite number above 0"),
        ({"hidden_act": "mish"}, 'hidden_act is "mish"; it must be one of silu, swish, gelu'),
        ({"tie_word_embeddings": "yes"}, 'tie_word_embeddings is "yes"; it must be true or false'),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0; this version does not know"),
        ({"quantization_config": {"bits": 4}}, 'quantization_config is {"bits": 4}; it must be null'),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map is"),
        ({"auto_map": "evil.Model"}, 'auto_map is "evil.Model"; it must be an object or null'),
        ({"is_encoder_decoder": True}, "is_encoder_decoder is true; it must be false"),
        ({"rope_interleaved": True}, "rope_interleaved is true; it must be false"),
    ],
)
def test_fields_that_cannot_be_used_are_named(folder: Path, fields: dict[str, Any], message: str) -> None:
    change_config(folder, **fields)
    assert message in refusal(folder, ConfigError)


@pytest.mark.parametrize("name", ["made_up_field", "sliding_window", "logit_scale", "query_pre_attn_scalar"])
def test_fields_of_other_families_are_not_passed_over(folder: Path, name: str) -> None:
    change_config(folder, **{name: 7})
    assert f"{name} is 7; this version does not know what that field means" in refusal(folder, ConfigError)


def test_missing_surplus_and_mis_shaped_tensors_are_named(folder: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    original = (folder / WEIGHTS).read_bytes()
    change_weights(folder, lambda tensors: tensors.pop(name))
    assert "lacks layers.1.self_attn.k_proj.weight" in refusal(folder, WeightError)

    (folder / WEIGHTS).write_bytes(original)
    change_weights(folder, lambda tensors: tensors.update({name.replace("weight", "bias"): torch.ones(4)}))
    assert "holds model.layers.1.self_attn.k_proj.bias" in refusal(folder, WeightError)

    (folder / WEIGHTS).write_bytes(original)
    change_weights(folder, lambda tensors: tensors.update({name: torch.ones(8, 4)}))
    assert f"{name} has shape [8, 4]; by its config it must be [4, 8]" in refusal(folder, WeightError)

    (folder / WEIGHTS).write_bytes(original)
    change_weights(folder, lambda tensors: tensors.update({name: torch.ones(4, 8, dtype=torch.int8)}))
    assert f"{name} is kept as I8" in refusal(folder, WeightError)

    (folder / WEIGHTS).write_bytes(original)
    change_weights(folder, lambda tensors: tensors.update({name.removeprefix("model."): torch.ones(4, 8)}))
    assert "holds both" in refusal(folder, WeightError)

    (folder / WEIGHTS).write_bytes(original)
    change_config(folder, num_hidden_layers=5)
    assert "lacks layers.2.input_layernorm.weight" in refusal(folder, WeightError)
    assert "and 24 more tensors" in refusal(folder, WeightError)


def test_a_head_that_the_config_does_not_tie_is_missed(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.pop("lm_head.weight"))
    assert "lacks lm_head.weight" in refusal(folder, WeightError)


def test_gpt2s_heads_must_divide(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=5, n_positions=4, n_embd=6, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    change_config(tmp_path, n_head=4)
    assert "6 hidden elements do not divide into 4 heads" in refusal(tmp_path, ConfigError)


def test_no_weights_and_pickles(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    assert "holds neither model.safetensors nor model.safetensors.index.json" in refusal(folder)
    torch.save({"weight": torch.ones(1)}, folder / "pytorch_model.bin")
    message = refusal(folder)
    assert "pytorch_model.bin, a pickle, which can run any code when read and is refused" in message
    assert "save_pretrained" in message


@settings(max_examples=50)
@given(data=st.data())
def test_truncated_safetensors_are_refused(saved: Path, data: st.DataObject) -> None:
    content = (saved / WEIGHTS).read_bytes()
    folder = copied(saved, saved.with_name("truncated"))
    (folder / WEIGHTS).write_bytes(content[: data.draw(st.integers(0, len(content) - 1), label="end")])
    assert "is truncated or corrupt" in refusal(folder)


@settings(max_examples=100)
@given(data=st.data())
def test_damaged_safetensors_headers_never_crash(saved: Path, data: st.DataObject) -> None:
    """The file is refused by a `TwinferError`, or its damage left every name, shape and dtype in place."""
    content = bytearray((saved / WEIGHTS).read_bytes())
    header = 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(data.draw(st.integers(1, 3), label="bytes")):
        place = data.draw(st.integers(0, header - 1), label="place")
        content[place] = data.draw(st.integers(0, 255), label="value")
    folder = copied(saved, saved.with_name("damaged"))
    (folder / WEIGHTS).write_bytes(content)
    error, shape = None, None
    try:
        shape = open_model(str(folder)).source.layer(0).mlp.up.weight_NI.shape
    except TwinferError as raised:
        error = str(raised)
    assert shape == (6, 8) or (error is not None and error.isprintable())


def test_shards_are_read_only_beside_the_index(folder: Path, tmp_path: Path) -> None:
    weight_map = shard(folder)
    """Whatever the name leads to: the index comes with the model."""
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes((folder / "one.safetensors").read_bytes())
    (folder / "inner").mkdir()
    (folder / "inner" / "one.safetensors").write_bytes(outside.read_bytes())
    places = ["../outside.safetensors", str(outside), "inner/one.safetensors", "./one.safetensors", "inner\\one"]
    for name in (*places, "C:one.safetensors", "..", ".", "", "\0"):
        moved = {tensor: name if file == "one.safetensors" else file for tensor, file in weight_map.items()}
        write_index(folder, moved)
        assert f"names {name!r}; it must name files beside itself, without a folder" in refusal(folder)
    write_index(folder, weight_map)
    assert open_model(str(folder)).config.hidden == 8


def test_a_users_own_links_are_followed(folder: Path, tmp_path: Path) -> None:
    """Of shards, of the folder of a hub cache's blobs, and of the single file: links do not come with a model."""
    whole = (folder / WEIGHTS).read_bytes()
    shard(folder)
    elsewhere = tmp_path / "elsewhere" / "deeper"
    elsewhere.mkdir(parents=True)
    for name in ("one.safetensors", "two.safetensors"):
        (folder / name).rename(elsewhere / name)
        (folder / name).symlink_to(elsewhere / name)
    assert open_model(str(folder)).config.hidden == 8
    snapshot = tmp_path / "hub" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "hub" / "blobs").symlink_to(elsewhere)
    for file in folder.iterdir():
        blob = elsewhere / file.name
        if not blob.exists():
            blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / file.name)
    assert open_model(str(snapshot)).config.hidden == 8
    for name in (INDEX, "one.safetensors", "two.safetensors"):
        (folder / name).unlink()
    (elsewhere / WEIGHTS).write_bytes(whole)
    (folder / WEIGHTS).symlink_to(elsewhere / WEIGHTS)
    assert open_model(str(folder)).config.hidden == 8


def test_an_end_token_of_minus_one_is_none(folder: Path) -> None:
    """So others write it; in a list it leaves the others, and any other negative number means nothing."""
    for name in ("config.json", "generation_config.json"):
        for value, tokens in ((-1, ()), ([-1], ()), ([-1, 2, -1], (2,)), (2, (2,))):
            if name == "config.json":
                (folder / "generation_config.json").unlink(missing_ok=True)
                change_config(folder, eos_token_id=value)
            else:
                (folder / name).write_text(json.dumps({"eos_token_id": value}))
            assert open_model(str(folder)).end_tokens == tokens
    for value in (-2, [-2], 10**400, True, 1.0):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
        assert "eos_token_id is" in refusal(folder, ConfigError)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"chat_template": [{"name": {}}]}, "chat_template[0].name is {}; it must be a string"),
        ({"chat_template": [{"name": "default", "template": 1}]}, "chat_template[0].template is 1; it must be"),
        ({"chat_template": ["default"]}, 'chat_template[0] is "default"; it must be an object with name and template'),
        ({"chat_template": {"a": 1}}, "chat_template is no text"),
        ({"eos_token": "\ud800"}, r'holds "\ud800", half a surrogate pair'),
        ({"eos_token": {"content": "\ud800"}}, "half a surrogate pair"),
        ({"chat_template": "\udfff"}, "half a surrogate pair"),
    ],
)
def test_tokenizer_configs_that_cannot_be_used(folder: Path, values: dict[str, Any], message: str) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    with pytest.raises(TwinferError) as caught:
        open_model(str(folder))
    assert message in str(caught.value)


def test_indices_that_do_not_match_their_files(folder: Path) -> None:
    weight_map = shard(folder)
    (folder / INDEX).write_text("{")
    assert "index.json is not valid JSON" in refusal(folder)
    (folder / INDEX).write_text("{}")
    assert "weight_map is missing" in refusal(folder)
    write_index(folder, [1])
    assert "weight_map is [1]; it must be an object" in refusal(folder, ConfigError)
    write_index(folder, {"lm_head.weight": 3})
    assert "weight_map.lm_head.weight is 3; it must be a string" in refusal(folder, ConfigError)
    write_index(folder, weight_map | {"lm_head.weight": "two.safetensors"})
    assert "two.safetensors does not hold lm_head.weight" in refusal(folder)
    write_index(folder, weight_map | {"more": "three.safetensors"})
    assert "names three.safetensors, which is not there" in refusal(folder)
    write_index(folder, weight_map)
    save_file({"lm_head.weight": torch.ones(11, 8)}, folder / "three.safetensors")
    write_index(folder, weight_map | {"lm_head.weight": "three.safetensors"})
    assert "holds lm_head.weight, and so does another file" in refusal(folder)


def test_malformed_tokenizer_files(folder: Path) -> None:
    assert open_model(str(folder)).tokenizer is None
    (folder / "tokenizer.json").write_text("{}")
    assert "tokenizer.json is no tokenizer" in refusal(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text("[]")
    assert "tokenizer_config.json holds a JSON list" in refusal(folder)
    (folder / "tokenizer_config.json").write_text('{"chat_template": 3}')
    assert "chat_template is no text" in refusal(folder)


def test_what_stands_beside_the_tokenizer(folder: Path) -> None:
    """Named tokens in both their forms; the template file before the field; end tokens from generation_config.json."""
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": None, "chat_template": "one"})
    )
    checkpoint = open_model(str(folder))
    assert checkpoint.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert checkpoint.chat_template == "one"
    assert checkpoint.end_tokens == (2,)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": [{"name": "rag", "template": "no"}, {"name": "default", "template": "two"}]})
    )
    assert open_model(str(folder)).chat_template == "two"
    (folder / "chat_template.jinja").write_text("three")
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6, 5, 50256]}')
    checkpoint = open_model(str(folder))
    assert checkpoint.chat_template == "three"
    assert checkpoint.end_tokens == (5, 6)
    (folder / "generation_config.json").write_text('{"eos_token_id": "5"}')
    assert 'eos_token_id is "5"; it must be' in refusal(folder, ConfigError)


def test_unreadable_files_say_so(folder: Path) -> None:
    (folder / "tokenizer.json").mkdir()
    assert open_model(str(folder)).tokenizer is None
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(folder / "config.json")
    assert "config.json" in refusal(folder)
