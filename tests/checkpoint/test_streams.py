"""Streams of tokens with decoders of every kind: made-up words, and what is shown after each token."""

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models

from twinfer.checkpoint import Tokenizer


@given(ids=st.lists(st.integers(0, 3), max_size=12))
def test_a_stream_keeps_the_spaces_between_words(ids: list[int]) -> None:
    """A decoder may drop the space before the first word; streamed, later words are not taken for first ones."""
    inner = tokenizers.Tokenizer(models.WordLevel({"\u2581a": 0, "b": 1, "\u2581c": 2, "\u2581": 3}, unk_token="b"))
    inner.decoder = decoders.Metaspace()
    tokenizer = Tokenizer(inner)
    assert tokenizer.decode([0, 1, 2]) == "ab c"
    stream = tokenizer.stream()
    assert "".join([stream.add(token) for token in ids]) + stream.finish() == tokenizer.decode(ids)


NAMES = [f"<0x{byte:02X}>" for byte in (0x0A, 0x41, 0xC3, 0xA9, 0xF0, 0x9F, 0xA6, 0x8A, 0xFF)]
NAMES += [
    "<0x+a>",
    "<0xe2>",
    "<0x0a>x",
    "a",
    "\u2581b",
    "\u2581",
    " ",
    "##c",
    ".",
    "ab</w>",
    "\ufffd",
    "|",
    "<pad>",
    "n't",
]
NAMES += ["\u00c3\u010a"]  # byte level: 0xC3, then a line end
LLAMA = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
DECODERS = {
    "none": None,
    "byte level": decoders.ByteLevel(),
    "byte fallback": decoders.ByteFallback(),
    "llama": decoders.Sequence(LLAMA),
    "gemma": decoders.Sequence(LLAMA[:3]),
    "unigram": decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
    "word piece": decoders.WordPiece(),
    "bpe": decoders.BPEDecoder(),
    "ctc": decoders.CTC(),
    "replace a pair": decoders.Replace("b.", "-"),
    "fuse, then replace a pair": decoders.Sequence([decoders.Fuse(), decoders.Replace("a.", "-")]),
    "fuse, then replace by pattern": decoders.Sequence([decoders.Fuse(), decoders.Replace(Regex("a+"), "-")]),
    "fuse, then bytes": decoders.Sequence([decoders.Fuse(), decoders.ByteFallback()]),
    "fuse, then byte level": decoders.Sequence([decoders.Fuse(), decoders.ByteLevel()]),
    "bpe, then bytes": decoders.Sequence(
        [decoders.Replace("x>", ">"), decoders.Replace("a>x", "A>"), decoders.ByteFallback()]
    ),
    "strip much": decoders.Sequence([*LLAMA[:3], decoders.Strip(" ", 15, 0)]),
    "strip more": decoders.Sequence([*LLAMA[:3], decoders.Strip(" ", 30, 0)]),
}


OFTEN = [NAMES.index(name) for name in ("a", ".", "\u2581", " ")]


@pytest.mark.parametrize("kind", DECODERS)
@settings(max_examples=80)
@given(ids=st.lists(st.integers(0, len(NAMES)) | st.integers(0, 8) | st.sampled_from(OFTEN), max_size=40))
@example(ids=[NAMES.index("a"), NAMES.index(".")])
@example(ids=[NAMES.index("a"), NAMES.index("a"), NAMES.index("|")])
@example(ids=[NAMES.index("<0x0A>"), NAMES.index("<0xF0>"), NAMES.index("<0x9F>")])
@example(ids=[NAMES.index("a"), *[NAMES.index("\u2581")] * 32])
@example(ids=[NAMES.index("<0xC3>"), NAMES.index("<0x0a>x"), NAMES.index("<0xC3>")])
def test_a_stream_keeps_its_promise_with_every_decoder(kind: str, ids: list[int]) -> None:
    """Pieces joined are what decoding all at once gives, also of byte-fallback tokens and of ids without a token."""
    inner = tokenizers.Tokenizer(models.WordLevel({name: index for index, name in enumerate(NAMES)}, unk_token="a"))
    if DECODERS[kind] is not None:
        inner.decoder = DECODERS[kind]
    tokenizer = Tokenizer(inner)
    stream, shown = tokenizer.stream(), ""
    for count, token in enumerate(ids, start=1):
        shown += stream.add(token)
        assert shown + stream.pending() == tokenizer.decode(ids[:count])
    assert shown + stream.finish() == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["byte level", "byte fallback", "llama", "gemma", "unigram", "word piece", "ctc"])
def test_a_stream_holds_back_no_letter(kind: str) -> None:
    """What no later token can change is shown at once; a run of bytes is shown when it ends."""
    inner = tokenizers.Tokenizer(models.WordLevel({name: index for index, name in enumerate(NAMES)}, unk_token="a"))
    inner.decoder = DECODERS[kind]
    stream = Tokenizer(inner).stream()
    letter, line = NAMES.index("a"), NAMES.index("<0x0A>")
    assert stream.add(letter) == "a"
    assert stream.add(letter) == ("" if kind == "ctc" else " a" if kind == "word piece" else "a")
    if Tokenizer(inner).falls_back:
        assert [stream.add(line), stream.add(line), stream.add(letter)] == ["", "", "\n\na"]
