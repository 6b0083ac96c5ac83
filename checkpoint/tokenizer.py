"""Text to token ids and back, whole or as a stream."""

import json
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers

from ..spec.errors import CheckpointError, RequestError, TwinferError
from .tokenizer_bounds import check_growth, check_sizes, decoder_steps, growing_steps

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What a decoder writes for bytes that are not, or not yet, a character."""

_BYTE = re.compile(r"<0x[0-9A-Fa-f+][0-9A-Fa-f]>")
"""Names that a byte-fallback decoder takes for bytes."""

_BYTE_SIGNS = frozenset("<>+x0123456789ABCDEFabcdef")

_KNOWN = ("ByteLevel", "ByteFallback", "Metaspace", "WordPiece", "BPEDecoder", "CTC", "Fuse", "Strip", "Replace")
"""Decoders of which is known what later tokens can change."""

CONTEXT = 16
"""Shown tokens that are decoded again with each new one: decoders treat the first token of a text otherwise."""


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
        self.decoder = _described(inner.decoder)
        """Its decoder as tokenizer.json describes it."""
        self._growing = growing_steps(_described(inner.normalizer))
        self.falls_back = any(step["type"] == "ByteFallback" for step in decoder_steps(self.decoder))

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
        check_growth(self._growing, text)
        with library_errors(f"{self.where} cannot encode {text[:40]!r}", "use another tokenizer"):
            return list(self.inner.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these tokens, special ones written out; bytes that are no character become U+FFFD."""
        given = reprlib.repr(ids)
        with library_errors(f"{self.where} cannot decode {given}", "use another tokenizer"):
            try:
                return str(self.inner.decode(list(ids), skip_special_tokens=False))
            except (OverflowError, TypeError):
                raise RequestError(f"ids is {given}; it must be a sequence of token ids") from None

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
        check_sizes(json.loads(content))
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


def _described(part: Any) -> dict[str, Any] | None:
    """Return a normalizer or decoder as tokenizer.json describes it."""
    return None if part is None else json.loads(part.__getstate__())


class TokenStream:
    """Decodes token by token, and holds back what later tokens may still change.

    Whatever `add` and then `finish` return, joined, is what `Tokenizer.decode` makes of all the ids at once. Held back
    are the end of a character, a run of byte-fallback tokens (`<0x0A>`, then `<0xF0>`, decode together to two
    replacement characters) until another token ends it, and all text where `changes_later` says so.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0
        """Of the ids, how many are shown already; they stay so that a decoder sees what stood before."""
        self._holds_all = changes_later(tokenizer.decoder)

    def add(self, token: int) -> str:
        """The text that this token completes, which may be none."""
        name = self._tokenizer.inner.id_to_token(token)
        if name is None:  # a decoder passes over it
            return ""
        self._ids.append(token)
        if self._holds_all or (self._tokenizer.falls_back and _BYTE.fullmatch(name)):
            return ""
        text = self.pending()
        if text.endswith(_INCOMPLETE):
            return ""
        return self._show(text)

    def pending(self) -> str:
        """What `finish` would return now."""
        before = self._tokenizer.decode(self._ids[: self._shown])
        return self._tokenizer.decode(self._ids)[len(before) :]

    def finish(self) -> str:
        """What is still held back: U+FFFD for bytes that became no character."""
        return self._show(self.pending())

    def _show(self, text: str) -> str:
        self._ids = self._ids[-max(CONTEXT, len(self._ids) - self._shown) :]
        self._shown = len(self._ids)
        return text


def changes_later(decoder: Mapping[str, Any] | None) -> bool:
    """Return whether a decoder, as JSON, may change text that is complete once further tokens come.

    True for what works on all the text at once and looks at more than one character, and for what is not known here:

        >>> changes_later({"type": "Replace", "pattern": {"String": "ab"}, "content": "c"})  # inside one token
        False
        >>> fuse = {"type": "Fuse"}
        >>> changes_later({"type": "Sequence", "decoders": [fuse, {"type": "Metaspace"}]})
        False
        >>> replace = {"type": "Replace", "pattern": {"String": "ab"}, "content": "c"}
        >>> changes_later({"type": "Sequence", "decoders": [fuse, replace]})
        True
    """
    joined = renamed = False
    for step in decoder_steps(decoder):
        kind = step["type"]
        if kind not in _KNOWN:
            return True
        one_sign = kind == "Replace" and len(step["pattern"].get("String", "")) == 1
        if joined and not (one_sign or kind in ("Fuse", "Metaspace") or _strips_little(step)):
            return True
        if kind == "ByteFallback" and renamed:  # then a token's name does not tell whether it is a byte
            return True
        joined = joined or kind in ("Fuse", "ByteLevel")
        renamed = renamed or not (
            one_sign and step["pattern"]["String"] not in _BYTE_SIGNS and "<" not in step["content"]
        )
    return False


def _strips_little(step: Mapping[str, Any]) -> bool:
    return step["type"] == "Strip" and int(step["start"]) < CONTEXT
