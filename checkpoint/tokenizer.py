"""Text to token ids and back, whole or as a stream."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import tokenizers

from ..spec.errors import CheckpointError, RequestError, TwinferError

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What a decoder writes for bytes that are not, or not yet, a character."""


class Tokenizer:
    """A model's tokenizer. Special tokens written out in a text are recognized as what they are.

    `where` is the file that it came from. What a tokenizer cannot do, such as to write a word for which it has neither
    a token nor one for unknown words, raises a `CheckpointError` that names the file.
    """

    def __init__(self, inner: tokenizers.Tokenizer, where: str = "the tokenizer"):
        inner.no_truncation()
        inner.no_padding()
        self.inner = inner
        self.where = where

    @property
    def size(self) -> int:
        """How many token ids it knows, special ones included."""
        with library_errors(f"{self.where} cannot count its tokens", "use another tokenizer"):
            return int(self.inner.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The text's token ids.

        With `special`, also what the model wants around every text (for most, nothing or one begin token); without,
        the text's own alone, as is right for a rendered chat template, which writes those tokens itself.
        Bytes that the model has no token for are left out, as its makers' own tokenizer does.
        """
        if any("\ud800" <= sign <= "\udfff" for sign in text):
            raise RequestError(f"text {text[:40]!r} holds half a surrogate pair; it must be valid Unicode")
        with library_errors(f"{self.where} cannot encode {text[:40]!r}", "use another tokenizer"):
            return list(self.inner.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these tokens, special ones written out; bytes that are no character become U+FFFD."""
        with library_errors(f"{self.where} cannot decode {list(ids[:10])}", "use another tokenizer"):
            return str(self.inner.decode(list(ids), skip_special_tokens=False))

    def id_of(self, token: str) -> int | None:
        """The id of exactly this token, or None where there is none."""
        with library_errors(f"{self.where} cannot look up {token[:40]!r}", "use another tokenizer"):
            found: int | None = self.inner.token_to_id(token)
            return found

    def stream(self) -> "TokenStream":
        return TokenStream(self)


def read_tokenizer(path: Path, remedy: str) -> Tokenizer:
    """A tokenizer.json. Raises `CheckpointError`, with the remedy, where it is malformed."""
    content = path.read_bytes()
    with library_errors(f"{path} is no tokenizer", remedy):
        return Tokenizer(tokenizers.Tokenizer.from_buffer(content), str(path))


@contextmanager
def library_errors(what: str, remedy: str) -> Iterator[None]:
    """Raise `CheckpointError` for whatever the tokenizer library raises.

    That is `Exception` itself, or its `PanicException`, which is no `Exception` and may not be caught by name.
    """
    try:
        yield
    except (TwinferError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        raise CheckpointError(f"{what} ({' '.join(str(error).split())}); {remedy}") from None


class TokenStream:
    """Decodes token by token, and holds back what may still turn out to be half a character.

    Whatever `add` and then `finish` return, joined, is what `Tokenizer.decode` makes of all the ids at once.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0
        """Of the ids, how many are shown already; they stay so that a decoder sees what stood before."""

    def add(self, token: int) -> str:
        """The text that this token completes, which may be none."""
        self._ids.append(token)
        text = self._fresh()
        if text.endswith(_INCOMPLETE):
            return ""
        return self._show(text)

    def finish(self) -> str:
        """What is still held back: U+FFFD for bytes that became no character."""
        return self._show(self._fresh())

    def _fresh(self) -> str:
        before = self._tokenizer.decode(self._ids[: self._shown])
        return self._tokenizer.decode(self._ids)[len(before) :]

    def _show(self, text: str) -> str:
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        return text
