"""The built-in trained encoder, beside transformers reading the same files."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, BertModel

import twinfer
from twinfer.checkpoint.builtin import BUILT_IN, cache_folder
from twinfer.checkpoint.fetch import fetched
from twinfer.commands.main import main
from twinfer.compiled.path import CompiledPath
from twinfer.oracle.budget import judge_rows
from twinfer.oracle.paths import WHOLE_MODEL
from twinfer.spec.decoder import Encoder
from twinfer.spec.errors import RequestError

README = Path(__file__).parents[2] / "README.md"
PAIRS = [
    ("How do I reset my password?", "I forgot my password and need a new one."),
    ("The cat sleeps on the sofa.", "A kitten naps on the couch."),
    ("Stocks fell sharply on Monday.", "Preheat the oven to 200 degrees."),
]
TEXTS = [text for pair in PAIRS for text in pair]
AGREEMENT = 1e-9
"""Of two float64 computations of one model, as in tests/families."""


@pytest.fixture(scope="module")
def folder() -> Path:
    return fetched(BUILT_IN["minilm"], cache_folder(), print)


@pytest.fixture(scope="module")
def ids(folder: Path) -> list[list[int]]:
    return [list(each) for each in AutoTokenizer.from_pretrained(folder)(TEXTS, padding=False)["input_ids"]]


@pytest.fixture(scope="module")
def exact() -> twinfer.Model:
    return twinfer.load("minilm", "reference", compute="float64")


@pytest.fixture(scope="module")
def eager() -> twinfer.Model:
    return twinfer.load("minilm", "reference")


@pytest.fixture(scope="module")
def theirs(folder: Path) -> BertModel:
    return BertModel.from_pretrained(folder, attn_implementation="eager").eval()


@torch.no_grad()
def their_hidden(model: BertModel, ids: list[list[int]]) -> list[Tensor]:
    return [model(torch.tensor(each)[None]).last_hidden_state[0] for each in ids]


def our_hidden(model: twinfer.Model, ids: list[list[int]]) -> list[Tensor]:
    assert isinstance(model.decoder, Encoder)
    return model.decoder.encode([torch.tensor(each) for each in ids])


def normalized_means(hidden: list[Tensor]) -> Tensor:
    return torch.nn.functional.normalize(torch.stack([hidden_TM.mean(0) for hidden_TM in hidden]))


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def test_texts_become_the_tokens_that_transformers_sees(
    folder: Path, eager: twinfer.Model, ids: list[list[int]]
) -> None:
    """Also where accents are stripped, scripts are split and words are unknown or very long."""
    more = [
        "Crème brûlée, ÅNGSTRÖM & naïveté",
        "深度学习 is 深い",
        "tabs\tand\nlines",
        "\u200b🤗 ok",
        "x" * 101,
        "[MASK] it",
    ]
    theirs = AutoTokenizer.from_pretrained(folder)
    assert [eager.tokenize(text) for text in TEXTS] == ids
    assert [eager.tokenize(text) for text in more] == theirs(more, truncation=False, padding=False)["input_ids"]


def test_in_float32_transformers_and_the_compiled_path_lie_within_the_budget(
    theirs: BertModel, eager: twinfer.Model, exact: twinfer.Model, ids: list[list[int]]
) -> None:
    """Of our truth: token by token for hidden vectors, text by text for pooled ones."""
    compiled = replace(eager, decoder=CompiledPath(eager.checkpoint.source, mode="eager"))
    hidden = their_hidden(theirs, ids)

    def judge(candidate: Tensor, own: Tensor, truth: Tensor) -> None:
        verdict = judge_rows(WHOLE_MODEL, "R W", candidate, own, truth, truth.abs().amax(-1, keepdim=True))
        assert not verdict.failed, verdict

    of_tokens = [torch.cat(our_hidden(model, ids)) for model in (eager, exact)]
    judge(torch.cat(hidden), *of_tokens)
    judge(torch.cat(our_hidden(compiled, ids)), *of_tokens)
    of_texts = [model.embed(TEXTS) for model in (eager, exact)]
    judge(normalized_means(hidden), *of_texts)
    judge(compiled.embed(TEXTS), *of_texts)


def test_in_float64_transformers_agrees(theirs: BertModel, exact: twinfer.Model, ids: list[list[int]]) -> None:
    """Hidden vectors of every token, the texts' vectors, and their cosines."""
    wanted, got = their_hidden(theirs.double(), ids), our_hidden(exact, ids)
    assert all(difference(own_TM, their_TM) <= AGREEMENT for own_TM, their_TM in zip(got, wanted, strict=True))
    wanted_NM, got_NM = normalized_means(wanted), exact.embed(TEXTS)
    assert difference(got_NM, wanted_NM) <= AGREEMENT
    assert difference(got_NM @ got_NM.T, wanted_NM @ wanted_NM.T) <= AGREEMENT


def test_what_means_the_same_is_near(capsys: pytest.CaptureFixture[str]) -> None:
    """The first two pairs say one thing in two ways, the last two things."""
    words = [word for text in TEXTS for word in ("--text", text)]
    assert main(["embed", "minilm", "--path", "reference", "--json", *words]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["pooling"], report["normalize"], report["width"]) == ("mean", True, 384)
    near, nearer, far = (report["cosines"][2 * pair][2 * pair + 1] for pair in range(3))
    assert min(near, nearer) > 0.7
    assert far < 0.1


def test_texts_longer_than_the_makers_allow_are_refused(eager: twinfer.Model) -> None:
    assert eager.embed(["cat " * 254]).shape == (1, 384)
    with pytest.raises(
        RequestError, match="text 0 has 257 tokens, special ones included, and the model's makers allow"
    ):
        eager.embed(["cat " * 255])


def test_the_readmes_command_works(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = (line for line in README.read_text().splitlines() if line.startswith("twinfer embed minilm"))
    assert main(shlex.split(line)[1:]) == 0
    assert ": vectors of 384 elements" in capsys.readouterr().out
