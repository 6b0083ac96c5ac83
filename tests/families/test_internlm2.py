"""InternLM 2, which transformers lacks, beside its LLaMA, whose weights are written as InternLM 2 keeps them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from twinfer.checkpoint import open_model
from twinfer.spec.errors import ConfigError
from twinfer.spec.weights import LayerWeights, LinearWeights

from .examples import drawn

AUTO_MAP = {
    "AutoConfig": "configuration_internlm2.InternLM2Config",
    "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
    "AutoModel": "modeling_internlm2.InternLM2ForCausalLM",
}


def published(config: LlamaConfig) -> dict[str, Any]:
    """The config as published folders have it."""
    kind, factor = config.rope_parameters["rope_type"], config.rope_parameters.get("factor")
    return {
        "architectures": ["InternLM2ForCausalLM"],
        "attn_implementation": "eager",
        "auto_map": AUTO_MAP,
        "bias": config.attention_bias,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": "internlm2",
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "pad_token_id": 2,
        "pretraining_tp": 1,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": None if kind == "default" else {"type": kind, "factor": factor},
        "rope_theta": config.rope_parameters["rope_theta"],
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.0",
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }


def merged(query: Tensor, key: Tensor, value: Tensor, config: LlamaConfig) -> Tensor:
    """Group by group: the query heads that share a key and a value head, then these."""
    size = config.hidden_size // config.num_attention_heads
    group = config.num_attention_heads // config.num_key_value_heads
    rows: list[Tensor] = []
    for index in range(config.num_key_value_heads):
        for head in range(group):
            first = (index * group + head) * size
            rows += [query[first + row] for row in range(size)]
        rows += [key[index * size + row] for row in range(size)]
        rows += [value[index * size + row] for row in range(size)]
    return torch.stack(rows)


class LlamaForCausalLM(transformers.LlamaForCausalLM):  # type: ignore[misc]
    """LLaMA that saves itself as InternLM 2."""

    def save_pretrained(self, folder: str, **_: Any) -> None:
        config, theirs = self.config, self.state_dict()
        own = {
            "model.tok_embeddings.weight": theirs["model.embed_tokens.weight"],
            "model.norm.weight": theirs["model.norm.weight"],
        }
        if not config.tie_word_embeddings:
            own["output.weight"] = theirs["lm_head.weight"]
        for index in range(config.num_hidden_layers):
            there, here = f"model.layers.{index}.", f"model.layers.{index}."
            for part in ("weight", "bias") if config.attention_bias else ("weight",):
                projections = [theirs[f"{there}self_attn.{each}_proj.{part}"] for each in "qkv"]
                own[f"{here}attention.wqkv.{part}"] = merged(*projections, config)
                own[f"{here}attention.wo.{part}"] = theirs[f"{there}self_attn.o_proj.{part}"]
            own[f"{here}attention_norm.weight"] = theirs[f"{there}input_layernorm.weight"]
            own[f"{here}ffn_norm.weight"] = theirs[f"{there}post_attention_layernorm.weight"]
            for name, llama in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
                own[f"{here}feed_forward.{name}.weight"] = theirs[f"{there}mlp.{llama}_proj.weight"]
        save_file({name: each.contiguous() for name, each in own.items()}, Path(folder) / "model.safetensors")
        (Path(folder) / "config.json").write_text(json.dumps(published(config)))


@st.composite
def configs(draw: st.DrawFn) -> LlamaConfig:
    kv_heads, group, half = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(2, 4))
    rotary: dict[str, Any] = {
        "rope_theta": draw(st.sampled_from([10000.0, 1e6])),
        "rope_type": draw(st.sampled_from(["default", "linear", "dynamic"])),
    }
    if rotary["rope_type"] != "default":
        rotary["factor"] = draw(st.sampled_from([1.0, 2.5]))
    return LlamaConfig(
        vocab_size=draw(st.integers(3, 40)),
        hidden_size=kv_heads * group * 2 * half,
        intermediate_size=draw(st.integers(1, 20)),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=kv_heads * group,
        num_key_value_heads=kv_heads,
        max_position_embeddings=draw(st.integers(16, 64)),
        rms_norm_eps=draw(st.sampled_from([1e-5, 0.25])),
        rope_parameters=rotary,
        attention_bias=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
    )


@drawn(6)
@given(config=configs(), seed=st.integers(0, 2**31))
def test_internlm2(config: LlamaConfig, seed: int, agrees: Callable[..., None]) -> None:
    agrees(LlamaForCausalLM, config, seed)


def groups_by_turns(weights: LayerWeights) -> LayerWeights:
    """Query head h reads key head h modulo their number: four heads of four, two of keys."""

    def turned(linear: LinearWeights) -> LinearWeights:
        return replace(linear, weight_NI=linear.weight_NI.unflatten(0, (2, 2, 4)).transpose(0, 1).flatten(0, 2))

    attention = weights.attention
    turned_query = replace(attention, query=turned(attention.query))
    output = attention.output.weight_NI.unflatten(1, (2, 2, 4)).transpose(1, 2).flatten(1, 3)
    return replace(weights, attention=replace(turned_query, output=replace(attention.output, weight_NI=output)))


def gate_and_up_swapped(weights: LayerWeights) -> LayerWeights:
    gate = weights.mlp.gate
    assert gate is not None
    return replace(weights, mlp=replace(weights.mlp, gate=weights.mlp.up, up=gate))


def read_as_stacked(weights: LayerWeights) -> LayerWeights:
    """All queries, then all keys, then all values, though the file goes group by group."""
    attention = weights.attention
    query, key, value = (each.weight_NI.split(4) for each in (attention.query, attention.key, attention.value))
    rows = torch.cat([query[0], query[1], key[0], value[0], query[2], query[3], key[1], value[1]])
    parts = [LinearWeights(weight_NI=each) for each in rows.split([16, 8, 8])]
    return replace(weights, attention=replace(attention, query=parts[0], key=parts[1], value=parts[2]))


def test_wrong_mappings_are_seen(catches: Callable[..., None]) -> None:
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    catches(
        LlamaForCausalLM,
        config,
        {
            "groups by turns": {"on_layer": groups_by_turns},
            "gate and up swapped": {"on_layer": gate_and_up_swapped},
            "read as stacked": {"on_layer": read_as_stacked},
        },
    )


@pytest.mark.parametrize(
    ("named", "refused"),
    [
        ({"AutoModelForCausalLM": "internlm/internlm2-7b--modeling_internlm2.InternLM2ForCausalLM"}, False),
        ({"AutoTokenizer": "anything"}, False),
        (None, False),
        ({"AutoModelForCausalLM": "modeling_evil.InternLM2ForCausalLM"}, True),
        ({"AutoModelForCausalLM": "internlm/x--modeling_evil.InternLM2ForCausalLM"}, True),
        ({"AutoModelForCausalLM": ["modeling_internlm2.InternLM2ForCausalLM", None]}, True),
    ],
)
def test_only_the_family_s_own_code_may_be_named(tmp_path: Path, named: dict[str, Any] | None, refused: bool) -> None:
    config = LlamaConfig(vocab_size=5, hidden_size=8, intermediate_size=4, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(str(tmp_path))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": named}))
    if refused:
        with pytest.raises(ConfigError, match=r"auto_map is .* or name configuration_internlm2 and modeling_internlm2"):
            open_model(str(tmp_path))
    else:
        open_model(str(tmp_path))
