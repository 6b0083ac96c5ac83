"""The reference as a path: the `Decoder` protocol, each sequence of a batch computed alone.

A batch here is a loop. So there is no padding, no mask for padding and no position shared between sequences, and any
mistake that a batched path makes with them is a visible difference.

Shapes: B sequences, T_i new tokens of sequence i, W width of the hidden vectors that the head
reads (nearly always that of all), V vocabulary.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar, overload

import torch
from torch import Tensor

from ..spec.ambient import pinned
from ..spec.config import ModelConfig, Storage
from ..spec.decoder import Routes, Sequences, check_encoding, check_open, checked_tokens
from ..spec.errors import RequestError
from ..spec.moe import MoeConfig
from ..spec.shapes import is_buffer, is_matrix
from ..spec.weights import Part, WeightSource, assemble, tensors, validate_embedding, validate_head, validate_layer
from .cache import KVCache
from .components import DEFAULT, Components
from .decoder import DecoderWeights, empty_caches, forward
from .embedding import head_logits, scale_and_cap
from .quantize import stored
from .routing import Routing

COMPUTE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

P = ParamSpec("P")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, eq=False)
class _Sequence:
    caches: tuple[KVCache, ...]
    last_hidden_W: Tensor | None = None

    @property
    def length(self) -> int:
        return self.caches[0].length


class ReferenceSequences:
    """Sequences held open by a `ReferencePath`."""

    def __init__(self, owner: "ReferencePath", states: list[_Sequence]):
        self.owner = owner
        self._states: list[_Sequence] | None = states

    @property
    def states(self) -> list[_Sequence]:
        if self._states is None:
            raise RequestError("these sequences are closed; open new ones")
        return self._states

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(state.length for state in self.states)

    def close(self) -> None:
        self._states = None


def _pinned(
    method: Callable[Concatenate["ReferencePath", P], Result],
) -> Callable[Concatenate["ReferencePath", P], Result]:
    """Run the method within `spec.ambient.pinned`."""

    @functools.wraps(method)
    def call(path: "ReferencePath", /, *arguments: P.args, **options: P.kwargs) -> Result:
        with pinned(path.device):
            return method(path, *arguments, **options)

    return call


class ReferencePath:
    """The readable path: a `Decoder`, and an `Encoder`.

    Computes in `compute` on the matrices as they come back out of `storage`.

    Matrices are held in float32 (float64 where compute is), so that narrow arithmetic never rounds a weight twice.
    Raises `RequestError` for a compute dtype that is not in `COMPUTE_DTYPES`, and `WeightError` for weights that do
    not fit the config. What torch is set to where it is called (autocast, inference mode, default dtype or device)
    changes nothing.
    """

    def __init__(
        self,
        source: WeightSource,
        *,
        storage: Storage = Storage.FLOAT32,
        compute: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        components: Components = DEFAULT,
    ):
        if storage not in list(Storage):
            raise RequestError(f"storage is {storage!r}; it must be one of {', '.join(Storage)}")
        if compute not in COMPUTE_DTYPES:
            raise RequestError(f"compute is {compute}; the reference computes in one of {list(COMPUTE_DTYPES)}")
        self.config: ModelConfig = source.config
        self.device = torch.device(device)
        self.storage = Storage(storage)
        self.compute = compute
        self.components = components
        self.max_batch: int | None = None
        self.routes: Routes = []
        self.weights = self._read(source)

    def with_components(self, components: Components) -> "ReferencePath":
        """The same model with other components; the weights are shared."""
        other = copy.copy(self)
        other.components = components
        return other

    @_pinned
    def open(self, batch: int, reserve: int) -> ReferenceSequences:
        check_open(self.config, self.max_batch, batch, reserve)
        caches = empty_caches(1, self.config, self.compute, self.device)
        return ReferenceSequences(self, [_Sequence(caches)] * batch)

    @overload
    def extend(
        self, sequences: Sequences, new_tokens: Sequence[Tensor], *, every_position: Literal[False] = False
    ) -> Tensor: ...

    @overload
    def extend(
        self, sequences: Sequences, new_tokens: Sequence[Tensor], *, every_position: Literal[True]
    ) -> list[Tensor]: ...

    def extend(
        self, sequences: Sequences, new_tokens: Sequence[Tensor], *, every_position: bool = False
    ) -> Tensor | list[Tensor]:
        with pinned(self.device):
            hidden = self.extend_hidden(sequences, new_tokens)
            if every_position:
                return [self.logits(hidden_TW) for hidden_TW in hidden]
            return torch.stack([self.logits(_last_hidden(state)) for state in self._own(sequences).states])

    @_pinned
    def extend_hidden(self, sequences: Sequences, new_tokens: Sequence[Tensor]) -> list[Tensor]:
        """Extend, but stop before the head: the normalized hidden vectors of the new tokens, [T_i, W] each."""
        sequences = self._own(sequences)
        checked_tokens(self.config, sequences.lengths, new_tokens)
        states, hidden, routes = [], [], []
        for state, token_T in zip(sequences.states, new_tokens, strict=True):
            hidden_TW, caches, chosen = self._forward(token_T, state)
            routes.append(chosen)
            last_hidden_W = hidden_TW[-1] if len(token_T) else state.last_hidden_W
            states.append(_Sequence(caches, last_hidden_W))
            hidden.append(hidden_TW)
        sequences.states[:] = states
        self.routes = routes
        return hidden

    @_pinned
    def encode(self, tokens: Sequence[Tensor], types: Sequence[Tensor] | None = None) -> list[Tensor]:
        """The `Encoder` protocol: hidden vectors of whole texts, each computed alone."""
        check_encoding(self.config, tokens, types)
        start, hidden = empty_caches(1, self.config, self.compute, self.device), []
        for index, token_T in enumerate(tokens):
            type_BT = None if types is None else types[index].to(self.device)[None]
            token_BT, arithmetic = token_T.to(self.device)[None], (self.config, self.compute, self.components)
            hidden_BTW, _ = forward(token_BT, start, self.weights, *arithmetic, type_BT=type_BT)
            hidden.append(hidden_BTW[0])
        return hidden

    @_pinned
    def logits(self, hidden: Tensor) -> Tensor:
        """Score hidden vectors [..., W] from `extend_hidden`: [..., V]."""
        logits = head_logits(hidden, self.weights.projection, linear=self.components.linear)
        return scale_and_cap(logits, self.config.logit_scale, self.config.logit_softcap)

    def _own(self, sequences: Sequences) -> ReferenceSequences:
        if not isinstance(sequences, ReferenceSequences) or sequences.owner is not self:
            raise RequestError("the sequences were opened by another path; open them with this one")
        return sequences

    def _forward(self, token_T: Tensor, state: _Sequence) -> tuple[Tensor, tuple[KVCache, ...], list[Tensor]]:
        """Run one sequence; also returns its choices of experts, [T, k] for each layer that has some."""
        if len(token_T) == 0:
            hidden_TW = torch.empty(0, self.config.table_width, dtype=self.compute, device=self.device)
            mixtures = [layer.mlp for layer in self.config.layers if isinstance(layer.mlp, MoeConfig)]
            none = [torch.empty(0, each.router.top_k, dtype=torch.int64, device=self.device) for each in mixtures]
            return hidden_TW, state.caches, none
        chosen: list[Tensor] = []

        def route(*inputs: Any) -> Routing:
            routing = self.components.route(*inputs)
            chosen.append(routing.expert_TK)
            return routing

        arithmetic = (self.config, self.compute, replace(self.components, route=route))
        hidden_BTW, caches = forward(token_T.to(self.device)[None], state.caches, self.weights, *arithmetic)
        return hidden_BTW[0], caches, chosen

    @_pinned
    def _read(self, source: WeightSource) -> DecoderWeights:
        config = source.config
        embedding = source.embedding()
        validate_embedding(embedding, config)
        embedding = self._held(embedding)
        layers = []
        for index in range(len(config.layers)):
            layer = source.layer(index)
            validate_layer(layer, config, index)
            layers.append(self._held(layer))
        head = source.head()
        validate_head(head, config)
        return DecoderWeights(embedding=embedding, layers=tuple(layers), head=self._held(head))

    def _held(self, weights: Part) -> Part:
        """The weights with every matrix taken through storage, and every other tensor through float32.

        What was made for the model (angles a token) is float64 whatever the arithmetic.
        """

        def held(name: str, tensor: Tensor) -> Tensor:
            if is_buffer(name):
                return tensor.to(self.device)
            return self._matrix(tensor) if is_matrix(name) else self._vector(tensor)

        return assemble(type(weights), {name: held(name, tensor) for name, tensor in tensors(weights)})

    def _matrix(self, weight: Tensor) -> Tensor:
        """[N, I], or [E, N, I]: rows are quantized one by one, whichever expert they belong to."""
        return stored(weight.flatten(0, -2), self.storage, self._wide_dtype).view(weight.shape).to(self.device)

    def _vector(self, vector: Tensor) -> Tensor:
        return vector.to(torch.float32).to(device=self.device, dtype=self._wide_dtype)

    @property
    def _wide_dtype(self) -> torch.dtype:
        return torch.promote_types(self.compute, torch.float32)


def _last_hidden(state: _Sequence) -> Tensor:
    assert state.last_hidden_W is not None, "checked_tokens lets no sequence stay empty"
    return state.last_hidden_W
