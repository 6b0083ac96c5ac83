"""What the tests of LLaMA's descendants share: sizes and rotary scalings, drawn, and ways to be wrong."""

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from transformers import PreTrainedConfig

from twinfer.checkpoint.families import FAMILIES
from twinfer.checkpoint.family import ParsedConfig, find, parse_config
from twinfer.checkpoint.fields import Fields
from twinfer.spec.config import LayerConfig, ModelConfig, RotaryLayout

from .examples import drawn

few = drawn(6)
seeds = st.integers(0, 2**31)
KINDS = ["longrope", "yarn", "llama3", "linear", "dynamic", "default"]
ACTIVATIONS = ["silu", "gelu", "gelu_pytorch_tanh", "relu"]


@st.composite
def sizes(draw: st.DrawFn, *, divided: bool = False, activation: str = "hidden_act", eps: str = "rms_norm_eps") -> Any:
    """Fields that all have; `divided` where the class wants hidden elements that heads divide, whatever their size."""
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads, size = kv_heads * group, 2 * draw(st.integers(1, 4))
    fields: dict[str, Any] = {"hidden_size": max(4, heads * size)}
    if heads * size < 4 or draw(st.booleans()):
        hidden = heads * -(-draw(st.integers(3, 30)) // heads) if divided else draw(st.integers(3, 30))
        fields = {"hidden_size": max(hidden, heads * -(-3 // heads)) if divided else hidden, "head_dim": size}
    return fields | {
        "vocab_size": draw(st.integers(3, 40)),
        "intermediate_size": draw(st.integers(1, 20)),
        "num_hidden_layers": draw(st.integers(1, 4)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        activation: draw(st.sampled_from(ACTIVATIONS)),
        "max_position_embeddings": draw(st.integers(16, 64)),
        eps: draw(st.sampled_from([1e-5, 1e-6, 0.25])),
        "tie_word_embeddings": draw(st.booleans()),
        "pad_token_id": None,
    }


@st.composite
def rotating(draw: st.DrawFn, fields: dict[str, Any], kind: str | None = None) -> dict[str, Any]:
    """The fields, with rotary parameters of that kind, or of any, or with none."""
    size = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
    parameters = draw(scalings(size, fields["max_position_embeddings"], kind))
    if parameters["rope_type"] == "default" and draw(st.booleans()):
        return fields
    outside = {}
    if "original_max_position_embeddings" in parameters and draw(st.booleans()):  # as Phi-3 has it
        outside = {"original_max_position_embeddings": parameters["original_max_position_embeddings"]}
    return fields | outside | {"rope_parameters": parameters}


@st.composite
def scalings(
    draw: st.DrawFn, size: int, context: int, kind: str | None = None, *, truncate: bool = True
) -> dict[str, Any]:
    """Rotary parameters of heads of that size; `truncate` where the class reads that field."""
    kind = draw(st.sampled_from(KINDS)) if kind is None else kind
    if kind == "dynamic" and size == 2:  # where transformers divides by zero
        kind = "linear"
    parameters = {"rope_type": kind, "rope_theta": draw(st.sampled_from([10000.0, 77.0, 1e6]))}
    factor = draw(st.sampled_from([1.0, 1.5, 8.0]))
    original = draw(st.sampled_from([4, 13, 64, 8192]))

    def some(**choices: Any) -> dict[str, Any]:
        drawn = {name: draw(values) for name, values in choices.items()}
        return {name: value for name, value in drawn.items() if value is not None}

    def maybe(*values: Any) -> st.SearchStrategy[Any]:
        return st.sampled_from([None, *values])

    match kind:
        case "linear" | "dynamic":
            return parameters | {"factor": factor}
        case "llama3":
            bands = {"low_freq_factor": draw(st.sampled_from([0.5, 1.0])), "high_freq_factor": 4.0}
            return parameters | {"factor": factor} | bands | some(original_max_position_embeddings=maybe(original))
        case "yarn":
            return (
                parameters
                | {"factor": factor}
                | some(
                    original_max_position_embeddings=maybe(original),
                    attention_factor=maybe(0.7, 1.3),
                    beta_fast=maybe(4.0, 16),
                    beta_slow=maybe(0.25, 2),
                    mscale=maybe(0.7, 1.0),
                    mscale_all_dim=maybe(0.5, 1.0),
                    **({"truncate": maybe(True, False)} if truncate else {}),
                )
            )
        case "longrope":
            divisors = st.lists(st.sampled_from([1.0, 1.1, 3.0]), min_size=size // 2, max_size=size // 2)
            return (
                parameters
                | {"short_factor": draw(divisors), "long_factor": draw(divisors)}
                | {"original_max_position_embeddings": draw(st.sampled_from([SHORTEST, context, 2 * context]))}
                | some(factor=maybe(factor), attention_factor=maybe(0.7, 1.3))
            )
    return parameters


SHORTEST = 2
"""A first context so short that every prompt is longer, and every half of one."""


def comparable(config: PreTrainedConfig) -> dict[str, Any]:
    """How to compare where transformers does not always compute one model: keywords of `agrees`.

    It chooses LongRoPE's divisors by the sequence so far, and so uses two kinds for one sequence; prompts are drawn
    that are long from the start. Its cache holds all keys, not none, for a window of one token.
    """
    parameters = config.rope_parameters
    each = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    long = any(one.get("original_max_position_embeddings") == SHORTEST for one in each)
    return {
        "lengths": (11, 7, 6) if long else (11, 1, 6),
        "their_cache": getattr(config, "sliding_window", None) != 1,
    }


def windowed(layers: int) -> st.SearchStrategy[list[str] | None]:
    """`layer_types`, or nothing."""
    types = st.lists(st.sampled_from(["full_attention", "sliding_attention"]), min_size=layers, max_size=layers)
    return st.one_of(st.none(), types)


def reads_alike(kind: type[PreTrainedConfig], older: dict[str, Any]) -> None:
    """A config.json in an older style means to us what transformers' rewriting of it means."""
    newer = json.loads(kind.from_dict(deepcopy(older)).to_json_string(use_diff=False))
    ours, rewritten = _understood(older), _understood(newer)
    assert ours.config == rewritten.config
    for one, other in zip(ours.rotations, rewritten.rotations, strict=True):
        assert (one is None) == (other is None)
        assert one is None or other is None or torch.equal(one.frequency_J, other.frequency_J)


def _understood(values: dict[str, Any]) -> ParsedConfig:
    fields = Fields(values, "config.json: ")
    return parse_config(find(FAMILIES, fields), fields)


def layers_with(change: Callable[[LayerConfig], LayerConfig]) -> dict[str, Any]:
    """A wrong mapping: every layer's config changed."""

    def on_config(config: ModelConfig) -> ModelConfig:
        return replace(config, layers=tuple(change(layer) for layer in config.layers))

    return {"on_config": on_config}


def attention_with(**fields: Any) -> dict[str, Any]:
    """A wrong mapping: these fields of every layer's attention otherwise."""
    return layers_with(lambda layer: replace(layer, attention=replace(layer.attention, **fields)))


def window_longer(layer: LayerConfig) -> LayerConfig:
    window = layer.attention.window
    return replace(layer, attention=replace(layer.attention, window=None if window is None else window + 1))


def other_layout(layer: LayerConfig) -> LayerConfig:
    rotary = layer.attention.rotary
    assert rotary is not None
    other = {
        RotaryLayout.HALF_SPLIT: RotaryLayout.INTERLEAVED,
        RotaryLayout.INTERLEAVED: RotaryLayout.HALF_SPLIT,
    }[rotary.layout]
    return replace(layer, attention=replace(layer.attention, rotary=replace(rotary, layout=other)))
