"""What a model knows: one frozen dataclass of tensors for each part, and who hands them out.

All are pytrees (`torch.utils._pytree` maps over them) and compare by identity; to compare values, compare bits.
Linear weights are stored [outputs, inputs]: y = x @ weight.T + bias.

Shapes: M hidden, W width of the token table, H query heads, K key/value heads, D head size, F intermediate,
V vocabulary, P positions, Y token types, J = rotary size / 2, N outputs and I inputs of a linear, E experts.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from types import NoneType
from typing import Any, Protocol, TypeVar, get_args, get_type_hints, runtime_checkable

import torch
from torch import Tensor

from .config import ModelConfig
from .errors import WeightError
from .shapes import Shapes, embedding_shapes, head_shapes, is_buffer, layer_shapes
from .shard import (
    EXPERTS,
    Shard,
    Slices,
    embedding_slices,
    head_slices,
    index_of,
    layer_slices,
    sliced_shapes,
    slices_of_expert,
    slices_without_experts,
)

Part = TypeVar("Part")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LinearWeights:
    weight_NI: Tensor
    bias_N: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NormWeights:
    """[M], or however many elements are normalized."""

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
    alibi_slope_H: Tensor | None = None
    """By how much each head's scores fall with every token of distance, float64, positive; None without ALiBi."""
    query_norm: NormWeights | None = None
    """Gain [H * D], where all heads share one of [D] repeated for each; None where queries are not normalized."""
    key_norm: NormWeights | None = None
    """Gain [K * D]."""
    sink_H: Tensor | None = None
    """A score of each head that is no key's; None without sinks."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MlpWeights:
    up: LinearWeights
    """[F, M]."""
    down: LinearWeights
    """[M, F]."""
    gate: LinearWeights | None = None
    """[F, M]; None where the MLP is not gated."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StackedLinearWeights:
    """One linear for each expert."""

    weight_ENI: Tensor
    bias_EN: Tensor | None = None

    def __getitem__(self, expert: int) -> LinearWeights:
        """Return one expert's, as views."""
        bias_N = None if self.bias_EN is None else self.bias_EN[expert]
        return LinearWeights(weight_NI=self.weight_ENI[expert], bias_N=bias_N)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertWeights:
    up: StackedLinearWeights
    """[E, F, M]."""
    down: StackedLinearWeights
    """[E, M, F]."""
    gate: StackedLinearWeights | None = None
    """[E, F, M]; None where the experts are not gated."""

    def __getitem__(self, expert: int) -> MlpWeights:
        """Return one expert's, as views."""
        gate = None if self.gate is None else self.gate[expert]
        return MlpWeights(up=self.up[expert], down=self.down[expert], gate=gate)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MoeWeights:
    """Maps of a token to one number, or one an expert, stay float32 in every storage: router, gate, coefficient."""

    router: LinearWeights
    """[E, M]."""
    experts: ExpertWeights
    choice_bias_E: Tensor | None = None
    """Added to the scores for the choice only."""
    shared: MlpWeights | None = None
    shared_gate: LinearWeights | None = None
    """[1, M]."""
    residual: MlpWeights | None = None
    coefficient: LinearWeights | None = None
    """[2, M]: of the experts, and of the residual MLP."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerWeights:
    """A norm is named by where it stands: at the input of attention or MLP, or at the output.

    `NormPlacement` says which are there. Where sums are normalized (POST_NORM), the norm at an output acts after that
    is added.
    """

    attention: AttentionWeights
    mlp: MlpWeights | MoeWeights
    attention_norm: NormWeights | None = None
    """Of both inputs where they share one."""
    mlp_norm: NormWeights | None = None
    attention_output_norm: NormWeights | None = None
    mlp_output_norm: NormWeights | None = None

    @property
    def dense_mlp(self) -> MlpWeights:
        """The MLP's. Raises `WeightError` where a mixture of experts is in its place."""
        if isinstance(self.mlp, MoeWeights):
            raise WeightError(f"the layer has {len(self.mlp.router.weight_NI)} experts; here it must have one MLP")
        return self.mlp


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EmbeddingWeights:
    token_VW: Tensor
    position_PM: Tensor | None = None
    type_YM: Tensor | None = None
    norm: NormWeights | None = None
    projection: LinearWeights | None = None
    """[M, W], without bias; None where the table is as wide as the hidden vector."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeadWeights:
    norm: NormWeights | None = None
    reduction: LinearWeights | None = None
    """[W, M], without bias; None where the table is as wide as the hidden vector."""
    projection: LinearWeights | None = None
    """[V, W], without bias; None where the head is tied: then the token table is the weight."""
    bias_V: Tensor | None = None
    """Of the head, tied or not."""


for _kind in (
    LinearWeights,
    NormWeights,
    AttentionWeights,
    MlpWeights,
    StackedLinearWeights,
    ExpertWeights,
    MoeWeights,
    LayerWeights,
    EmbeddingWeights,
    HeadWeights,
):
    torch.export.register_dataclass(_kind)


class WeightSource(Protocol):
    """Hands out a model's weights one part at a time, so nobody needs to hold two copies of a model.

    Tensors come in any float dtype, on the CPU, and may share storage with the source (a memory-mapped file, a live
    module): read them, never write to them. Calling twice gives equal values, not necessarily the same tensor.
    With a shard, only what belongs to that rank is handed out, and no more is read than the file's form requires;
    `config` stays that of the whole model. Each raises `CheckpointError` or `WeightError` where the part cannot be
    had, and `RequestError` where that number of ranks cannot share the model.
    """

    @property
    def config(self) -> ModelConfig: ...

    def embedding(self, shard: Shard | None = None) -> EmbeddingWeights: ...

    def layer(self, index: int, shard: Shard | None = None) -> LayerWeights: ...

    def head(self, shard: Shard | None = None) -> HeadWeights: ...


@runtime_checkable
class ExpertwiseSource(WeightSource, Protocol):
    """A source that reads a layer's experts one by one, so that nobody needs to hold all of them."""

    def layer_without_experts(self, index: int) -> LayerWeights:
        """Return a layer whose stacks of experts are empty, [0, N, I]."""
        ...

    def expert(self, index: int, expert: int) -> ExpertWeights:
        """Return one expert of a layer, as stacks of one."""
        ...


def sliced(weights: Part, slices: Slices) -> Part:
    """Cut what a rank holds out of a whole part, as views of it."""
    named = dict(tensors(weights))
    return assemble(type(weights), {name: named[name][index_of(cuts)] for name, cuts in slices.items()})


def validate_embedding(weights: EmbeddingWeights, config: ModelConfig, shard: Shard | None = None) -> None:
    """Raise `WeightError` naming the first tensor that does not fit the config; likewise the two below."""
    shapes = embedding_shapes(config)
    _check(weights, sliced_shapes(shapes, embedding_slices(config, shard)) if shard else shapes, "embedding")


def validate_layer(weights: LayerWeights, config: ModelConfig, index: int, shard: Shard | None = None) -> None:
    layer = config.layers[index]
    shapes = layer_shapes(layer, config.hidden)
    _check(weights, sliced_shapes(shapes, layer_slices(config, index, shard)) if shard else shapes, f"layer {index}")


def validate_without_experts(weights: LayerWeights, config: ModelConfig, index: int) -> None:
    shapes = layer_shapes(config.layers[index], config.hidden)
    _check(weights, sliced_shapes(shapes, slices_without_experts(config, index)), f"layer {index}")


def validate_expert(weights: ExpertWeights, config: ModelConfig, index: int, expert: int) -> None:
    shapes = sliced_shapes(layer_shapes(config.layers[index], config.hidden), slices_of_expert(config, index, expert))
    named = {name.removeprefix(EXPERTS): shape for name, shape in shapes.items()}
    _check(weights, named, f"layer {index}, expert {expert}")


def experts_of(named: Mapping[str, Tensor]) -> ExpertWeights:
    """Put experts together from their tensors, which have the names that they have in a layer."""
    return assemble(ExpertWeights, {name.removeprefix(EXPERTS): tensor for name, tensor in named.items()})


def validate_head(weights: HeadWeights, config: ModelConfig, shard: Shard | None = None) -> None:
    shapes = head_shapes(config)
    _check(weights, sliced_shapes(shapes, head_slices(config, shard)) if shard else shapes, "head")


def tensors(weights: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a weights dataclass with its dotted name, in field order; absent ones are left out."""
    for field in fields(weights):
        value = getattr(weights, field.name)
        name = f"{prefix}{field.name}"
        if isinstance(value, Tensor):
            yield name, value
        elif value is not None:
            yield from tensors(value, f"{name}.")


def assemble(kind: type[Part], named: Mapping[str, Tensor]) -> Part:
    """The weights dataclass of that kind that holds these tensors, by their dotted names: `tensors` undone.

    What is not named is None. Raises `WeightError` for a tensor that is missing or has no place.

    >>> assemble(NormWeights, {"gain_M": torch.ones(2)}).bias_M is None
    True
    """
    part, left = _assembled(kind, dict(named), "")
    if left:
        raise WeightError(f"{next(iter(left))} has no place in {kind.__name__}; it holds {_field_names(kind)}")
    return part


def _assembled(kind: type[Part], named: dict[str, Tensor], prefix: str) -> tuple[Part, dict[str, Tensor]]:
    """The part whose tensors' names begin with the prefix, and the tensors that it did not take."""
    values: dict[str, Any] = {}
    plain: type = kind
    for field, wanted in _hints(plain).items():
        name = f"{prefix}{field}"
        inner = _kind_named(field, wanted, named, name)
        if inner is Tensor and name in named:
            values[field] = named.pop(name)
        elif inner is not Tensor and any(each.startswith(f"{name}.") for each in named):
            values[field], named = _assembled(inner, named, f"{name}.")
        elif NoneType not in get_args(wanted):
            raise WeightError(f"{name} is missing; {kind.__name__} holds {_field_names(kind)}")
    return kind(**values), named


def _kind_named(field: str, wanted: Any, named: Mapping[str, Tensor], name: str) -> Any:
    """Return the kind that the field holds: of several, the first with all that the tensors' names speak of."""
    kinds = [each for each in (get_args(wanted) or (wanted,)) if each is not NoneType]
    spoken = {each.removeprefix(f"{name}.").partition(".")[0] for each in named if each.startswith(f"{name}.")}
    return next((kind for kind in kinds if len(kinds) == 1 or spoken <= _hints(kind).keys()), kinds[0])


def _field_names(kind: type) -> str:
    return ", ".join(_hints(kind))


@cache
def _hints(kind: type) -> dict[str, Any]:
    """The type of each field; resolving names takes longer than filling them."""
    return get_type_hints(kind)


def _check(weights: Any, shapes: Shapes, where: str) -> None:
    found = dict(tensors(weights))
    for name in [*found, *shapes]:
        if (name in found) != (name in shapes):
            here, right = ("present", "absent") if name in found else ("absent", "present")
            raise WeightError(f"{where} {name} is {here}; by the config it must be {right}")
    for name, tensor in found.items():
        if tuple(tensor.shape) != shapes[name]:
            raise WeightError(
                f"{where} {name} has shape {list(tensor.shape)}; by the config it must be {list(shapes[name])}"
            )
        if is_buffer(name) and tensor.dtype is not torch.float64:
            raise WeightError(f"{where} {name} has dtype {tensor.dtype}; it must be torch.float64")
        if not tensor.is_floating_point():
            raise WeightError(f"{where} {name} has dtype {tensor.dtype}; it must be a float dtype")
