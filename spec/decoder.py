"""What a path is: something that can extend sequences. Also the contract's checks, the same for every path.

A prompt is a long extension, a decode step an extension by one token; chunked prefill, chat turns and the
verification of drafted tokens need nothing more.

Shapes: B sequences, V vocabulary, T_i new tokens of sequence i.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Any, Literal, Protocol, overload, runtime_checkable

import torch
from torch import Tensor

from .config import ModelConfig
from .errors import RequestError


class Path(StrEnum):
    """The implementations of the `Decoder` protocol."""

    REFERENCE = "reference"
    COMPILED = "compiled"
    OFFLOAD = "offload"
    """The compiled programs, with weights that are streamed from a store."""


class Sequences(Protocol):
    """Token sequences that a path holds open, with whatever it remembers of them."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many tokens each sequence holds so far."""
        ...

    def close(self) -> None:
        """Give back the memory. Extending closed sequences raises `RequestError`; closing twice does nothing."""
        ...


class Decoder(Protocol):
    """A model on a device, ready to extend sequences."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def max_batch(self) -> int | None:
        """The most sequences it can hold open at a time; None where only memory limits them."""
        ...

    def open(self, batch: int, reserve: int) -> Sequences:
        """Start `batch` empty sequences with room for `reserve` tokens each; more is allowed later, at a cost.

        Raises `RequestError` where batch < 1, batch > max_batch, or reserve is not in 1 .. config.context.
        """
        ...

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
        """Append tokens to the sequences and return the logits that follow.

        `new_tokens` holds one 1-D integer tensor for each sequence, of any lengths, zero included. Returns [B, V],
        the logits after each sequence's last token; a sequence given nothing repeats its last row. With
        `every_position`, one [T_i, V] for each sequence, the logits after each of its new tokens. Logits are on the
        path's device, float32 (float64 where the path computes in float64), owned by the caller: later calls leave
        them alone.

        Raises `RequestError`, and changes nothing, where `checked_tokens` does.
        """
        ...


Routes = list[list[Tensor]]
"""The chosen experts: for each sequence, for each layer that has experts in the order of layers, int64 [T_i, k]."""


@runtime_checkable
class Routed(Protocol):
    """A decoder that reports which experts it chose. Nothing but the attribute is asked of it.

    Two sequences were given 3 tokens and 1, in a model whose one mixture chooses 2 of 4 experts a token:

        path.routes == [[tensor([[1, 3], [0, 2], [3, 1]])], [tensor([[2, 0]])]]
    """

    @property
    def routes(self) -> Routes:
        """The choices of the last `extend`: each new token's, its best expert first; [0, k] for none."""
        ...


@runtime_checkable
class Queued(Protocol):
    """A decoder that works on several calls at a time: `extend` in two halves.

    Calls that are submitted together are for different sequences, and are collected in the order of their submission.
    """

    @property
    def in_flight(self) -> int:
        """How many calls it has use for at a time: the stages of a pipeline."""
        ...

    def submit(self, sequences: Sequences, new_tokens: Sequence[Tensor], *, every_position: bool = False) -> object:
        """Begin an extension, and return what `collect` takes. Raises as `Decoder.extend`."""
        ...

    def collect(self, ticket: Any) -> Tensor | list[Tensor]:
        """Wait for the logits of an extension that was submitted."""
        ...


@runtime_checkable
class Encoder(Protocol):
    """A model that reads whole texts."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def device(self) -> torch.device: ...

    def encode(self, tokens: Sequence[Tensor], types: Sequence[Tensor] | None = None) -> list[Tensor]:
        """The hidden vectors behind the last layer (and final norm), [T_i, M] for each text's 1-D tensor of ids.

        `types` says of each token which of the model's token types it is; without it, all are of the first. Raises
        `RequestError` where `check_encoding` does.
        """
        ...


def check_extensible(config: ModelConfig) -> None:
    """Raise `RequestError` for a model that cannot continue a text."""
    if not config.extensible:
        raise RequestError(
            f"this {config.family} model sees later tokens or has no head, so no text can be continued with it; "
            "encode whole texts instead"
        )


def check_open(config: ModelConfig, max_batch: int | None, batch: int, reserve: int) -> None:
    """Raise `RequestError` unless `Decoder.open` may be called so."""
    check_extensible(config)
    if batch < 1:
        raise RequestError(f"batch is {batch}; it must be at least 1")
    if max_batch is not None and batch > max_batch:
        raise RequestError(f"batch is {batch}; this path holds at most {max_batch} sequences open")
    if not 1 <= reserve <= config.context:
        raise RequestError(f"reserve is {reserve} tokens; it must be from 1 to the model's context of {config.context}")


def checked_tokens(config: ModelConfig, lengths: Sequence[int], new_tokens: Sequence[Tensor]) -> list[list[int]]:
    """The token ids, unless sequences of these lengths may not be extended by them: then raise `RequestError`.

    Refused: another number of tensors than sequences; a tensor that is not 1-D or not of integers; a token id
    outside the vocabulary; a sequence longer than the context; nothing given to a sequence that holds nothing.
    """
    if len(new_tokens) != len(lengths):
        raise RequestError(
            f"new_tokens holds {len(new_tokens)} tensors; it must hold one for each of the {len(lengths)} sequences"
        )
    ids = []
    for index, (length, tokens) in enumerate(zip(lengths, new_tokens, strict=True)):
        if tokens.ndim != 1 or tokens.dtype not in (torch.int32, torch.int64):
            raise RequestError(
                f"new_tokens[{index}] is {tokens.ndim}-D of {tokens.dtype}; it must be 1-D of int64 or int32"
            )
        if length + len(tokens) == 0:
            raise RequestError(f"sequence {index} holds no token and is given none; give it at least one")
        if length + len(tokens) > config.context:
            raise RequestError(
                f"sequence {index} would hold {length} + {len(tokens)} tokens; the model's context is {config.context}"
            )
        ids.append(tokens.tolist())
        wrong = next((token for token in ids[-1] if not 0 <= token < config.vocabulary), None)
        if wrong is not None:
            raise RequestError(
                f"sequence {index} is given token id {wrong}; ids run from 0 to {config.vocabulary - 1} in this model"
            )
    return ids


def check_encoding(config: ModelConfig, tokens: Sequence[Tensor], types: Sequence[Tensor] | None) -> None:
    """Raise `RequestError` unless `Encoder.encode` may be called so; texts are checked as sequences that begin."""
    checked_tokens(config, [0] * len(tokens), tokens)
    if types is None:
        return
    if [each.shape for each in types] != [each.shape for each in tokens]:
        raise RequestError("types must hold, for each text, as many integers as the text has tokens")
    for index, type_T in enumerate(types):
        if type_T.dtype not in (torch.int32, torch.int64):
            raise RequestError(f"types[{index}] is of {type_T.dtype}; it must be of int64 or int32")
        if not 0 <= int(type_T.min()) <= int(type_T.max()) < config.token_types:
            raise RequestError(
                f"types[{index}] holds values from {int(type_T.min())} to {int(type_T.max())}; "
                f"this model has {config.token_types} token types, counted from 0"
            )
