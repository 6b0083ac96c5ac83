"""GGUF files of the `llama` architecture (LLaMA, SmolLM, and Mistral without its window) as models."""

from typing import Any

import torch
from torch import Tensor

from ..spec.config import (
    Activation,
    AttentionConfig,
    Head,
    LayerConfig,
    MlpConfig,
    ModelConfig,
    NormConfig,
    NormKind,
    RotaryConfig,
    RotaryLayout,
)
from ..spec.errors import CheckpointError, ConfigError, WeightError
from . import rotary
from .fields import MOST_LAYERS, Fields
from .gguf_file import GgufFile
from .permutation import key_rows, query_rows
from .plan import Made
from .source import FileSource
from .table import Table, linear, norm, output, tensor

ARCHITECTURES = ("llama",)

ROTARY_DIVISORS = "rope_freqs.weight"
"""By what each pair's frequency is to be divided: how converters write down LLaMA 3.1's scaling."""

TABLE = Table(
    layers="blk.{layer}.",
    embedding=(tensor("token_embd.weight", "token_VE"),),
    layer=(
        *norm("attn_norm", "attention_norm"),
        *linear("attn_q", "attention.query", reorder=query_rows),
        *linear("attn_k", "attention.key", reorder=key_rows),
        *linear("attn_v", "attention.value"),
        *linear("attn_output", "attention.output"),
        *norm("ffn_norm", "mlp_norm"),
        *linear("ffn_gate", "mlp.gate"),
        *linear("ffn_up", "mlp.up"),
        *linear("ffn_down", "mlp.down"),
    ),
    head=(*norm("output_norm", "norm"), *output("output")),
)

HARMLESS = (
    "tensor_data_layout",  # how the tool that wrote the file came by it
    "rope.scaling.original_context_length",  # says what the scaling was made for; linear scaling does not use it
    "rope.scaling.finetuned",
)


def source(file: GgufFile, metadata: dict[str, Any], most_tokens: int | None = None) -> FileSource:
    """The weights of a GGUF file. Raises `CheckpointError`, `ConfigError` or `WeightError` for what cannot be used."""
    _check_architecture(file, metadata)
    prefix = "llama."
    values = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    fields = Fields(values, f"{file.where}: {prefix}")
    config = _config(fields, file)
    rotating = config.layers[0].attention.rotary
    assert rotating is not None, "every llama layer rotates"
    frequency_J = _frequencies(fields, file, rotating.size)
    fields.finish()
    without_divisors = _Without(file, ROTARY_DIVISORS)
    made = Made(layers=[{"attention.rotary_frequency_J": frequency_J}] * len(config.layers), head={})
    return FileSource(config, TABLE, without_divisors, made, most_tokens=most_tokens)


def _check_architecture(file: GgufFile, metadata: dict[str, Any]) -> None:
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{file.where} is of architecture {architecture!r}; the GGUF architectures known here are: "
            + ", ".join(ARCHITECTURES)
        )
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise CheckpointError(f"{file.where} holds a GGUF {kind}; it must hold a model")
    if metadata.get("split.count", 1) not in (0, 1):
        raise CheckpointError(
            f"{file.where} is one of {metadata['split.count']} pieces; join them with llama-gguf-split --merge"
        )


def _config(fields: Fields, file: GgufFile) -> ModelConfig:
    hidden = fields.integer("embedding_length")
    heads = fields.integer("attention.head_count")
    head_size = fields.integer("attention.key_length", hidden // heads)
    fields.only("attention.value_length", head_size)
    fields.only("expert_count", 0)
    fields.only("expert_used_count", 0)
    fields.ignore(HARMLESS)
    norm = NormConfig(kind=NormKind.RMS, epsilon=fields.number("attention.layer_norm_rms_epsilon"))
    layer = LayerConfig(
        norm=norm,
        attention=AttentionConfig(
            heads=heads,
            kv_heads=fields.integer("attention.head_count_kv", heads),
            head_size=head_size,
            scale=head_size**-0.5,
            rotary=RotaryConfig(layout=RotaryLayout.HALF_SPLIT, size=fields.integer("rope.dimension_count", head_size)),
            qkv_bias="blk.0.attn_q.bias" in file.shapes,
            output_bias="blk.0.attn_output.bias" in file.shapes,
        ),
        mlp=MlpConfig(
            width=fields.integer("feed_forward_length"),
            activation=Activation.SILU,
            gated=True,
            bias="blk.0.ffn_up.bias" in file.shapes,
        ),
    )
    return ModelConfig(
        family="llama",
        hidden=hidden,
        vocabulary=fields.integer("vocab_size", file.shapes.get("token_embd.weight", (0,))[0]),
        context=fields.integer("context_length"),
        layers=(layer,) * fields.integer("block_count", most=MOST_LAYERS),
        final_norm=norm,
        learned_positions=False,
        head=Head.OWN if "output.weight" in file.shapes else Head.TIED,
    )


def _frequencies(fields: Fields, file: GgufFile, size: int) -> Tensor:
    frequency_J = rotary.frequencies(fields.number("rope.freq_base", 10000.0), size)
    scaling = fields.choice("rope.scaling.type", {"none": "none", "linear": "linear"}, "none")
    factor = fields.number("rope.scaling.factor", fields.number("rope.scale_linear", 1.0))
    if scaling == "linear" or fields.has("rope.scale_linear"):
        frequency_J = rotary.scaled_linearly(frequency_J, factor)
    if ROTARY_DIVISORS in file.shapes:
        frequency_J = frequency_J / _divisors(file, size)
    return frequency_J


def _divisors(file: GgufFile, size: int) -> Tensor:
    shape = file.shapes[ROTARY_DIVISORS]
    if shape != (size // 2,):
        raise WeightError(f"{file.where}: {ROTARY_DIVISORS} has shape {list(shape)}; it must be {[size // 2]}")
    divisor_J = file.read(ROTARY_DIVISORS).to(torch.float64)
    if not (divisor_J > 0).all():
        raise ConfigError(f"{file.where}: {ROTARY_DIVISORS} holds {divisor_J.min().item()}; all must be above 0")
    return divisor_J


class _Without:
    """A file but for one tensor, which has been used already."""

    def __init__(self, file: GgufFile, name: str):
        self.where = file.where
        self.shapes = {key: shape for key, shape in file.shapes.items() if key != name}
        self.read = file.read
        self.unreadable = file.unreadable
