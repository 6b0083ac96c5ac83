"""The tokenizer that a GGUF file describes in its metadata, rebuilt with the `tokenizers` library.

Byte-level BPE: text is cut into pieces by rules that the file only names, each piece is written as bytes (every byte
as one printable character), and the listed merges join the characters into tokens.
"""

from collections.abc import Callable
from enum import IntEnum
from functools import partial

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from ...spec.errors import CheckpointError
from ..fields import Fields
from ..tokenizer import Tokenizer, library_errors


class TokenType(IntEnum):
    """What `tokenizer.ggml.token_type` says of each token, as far as it matters here."""

    CONTROL = 3
    USER_DEFINED = 4


def _gpt2(add_prefix_space: bool) -> pre_tokenizers.PreTokenizer:
    """English contractions, then runs of letters, of digits, of other signs, each with one space before it."""
    return pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=True)


def _smollm(add_prefix_space: bool) -> pre_tokenizers.PreTokenizer:
    """As GPT-2's, after every digit has been set apart."""
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2(add_prefix_space)])


def _with_digits(digits: str, add_prefix_space: bool) -> pre_tokenizers.PreTokenizer:
    """As GPT-2's, but contractions in either case, line ends with what stands before them, and digits so many."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # contractions in either case
        r"|[^\r\n\p{L}\p{N}]?\p{L}+"  # letters, with one sign or space before them
        rf"|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*"  # other signs, with a space before and line ends after
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=False)]
    )


_llama3 = partial(_with_digits, r"\p{N}{1,3}")
_qwen2 = partial(_with_digits, r"\p{N}")


PRE_TOKENIZERS: dict[str, Callable[[bool], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": _gpt2,
    "smollm": _smollm,
    "llama-bpe": _llama3,
    "llama3": _llama3,
    "qwen2": _qwen2,
}
"""By the name that `tokenizer.ggml.pre` gives."""

WHOLE_WORDS = {"llama-bpe", "llama3"}
"""Those under which a piece that is itself a token is taken whole, whatever the merges say."""

NORMALIZERS = {"qwen2": normalizers.NFC()}
"""What is done to a text first: the models were trained on composed characters."""

BEGIN_BY_DEFAULT = {"llama-bpe", "llama3"}
"""Those that put the begin token before every text unless the file says otherwise."""


NO_TOKEN = (-1, 2**32 - 1)
"""What some write where a model has no such token: minus one, and its bits read as unsigned."""


class UnknownKind(CheckpointError):
    """A tokenizer that is not known how to rebuild; nothing is wrong with it."""


def rebuilt(metadata: Fields) -> Tokenizer | None:
    """The tokenizer, or None where the file carries none.

    Raises `UnknownKind`, or another `CheckpointError` for one that is damaged.
    """
    if not metadata.has("tokenizer.ggml.model"):
        return None
    kind = metadata.text("tokenizer.ggml.model")
    if kind != "gpt2":
        raise UnknownKind(
            f"{metadata.where}tokenizer.ggml.model is {kind!r}; the kinds known here are: gpt2 (byte-level BPE)"
        )
    pre = metadata.text("tokenizer.ggml.pre", "gpt-2")
    if pre not in PRE_TOKENIZERS:
        raise UnknownKind(
            f"{metadata.where}tokenizer.ggml.pre is {pre!r}; the ways to cut text known here are: "
            + ", ".join(PRE_TOKENIZERS)
        )
    with library_errors(f"{metadata.where}the tokenizer cannot be rebuilt", "fetch the file again"):
        return _rebuilt(metadata, pre)


def _rebuilt(metadata: Fields, pre: str) -> Tokenizer:
    tokens = metadata.texts("tokenizer.ggml.tokens")
    inner = tokenizers.Tokenizer(
        models.BPE(
            vocab=_vocabulary(tokens, metadata.where),
            merges=_merges(metadata, set(tokens)),
            ignore_merges=pre in WHOLE_WORDS,
        )
    )
    inner.pre_tokenizer = PRE_TOKENIZERS[pre](metadata.flag("tokenizer.ggml.add_space_prefix", False))
    if pre in NORMALIZERS:
        inner.normalizer = NORMALIZERS[pre]
    inner.decoder = decoders.ByteLevel()
    _add_special(inner, tokens, metadata)
    _surround(inner, tokens, metadata, pre in BEGIN_BY_DEFAULT)
    return Tokenizer(inner, f"{metadata.where}the tokenizer")


def special_tokens(metadata: Fields) -> dict[str, str]:
    """The tokens that chat templates speak of by name, as far as the file has them."""
    if not metadata.has("tokenizer.ggml.tokens"):
        return {}
    tokens = metadata.texts("tokenizer.ggml.tokens")
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    found = {}
    for name, key in keys.items():
        token = _token_id(metadata, f"tokenizer.ggml.{key}_token_id", len(tokens))
        if token is not None:
            found[name] = tokens[token]
    return found


def end_tokens(metadata: Fields, vocabulary: int) -> tuple[int, ...]:
    """The tokens that end a text: of the whole of it, of a turn, of a message."""
    keys = [f"tokenizer.ggml.{key}_token_id" for key in ("eos", "eot", "eom")]
    found = [_token_id(metadata, key, vocabulary) for key in keys]
    return tuple(dict.fromkeys(token for token in found if token is not None))


def _vocabulary(tokens: list[str], where: str) -> dict[str, int]:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        twice = next(token for index, token in enumerate(tokens) if vocabulary[token] != index)
        raise CheckpointError(f"{where}tokenizer.ggml.tokens holds {twice!r} twice; every token must differ")
    return vocabulary


def _merges(metadata: Fields, tokens: set[str]) -> list[tuple[str, str]]:
    merges = []
    for line in metadata.texts("tokenizer.ggml.merges"):
        left, space, right = line.partition(" ")
        if not space or not {left, right, left + right} <= tokens:
            raise CheckpointError(
                f"{metadata.where}tokenizer.ggml.merges holds {line!r}; each must be two tokens, a space between them, "
                "that join into a third"
            )
        merges.append((left, right))
    return merges


def _add_special(inner: tokenizers.Tokenizer, tokens: list[str], metadata: Fields) -> None:
    types = metadata.integers("tokenizer.ggml.token_type")
    if types and len(types) != len(tokens):
        raise CheckpointError(
            f"{metadata.where}tokenizer.ggml.token_type has {len(types)} entries; it must have one for each of the "
            f"{len(tokens)} tokens"
        )
    typed = list(zip(tokens, types, strict=True)) if types else []
    control = [AddedToken(token, normalized=False, special=True) for token, kind in typed if kind == TokenType.CONTROL]
    user = [AddedToken(token, normalized=False) for token, kind in typed if kind == TokenType.USER_DEFINED]
    inner.add_special_tokens(control)
    inner.add_tokens(user)


def _surround(inner: tokenizers.Tokenizer, tokens: list[str], metadata: Fields, begin_by_default: bool) -> None:
    """Have every text begin and end as the file says."""
    template = ["$A"]
    used: list[tuple[str, int]] = []
    begin = _token_id(metadata, "tokenizer.ggml.bos_token_id", len(tokens))
    end = _token_id(metadata, "tokenizer.ggml.eos_token_id", len(tokens))
    if begin is not None and metadata.flag("tokenizer.ggml.add_bos_token", begin_by_default):
        template, used = ["begin", *template], [*used, ("begin", begin)]
    if end is not None and metadata.flag("tokenizer.ggml.add_eos_token", False):
        template, used = [*template, "end"], [*used, ("end", end)]
    if used:
        inner.post_processor = processors.TemplateProcessing(
            single=template,  # by names of our own: in a template, $ and : have a meaning, and tokens may hold them
            special_tokens=[{"id": name, "ids": [token], "tokens": [tokens[token]]} for name, token in used],
        )


def _token_id(metadata: Fields, key: str, vocabulary: int) -> int | None:
    if not metadata.has(key):
        return None
    if metadata.values[key] in NO_TOKEN:
        return None
    token = metadata.integer(key, least=0)
    if token >= vocabulary:
        raise metadata.wrong(key, f"below the vocabulary's size of {vocabulary}")
    return token
