"""What a model knows: one frozen dataclass of tensors for each part, and who hands them out.

All are pytrees (`torch.utils._pytree` maps over them) and compare by identity; to compare values, compare bits.
Linear weights are stored [outputs, inputs]: y = x @ weight.T + bias.

Shapes: M hidden, H query heads, K key/value heads, D head size, F intermediate, V vocabulary, P positions,
J = rotary size / 2, N outputs and I inputs of a linear.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from .config import AttentionConfig, LayerConfig, MlpConfig, ModelConfig, NormConfig, NormKind
from .errors import WeightError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LinearWeights:
    weight_NI: Tensor
    bias_N: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NormWeights:
    gain_M: Tensor
    bias_M: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionWeights:
    query: LinearWeights
    """[H * D, M]; rows h * D .. (h + 1) * D are head h."""
    key: LinearWeights
    """[K * D, M]."""
    value: LinearWeights
    """[K * D, M]."""
    output: LinearWeights
    """[M, H * D]."""
    rotary_frequency_J: Tensor | None = None
    """Radians per token of each rotating pair, float64, scaling already applied; None without rotary positions."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MlpWeights:
    up: LinearWeights
    """[F, M]."""
    down: LinearWeights
    """[M, F]."""
    gate: LinearWeights | None = None
    """[F, M]; None where the MLP is not gated."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerWeights:
    attention_norm: NormWeights
    attention: AttentionWeights
    mlp_norm: NormWeights
    mlp: MlpWeights


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EmbeddingWeights:
    token_VM: Tensor
    position_PM: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeadWeights:
    norm: NormWeights
    projection: LinearWeights | None = None
    """[V, M]; None where the head is tied: then the token table is the weight."""


for _kind in (LinearWeights, NormWeights, AttentionWeights, MlpWeights, LayerWeights, EmbeddingWeights, HeadWeights):
    torch.export.register_dataclass(_kind)


class WeightSource(Protocol):
    """Hands out a model's weights one part at a time, so nobody needs to hold two copies of a model.

    Tensors come in any float dtype, on the CPU, and may share storage with the source (a memory-mapped file, a live
    module): read them, never write to them. Calling twice gives equal values, not necessarily the same tensor.
    Each raises `CheckpointError` or `WeightError` where the part cannot be had.
    """

    @property
    def config(self) -> ModelConfig: ...

    def embedding(self) -> EmbeddingWeights: ...

    def layer(self, index: int) -> LayerWeights: ...

    def head(self) -> HeadWeights: ...


def validate_embedding(weights: EmbeddingWeights, config: ModelConfig) -> None:
    """Raise `WeightError` naming the first tensor that does not fit the config; likewise the two below."""
    _check(weights.token_VM, (config.vocabulary, config.hidden), "token_VM")
    _check_optional(weights.position_PM, config.learned_positions, (config.context, config.hidden), "position_PM")


def validate_layer(weights: LayerWeights, config: ModelConfig, index: int) -> None:
    layer = config.layers[index]
    where = f"layer {index} "
    _check_norm(weights.attention_norm, layer.norm, config.hidden, where + "attention_norm")
    _check_attention(weights.attention, layer.attention, config.hidden, where + "attention")
    _check_norm(weights.mlp_norm, layer.norm, config.hidden, where + "mlp_norm")
    _check_mlp(weights.mlp, layer, config.hidden, where + "mlp")


def validate_head(weights: HeadWeights, config: ModelConfig) -> None:
    _check_norm(weights.norm, config.final_norm, config.hidden, "head norm")
    if (weights.projection is None) != config.tied_head:
        raise _presence_error("head projection", wanted=not config.tied_head)
    if weights.projection is not None:
        _check_linear(weights.projection, config.vocabulary, config.hidden, False, "head projection")


def tensors(weights: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a weights dataclass with its dotted name, in field order; absent ones are left out."""
    for field in fields(weights):
        value = getattr(weights, field.name)
        name = f"{prefix}{field.name}"
        if isinstance(value, Tensor):
            yield name, value
        elif value is not None:
            yield from tensors(value, f"{name}.")


def _check_attention(weights: AttentionWeights, config: AttentionConfig, hidden: int, where: str) -> None:
    query_width, kv_width = config.heads * config.head_size, config.kv_heads * config.head_size
    _check_linear(weights.query, query_width, hidden, config.qkv_bias, where + ".query")
    _check_linear(weights.key, kv_width, hidden, config.qkv_bias, where + ".key")
    _check_linear(weights.value, kv_width, hidden, config.qkv_bias, where + ".value")
    _check_linear(weights.output, hidden, query_width, config.output_bias, where + ".output")
    pairs = config.rotary.size // 2 if config.rotary is not None else 0
    _check_optional(weights.rotary_frequency_J, pairs > 0, (pairs,), where + ".rotary_frequency_J")


def _check_mlp(weights: MlpWeights, layer: LayerConfig, hidden: int, where: str) -> None:
    config: MlpConfig = layer.mlp
    if config.experts != 1:
        raise WeightError(
            f"{where} has {config.experts} experts; weights of dense MLPs alone are known, so it must be 1"
        )
    _check_linear(weights.up, config.width, hidden, config.bias, where + ".up")
    _check_linear(weights.down, hidden, config.width, config.bias, where + ".down")
    if (weights.gate is not None) != config.gated:
        raise _presence_error(f"{where}.gate", wanted=config.gated)
    if weights.gate is not None:
        _check_linear(weights.gate, config.width, hidden, config.bias, where + ".gate")


def _check_norm(weights: NormWeights, config: NormConfig, hidden: int, where: str) -> None:
    _check(weights.gain_M, (hidden,), where + ".gain_M")
    _check_optional(weights.bias_M, config.kind is NormKind.LAYER, (hidden,), where + ".bias_M")


def _check_linear(weights: LinearWeights, outputs: int, inputs: int, bias: bool, where: str) -> None:
    _check(weights.weight_NI, (outputs, inputs), where + ".weight_NI")
    _check_optional(weights.bias_N, bias, (outputs,), where + ".bias_N")


def _check_optional(tensor: Tensor | None, wanted: bool, shape: tuple[int, ...], where: str) -> None:
    if (tensor is not None) != wanted:
        raise _presence_error(where, wanted)
    if tensor is not None:
        _check(tensor, shape, where)


def _check(tensor: Tensor, shape: tuple[int, ...], where: str) -> None:
    if tuple(tensor.shape) != shape:
        raise WeightError(f"{where} has shape {list(tensor.shape)}; by the config it must be {list(shape)}")
    if not tensor.is_floating_point():
        raise WeightError(f"{where} has dtype {tensor.dtype}; it must be a float dtype")


def _presence_error(where: str, wanted: bool) -> WeightError:
    found, right = ("absent", "present") if wanted else ("present", "absent")
    return WeightError(f"{where} is {found}; by the config it must be {right}")
