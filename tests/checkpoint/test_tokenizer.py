"""The trained model's tokenizer against a plain byte-pair encoder, transformers' conversion, and ids known by hand."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import regex
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers
from transformers import Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS, convert_gguf_tokenizer

from twinfer.checkpoint import Checkpoint, Tokenizer, open_model
from twinfer.checkpoint.builtin import BUILT_IN, cache_folder
from twinfer.checkpoint.fetch import fetched
from twinfer.checkpoint.fields import Fields
from twinfer.checkpoint.gguf import tokenizer as gguf_tokenizer
from twinfer.checkpoint.gguf.file import GgufFile
from twinfer.checkpoint.tokenizer import library_errors, read_tokenizer
from twinfer.spec.errors import CheckpointError, RequestError, TwinferError

PanicException = type("PanicException", (BaseException,), {})
"""What the library raises where its own code fails; its class cannot be imported."""

WORDS = """The| capital| of|France| don't|we'LL |12345| 3.14|  |x²|ⅷ|日本語|né|🦊🦊|'s| --|naïve|_a1b2|٣٤"""
ODDITIES = ["|", "\n\n", "\t", "\r\n", "\x00", "\u00a0", "\u3000 ", "e\u0301", "\u200d", "<|im", "_end|>", "<|im_end|>"]
UNSEEN = [0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)]
"""Bytes that this model has no token for."""

words = st.sampled_from([*WORDS.split("|"), *ODDITIES])
# from 0x40000 on, characters begin with unseen bytes
signs = st.characters(exclude_categories=["Cs"], max_codepoint=0x3FFFF, exclude_characters="\x04\x06\x13\x14\x16\x1d")
texts = st.one_of(st.lists(words, max_size=8).map("".join), st.text(signs))


@pytest.fixture(scope="module")
def model() -> Checkpoint:
    return open_model("smollm2")


@pytest.fixture(scope="module")
def metadata() -> dict[str, Any]:
    return GgufFile(fetched(BUILT_IN["smollm2"], cache_folder(), print)).take_metadata()


@pytest.fixture(scope="module")
def tokenizer(model: Checkpoint) -> Tokenizer:
    assert model.tokenizer is not None
    return model.tokenizer


class PlainEncoder:
    """Byte-pair encoding as its definition reads: of the pairs there are, join the one listed first, until none is."""

    def __init__(self, metadata: dict[str, Any]):
        self.ids = {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}
        merges = [tuple(line.split(" ")) for line in metadata["tokenizer.ggml.merges"]]
        self.rank = {pair: index for index, pair in enumerate(merges)}
        self.signs = bytes_to_unicode()
        kinds = metadata["tokenizer.ggml.token_type"]
        special = [token for token, kind in zip(self.ids, kinds, strict=True) if kind == 3]
        self.special = regex.compile("(" + "|".join(map(regex.escape, special)) + ")")
        self.numbers = regex.compile(r"(\p{N})")
        self.pieces = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

    def encode(self, text: str) -> list[int]:
        ids = []
        for part in self.special.split(text):
            if self.special.fullmatch(part):
                ids.append(self.ids[part])
            else:
                for stretch in self.numbers.split(part):
                    for piece in self.pieces.findall(stretch):
                        ids += [self.ids[token] for token in self.joined(piece)]
        return ids

    def joined(self, piece: str) -> list[str]:
        tokens = [self.signs[byte] for byte in piece.encode()]
        while pairs := [pair for pair in pairwise(tokens) if pair in self.rank]:
            left, right = min(pairs, key=self.rank.__getitem__)
            merged: list[str] = []
            for token in tokens:
                if merged and merged[-1] == left and token == right:
                    merged[-1] = left + right
                else:
                    merged.append(token)
            tokens = merged
        return tokens


@pytest.fixture(scope="module")
def plain(metadata: dict[str, Any]) -> PlainEncoder:
    return PlainEncoder(metadata)


@pytest.fixture(scope="module")
def converted(metadata: dict[str, Any]) -> tokenizers.Tokenizer:
    keys = {"tokenizer_type": "model", "pre_tokenizer_type": "pre", "tokens": "tokens", "merges": "merges"}
    keys |= {"token_type": "token_type"}
    described = {name: metadata[f"tokenizer.ggml.{key}"] for name, key in keys.items()}
    return convert_gguf_tokenizer("llama", described)[0]


def test_ids_known_by_hand(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    assert tokenizer.encode("<|im_start|>user\n") == [1, 4093, 198]
    assert tokenizer.encode("0123456789") == list(range(32, 42))  # every digit is a token of its own
    assert tokenizer.encode("") == []
    assert tokenizer.id_of("<|im_end|>") == 2
    assert tokenizer.id_of("no such token") is None
    assert tokenizer.size == 49152


def test_what_surrounds_the_tokenizer(model: Checkpoint) -> None:
    assert model.end_tokens == (2,)
    assert (model.special_tokens["bos_token"], model.special_tokens["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert model.chat_template is not None
    assert "<|im_start|>assistant" in model.chat_template


@settings(max_examples=300)
@given(text=texts)
def test_encoding_is_the_plain_encoders(tokenizer: Tokenizer, plain: PlainEncoder, text: str) -> None:
    assert tokenizer.encode(text) == plain.encode(text)


@settings(max_examples=100)
@given(text=texts.filter(lambda text: not regex.search(r"\p{N}", text)))
def test_encoding_is_transformers_where_no_number_is(
    tokenizer: Tokenizer, converted: tokenizers.Tokenizer, text: str
) -> None:
    """Its conversion of a GGUF file does not know that this model sets every digit apart; all else it does."""
    assert tokenizer.encode(text) == converted.encode(text).ids


@settings(max_examples=300)
@given(text=texts)
def test_decoding_undoes_encoding(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=200)
@given(data=st.data())
def test_a_stream_says_what_decoding_all_at_once_says(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """For any ids, also those whose bytes are no text. Low ids are drawn often: single bytes are among them."""
    ids = data.draw(st.lists(st.one_of(st.integers(0, 260), st.integers(0, tokenizer.size - 1)), max_size=20))
    stream = tokenizer.stream()
    assert "".join([stream.add(token) for token in ids]) + stream.finish() == tokenizer.decode(ids)


@settings(max_examples=200)
@given(text=texts.filter(lambda text: "\ufffd" not in text))
def test_a_stream_never_shows_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    """Every piece is whole characters, and a character is shown as soon as its last byte is there."""
    stream, ids, shown = tokenizer.stream(), tokenizer.encode(text), ""
    for count, token in enumerate(ids, start=1):
        shown += stream.add(token)
        assert "\ufffd" not in shown
        whole = tokenizer.decode(ids[:count])
        assert whole.endswith("\ufffd") or shown == whole
    assert shown == text
    assert stream.finish() == ""


def test_bytes_without_a_token_are_left_out(tokenizer: Tokenizer) -> None:
    signs = bytes_to_unicode()
    assert [byte for byte in range(256) if tokenizer.id_of(signs[byte]) is None] == sorted(UNSEEN)
    assert tokenizer.encode("a\x04 b") == [*tokenizer.encode("a"), *tokenizer.encode(" b")]


def test_surrogates_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="half a surrogate pair"):
        tokenizer.encode("a\ud800")


def described(tokens: list[str], merges: list[str], pre: str, **more: Any) -> Fields:
    values = {"model": "gpt2", "pre": pre, "tokens": tokens, "merges": merges, **more}
    return Fields({f"tokenizer.ggml.{name}": value for name, value in values.items()}, "m.gguf: ")


@pytest.mark.parametrize("kind", ["llama-bpe", "qwen2"])
@settings(max_examples=200)
@given(text=texts)
def test_text_is_cut_as_transformers_says(kind: str, text: str) -> None:
    theirs = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[kind]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    assert gguf_tokenizer.PRE_TOKENIZERS[kind](False).pre_tokenize_str(text) == theirs.pre_tokenize_str(text)


def test_qwen2_is_transformers_own() -> None:
    """Composed first, every digit apart."""
    signs = bytes_to_unicode()
    tokens = [*signs.values(), signs[0xC3] + signs[0xA9], "12"]
    ours = gguf_tokenizer.rebuilt(described(tokens, [f"{signs[0xC3]} {signs[0xA9]}", "1 2"], "qwen2"))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    theirs = Qwen2Tokenizer(vocab=vocabulary, merges=[(signs[0xC3], signs[0xA9]), ("1", "2")])
    assert ours is not None
    for text in ("e\u0301 \u00e9", "12 123", "IT'S it's\n\n  x"):
        assert ours.encode(text) == theirs.encode(text)
    assert ours.encode("e\u0301") == [len(signs)]


def test_llama3_takes_known_words_whole_and_begins_every_text() -> None:
    tokens = ["a", "b", "c", "bc", "abc", "<begin>", "<end>", "<user>"]
    kinds = [1, 1, 1, 1, 1, 3, 3, 4]
    more = {"token_type": kinds, "bos_token_id": 5, "eos_token_id": 6}
    llama3 = gguf_tokenizer.rebuilt(described(tokens, ["b c"], "llama-bpe", **more))
    gpt2 = gguf_tokenizer.rebuilt(described(tokens, ["b c"], "gpt-2", **more))
    ending = gguf_tokenizer.rebuilt(described(tokens, ["b c"], "gpt-2", **more, add_eos_token=True))
    assert llama3 is not None
    assert gpt2 is not None
    assert ending is not None
    assert llama3.encode("abc") == [5, 4]
    assert llama3.encode("abc", special=False) == [4]
    assert gpt2.encode("abc") == [0, 3]
    assert ending.encode("abc<user>") == [0, 3, 7, 6]
    assert gpt2.decode([5, 0, 7]) == "<begin>a<user>"


def test_a_file_without_tokenizer_gives_none() -> None:
    assert gguf_tokenizer.rebuilt(Fields({}, "m.gguf: ")) is None
    assert gguf_tokenizer.special_tokens(Fields({}, "m.gguf: ")) == {}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (described(["a"], [], "unheard-of"), "pre is 'unheard-of'; the ways to cut text known here are: gpt-2, smollm"),
        (described(["a", "b"], ["a b"], "gpt-2"), "merges holds 'a b'; each must be two tokens"),
        (described(["a", "b"], ["ab"], "gpt-2"), "merges holds 'ab'; each must be two tokens"),
        (described(["a", "b", "a"], [], "gpt-2"), "tokens holds 'a' twice"),
        (described(["a", "b"], [], "gpt-2", token_type=[1]), "token_type has 1 entries; it must have one for each of"),
        (
            described(["a"], [], "gpt-2", bos_token_id=1),
            "bos_token_id is 1; it must be below the vocabulary's size",
        ),
    ],
)
def test_tokenizers_that_cannot_be_rebuilt_are_refused(fields: Fields, message: str) -> None:
    with pytest.raises(TwinferError, match=r"tokenizer\.ggml") as caught:
        gguf_tokenizer.rebuilt(fields)
    assert message in str(caught.value)


def test_a_tokenizer_file_is_read_without_its_limits(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """tokenizer.json may cut or pad whatever it encodes, as it did in training; a prompt stays as it is."""
    limited = tokenizers.Tokenizer.from_str(tokenizer.inner.to_str())
    limited.enable_truncation(3)
    limited.enable_padding(length=9)
    again = Tokenizer(tokenizers.Tokenizer.from_str(limited.to_str()))
    assert again.encode("The capital of France is") == [504, 3575, 282, 4649, 314]


@pytest.mark.parametrize("token", ["a:b", "$B", "$A:1", "a b", "$", ":", "", "begin", "end"])
def test_special_tokens_may_hold_signs_of_the_librarys_templates(token: str) -> None:
    tokens = ["x", token, "y"]
    more = {"bos_token_id": 1, "eos_token_id": 2, "add_bos_token": True, "add_eos_token": True}
    rebuilt = gguf_tokenizer.rebuilt(described(tokens, [], "gpt-2", **more))
    assert rebuilt is not None
    assert rebuilt.encode("x") == [1, 0, 2]
    assert rebuilt.encode("x", special=False) == [0]
    again = Tokenizer(tokenizers.Tokenizer.from_str(rebuilt.inner.to_str()))
    assert again.encode("x") == [1, 0, 2]


@pytest.mark.parametrize("key", ["bos", "eos", "eot", "unknown", "padding"])
@pytest.mark.parametrize("none", [-1, 2**32 - 1])
def test_a_special_token_of_minus_one_is_none(key: str, none: int) -> None:
    """Also where it was written as an unsigned number."""
    fields = described(["x", "y"], [], "llama-bpe", **{f"{key}_token_id": none})
    rebuilt = gguf_tokenizer.rebuilt(fields)
    assert rebuilt is not None
    assert rebuilt.encode("x") == [0]
    assert gguf_tokenizer.special_tokens(fields) == {}
    assert gguf_tokenizer.end_tokens(fields, 2) == ()


def saved(folder: Path, **parts: Any) -> Path:
    """A tokenizer.json with these parts."""
    plain = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": []}
    plain |= dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder"))
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(plain | parts))
    return path


def test_a_word_without_a_token_is_refused_where_none_stands_for_it(tmp_path: Path) -> None:
    """The library raises a bare `Exception`; honest files come to that."""
    words = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}
    path = saved(tmp_path, model=words)
    tokenizer = read_tokenizer(path, "fetch it again")
    assert tokenizer.encode("a") == [0]
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot encode 'b' \(WordLevel error"):
        tokenizer.encode("b")


@pytest.mark.parametrize("ids", [[-1], [2**32], [2**70]])
def test_ids_that_no_tokenizer_has_are_refused(tokenizer: Tokenizer, ids: list[int]) -> None:
    with pytest.raises(RequestError, match=r"ids is \[.*\]; it must be a sequence of token ids"):
        tokenizer.decode(ids)


class Panicking:
    """A tokenizer of the library whose every step panics."""

    normalizer = decoder = None

    def __getattr__(self, name: str) -> Any:
        def panic(*given: Any, **named: Any) -> Any:
            raise PanicException("called `Option::unwrap()` on a\n`None` value")

        return (lambda: None) if name in ("no_truncation", "no_padding") else panic


def test_panics_are_refusals_and_interrupts_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A panic is no `Exception`; the interrupt of a user at the keyboard is none either, and stays what it is."""
    tokenizer = Tokenizer(Panicking(), "x/tokenizer.json")
    for step in (lambda: tokenizer.encode("a"), lambda: tokenizer.decode([1]), lambda: tokenizer.id_of("a")):
        with pytest.raises(CheckpointError, match=r"x/tokenizer\.json .*unwrap\(\)` on a `None` value"):
            step()
    with pytest.raises(KeyboardInterrupt), library_errors("x", "y"):
        raise KeyboardInterrupt


def test_a_tokenizer_that_panics_when_it_is_read(tmp_path: Path) -> None:
    """A byte-pair model whose merge has no token, a normalizer's pattern of nonsense, a prefix of no characters."""
    for model in (
        {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]},
        {"type": "WordPiece", "vocab": {}, "unk_token": 1},
        {"type": "Unigram", "vocab": [], "unk_id": 5},
    ):
        with pytest.raises(CheckpointError, match=r"tokenizer\.json is no tokenizer \(.*fetch it again"):
            read_tokenizer(saved(tmp_path, model=model), "fetch it again")


def test_errors_are_the_projects_own() -> None:
    with pytest.raises(CheckpointError):
        gguf_tokenizer.rebuilt(described(["a"], [], "unheard-of"))
