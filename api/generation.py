"""The generation loop: prompts in, a stream of events out, for any path.

A prompt is a long extension, each further token an extension by one; rows that have stopped are given nothing. What a
prompt yields depends on the prompt, its index and the seed alone, never on what it is batched with.

Shapes: B prompts, V vocabulary, T tokens so far.
"""

import time
from collections import deque
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from twinfer.reference.sampling import Sampling, generator_for, next_token
from twinfer.spec.ambient import CPU, pinned
from twinfer.spec.config import ModelConfig
from twinfer.spec.decoder import Decoder, Queued, Sequences, check_extensible, check_open
from twinfer.spec.errors import RequestError

from .chat import as_ids, check_several
from .text import StopWatch, TextStream

GREEDY = Sampling()
Item = TypeVar("Item")


class Stop(StrEnum):
    """Why a sequence ended."""

    END = "end"
    """An end token came; it is the last of the ids, and not in the text."""
    LENGTH = "length"
    """`max_new_tokens` are there."""
    STOP = "stop"
    """The text came to hold a stop string; the text ends before it, the ids hold the tokens that spelled it."""


class Streams(Protocol):
    """What the loop needs of a tokenizer."""

    def stream(self) -> TextStream: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One new token of one prompt."""

    prompt: int
    """Which prompt, counted from 0."""
    token: int
    text: str
    """The text that this token settled: nothing while it may still be part of a character or of a stop string."""
    stop: Stop | None
    """Set on the prompt's last event."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """All that one prompt yielded."""

    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    """The new tokens, the end token included if it came."""
    text: str | None
    """None where no tokenizer was given."""
    stop: Stop


@dataclass(slots=True, kw_only=True)
class Timings:
    """Seconds spent extending and choosing, and for how many tokens; time that the consumer takes is not counted.

    Prefill runs from the prompts to the first new token of each; decode is everything after it.
    """

    prefill_s: float = 0.0
    prefill_tokens: int = 0
    """Prompt tokens, over the whole batch."""
    decode_s: float = 0.0
    decode_tokens: int = 0
    """New tokens without the first of each prompt, over the whole batch."""

    @property
    def prefill_tokens_per_s(self) -> float | None:
        return self.prefill_tokens / self.prefill_s if self.prefill_tokens else None

    @property
    def decode_tokens_per_s(self) -> float | None:
        return self.decode_tokens / self.decode_s if self.decode_tokens else None


class Generation:
    """Iterate for events as they come; `outputs()` runs what is left and returns the whole.

    Memory for the sequences is taken when the first event is asked for, and given back after the last or by `close`.
    """

    def __init__(self, decoder: Decoder, rows: "Sequence[_Row]", reserve: int):
        self._rows = rows
        self.timings = Timings()
        self._events = _run(decoder, rows, reserve, self.timings)

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        return next(self._events)

    def outputs(self) -> list[Output]:
        for _ in self._events:
            pass
        return [row.output() for row in self._rows]

    def close(self) -> None:
        self._events.close()


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    end_tokens: Collection[int] = (),
    stop: Sequence[str] = (),
    sampling: Sampling = GREEDY,
    seed: int = 0,
    tokenizer: Streams | None = None,
    numbers: Sequence[int] | None = None,
) -> Generation:
    """Extend each prompt (token ids) until an end token, a stop string, or `max_new_tokens`.

    `numbers` are those of the prompts, by which draws differ; by default 0, 1, 2, ...

    Without a tokenizer there is no text, and no stop strings. Raises `RequestError`, before anything is allocated,
    for a prompt that is empty, holds an id outside the vocabulary, or has no room for the new tokens in the model's
    context; for more prompts than the path holds open; and for stop strings that are empty or without a tokenizer.
    """
    check_prompts(decoder.config, prompts, max_new_tokens)
    check_stops(stop, tokenizer)
    reserve = max(len(prompt) for prompt in prompts) + max_new_tokens
    check_open(decoder.config, decoder.max_batch, len(prompts), reserve)
    rows = [
        _Row(
            index=index,
            prompt_ids=tuple(as_ids(f"prompt {index}", prompt)),
            limit=max_new_tokens,
            end_tokens=frozenset(end_tokens),
            sampling=sampling,
            generator=generator_for(seed, index if numbers is None else numbers[index]),
            text=None if tokenizer is None else StopWatch(tokenizer.stream(), stop),
        )
        for index, prompt in enumerate(prompts)
    ]
    return Generation(decoder, rows, reserve)


class _Row:
    """One prompt on its way."""

    def __init__(
        self,
        *,
        index: int,
        prompt_ids: tuple[int, ...],
        limit: int,
        end_tokens: frozenset[int],
        sampling: Sampling,
        generator: torch.Generator,
        text: StopWatch | None,
    ):
        self.index = index
        self.prompt_ids = prompt_ids
        self.ids: list[int] = []
        self.stop: Stop | None = None
        self._limit = limit
        self._end_tokens = end_tokens
        self._sampling = sampling
        self._generator = generator
        self._text = text
        self._pieces: list[str] = []

    def take(self, logits_V: Tensor) -> Event:
        """Choose the next token and see whether it was the last."""
        previous_T = torch.tensor([*self.prompt_ids, *self.ids], device="cpu")
        token = next_token(logits_V, previous_T, self._sampling, self._generator)
        self.ids.append(token)
        piece, stopped = "", False
        if self._text is not None and token not in self._end_tokens:
            piece, stopped = self._text.add(token)
        self.stop = self._why(token, stopped)
        if self._text is not None and self.stop in (Stop.END, Stop.LENGTH):
            piece += self._text.rest()
        self._pieces.append(piece)
        return Event(prompt=self.index, token=token, text=piece, stop=self.stop)

    def due(self) -> Tensor:
        """The tokens to extend by next: the prompt, then the newest token, then nothing."""
        if self.stop is not None:
            return torch.empty(0, dtype=torch.int64, device="cpu")
        return torch.tensor(self.ids[-1:] or self.prompt_ids, device="cpu")

    def output(self) -> Output:
        if self.stop is None:
            raise RequestError(f"prompt {self.index} was abandoned before it ended; its output is incomplete")
        text = None if self._text is None else "".join(self._pieces)
        return Output(prompt_ids=self.prompt_ids, ids=tuple(self.ids), text=text, stop=self.stop)

    def _why(self, token: int, stopped: bool) -> Stop | None:
        if token in self._end_tokens:
            return Stop.END
        if stopped:
            return Stop.STOP
        return Stop.LENGTH if len(self.ids) == self._limit else None


def _run(decoder: Decoder, rows: Sequence[_Row], reserve: int, timings: Timings) -> Generator[Event]:
    """Extend all rows until each has stopped, as many micro-batches of them at a time as the path has use for.

    What has its next tokens is queued again at once, without waiting for the others: the paper's dynamic queue.
    """
    with ExitStack() as stack:
        waiting = deque[_MicroBatch]()
        for some in micro_batches(rows, decoder.in_flight if isinstance(decoder, Queued) else 1):
            sequences = decoder.open(len(some), reserve)
            stack.callback(sequences.close)
            waiting.append(_MicroBatch(decoder, sequences, some))
        timings.prefill_tokens = sum(len(row.prompt_ids) for row in rows)
        start = time.perf_counter()
        for each in waiting:
            each.submit()
        while waiting:
            prefilling = not all(row.ids for row in rows)
            ready = waiting.popleft()
            events, first = ready.collect(), not ready.began
            ready.began = True
            if not ready.ended:
                ready.submit()
                waiting.append(ready)
            seconds = time.perf_counter() - start
            if prefilling:
                timings.prefill_s += seconds
            else:
                timings.decode_s += seconds
            timings.decode_tokens += 0 if first else len(events)
            yield from events
            start = time.perf_counter()


def micro_batches(rows: Sequence[Item], most: int) -> list[Sequence[Item]]:
    """Divide rows into at most so many runs of neighbors, as even as can be.

    >>> micro_batches("abcde", 2), micro_batches("ab", 3)
    (['abc', 'de'], ['a', 'b'])
    """
    count = min(most, len(rows))
    bounds = [place * (len(rows) // count) + min(place, len(rows) % count) for place in range(count + 1)]
    return [rows[begin:end] for begin, end in pairwise(bounds)]


class _MicroBatch:
    """Rows that are extended together."""

    def __init__(self, decoder: Decoder, sequences: Sequences, rows: Sequence[_Row]) -> None:
        self.began = False
        self._decoder, self._sequences, self._rows = decoder, sequences, rows
        self._due: list[Tensor] = []
        self._ticket: object = None

    @property
    def ended(self) -> bool:
        return all(row.stop is not None for row in self._rows)

    def submit(self) -> None:
        """Begin to extend every row that has not stopped by what is due; a path that cannot begin does it later."""
        self._due = [row.due() for row in self._rows]
        if isinstance(self._decoder, Queued):
            self._ticket = self._decoder.submit(self._sequences, self._due)

    def collect(self) -> list[Event]:
        """Let each row that has not stopped choose its next token."""
        if isinstance(self._decoder, Queued):
            logits = self._decoder.collect(self._ticket)
        else:
            logits = self._decoder.extend(self._sequences, self._due)
        assert isinstance(logits, Tensor)
        logits_BV = logits.cpu()
        with pinned(CPU):
            return [row.take(logits_V) for row, logits_V in zip(self._rows, logits_BV, strict=True) if row.stop is None]


def check_prompts(config: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raise `RequestError` unless `generate` may be given these; needs no decoder, so ask it early."""
    check_extensible(config)
    check_several("prompts", prompts)
    if not prompts:
        raise RequestError("there are 0 prompts; give at least one")
    if max_new_tokens < 1:
        raise RequestError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    for index, prompt in enumerate(prompts):
        ids = as_ids(f"prompt {index}", prompt)
        if not ids:
            raise RequestError(f"prompt {index} is empty; it must hold at least one token")
        if len(prompt) + max_new_tokens > config.context:
            left = config.context - len(prompt)
            raise RequestError(
                f"prompt {index} has {len(prompt)} tokens, and {max_new_tokens} new ones would make "
                f"{len(prompt) + max_new_tokens}; the model's context is {config.context}: "
                + (f"ask for at most {left} new tokens, or shorten the prompt" if left > 0 else "shorten the prompt")
            )
        for token in ids:
            if not 0 <= token < config.vocabulary:
                raise RequestError(
                    f"prompt {index} holds token id {token}; ids run from 0 to {config.vocabulary - 1} in this model"
                )


def check_stops(stop: Sequence[str], tokenizer: Streams | None) -> None:
    """Raise `RequestError` unless these can be found in the text."""
    if isinstance(stop, str):
        raise RequestError(f"stop is the string {stop!r}; it must be a sequence of strings, such as [{stop!r}]")
    for string in stop:
        if not isinstance(string, str):
            raise RequestError(f"stop holds {string!r}; it must hold strings")
    if stop and tokenizer is None:
        raise RequestError(f"stop is {list(stop)!r}, but without a tokenizer there is no text to find it in")
    if "" in stop:
        raise RequestError("stop holds an empty string, which every text holds; give strings of at least one character")
