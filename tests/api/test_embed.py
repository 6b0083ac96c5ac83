"""Texts as vectors: the command and `Model.embed`, on a tiny random BERT in a folder as its library writes it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

import twinfer
from twinfer import embedding
from twinfer.checkpoint import Checkpoint, open_model
from twinfer.commands.main import main
from twinfer.converting import convert
from twinfer.reference.path import ReferencePath
from twinfer.spec.config import Storage
from twinfer.spec.errors import NumericsError, RequestError

CONTEXT, MOST, WIDTH = 24, 16, 12
LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
AGREEMENT = 1e-9
"""Of two float64 computations of one small model, as in tests/families."""


def letter_tokenizer() -> tokenizers.Tokenizer:
    """A BERT tokenizer with one token a letter."""
    inner = tokenizers.Tokenizer(
        models.WordPiece({token: index for index, token in enumerate(VOCABULARY)}, unk_token="[UNK]")
    )
    inner.normalizer = normalizers.BertNormalizer(lowercase=False)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    inner.enable_truncation(5)  # as some files do, which must not cut anything here
    return inner


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that asks for mean pooling, length 1, lower case, and texts of 16 tokens at most."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    model = BertModel(
        BertConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=20,
            max_position_embeddings=CONTEXT,
            initializer_range=0.5,
        )
    )
    model.save_pretrained(folder)
    letter_tokenizer().save(str(folder / "tokenizer.json"))
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [{"idx": 0, "name": "0", "path": path, "type": f"library.models.{kind}"} for path, kind in kinds.items()]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": MOST, "do_lower_case": True}))
    return folder


def theirs(folder: Path, texts: list[str]) -> Tensor:
    """The hidden vectors of transformers' own model in float64, padded, and the mask of what is no padding."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token="[PAD]")
    model = BertModel.from_pretrained(folder, dtype=torch.float64).eval()
    given = tokenizer([text.lower() for text in texts], padding=True, truncation=False, return_tensors="pt")
    with torch.no_grad():
        hidden_NTM = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).last_hidden_state
    return torch.cat([hidden_NTM, given["attention_mask"][..., None]], -1)


@settings(max_examples=10)
@given(
    texts=st.lists(st.text("abcXYZ ", min_size=1, max_size=MOST - 2).filter(str.strip), min_size=1, max_size=4),
    pooling=st.sampled_from([None, "mean", "cls"]),
    normalize=st.sampled_from([None, False, True]),
)
def test_vectors_are_those_of_transformers(
    folder: Path, texts: list[str], pooling: str | None, normalize: bool | None
) -> None:
    """By whichever pooling and length; what is not chosen is as the folder says: mean, length 1, lower case."""
    model = twinfer.load(str(folder), "reference", compute="float64")
    padded = theirs(folder, texts)
    hidden_NTM, mask_NT1 = padded[..., :-1], padded[..., -1:]
    mean_NM = (hidden_NTM * mask_NT1).sum(1) / mask_NT1.sum(1)
    wanted = hidden_NTM[:, 0] if pooling == "cls" else mean_NM
    if normalize is not False:
        wanted = torch.nn.functional.normalize(wanted)
    got = model.embed(texts, pooling=pooling, normalize=normalize)
    assert got.dtype == torch.float64
    assert float((got - wanted).abs().max() / wanted.abs().max()) <= AGREEMENT


def test_many_texts_are_encoded_a_block_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = twinfer.load(str(folder), "reference")
    texts = [LETTERS[: 1 + index % 9] for index in range(23)]
    whole = model.embed(texts)
    monkeypatch.setattr(embedding, "AT_ONCE", 5)
    assert torch.equal(model.embed(texts), whole)
    assert torch.equal(model.embed(texts[3:4]), whole[3:4])


def test_ids_are_taken_as_they_are_up_to_the_context(folder: Path) -> None:
    """Only texts are held to what their makers allow."""
    model = twinfer.load(str(folder), "reference")
    ids = model.tokenize("abc")
    assert ids == [2, 4, 5 + len(LETTERS), 6 + len(LETTERS), 3]
    assert torch.equal(model.embed([ids]), model.embed(["abc"]))
    assert model.embed([[4] * CONTEXT]).shape == (1, WIDTH)
    with pytest.raises(RequestError, match=f"the model's context is {CONTEXT}"):
        model.embed([[4] * (CONTEXT + 1)])


def test_a_converted_model_embeds_as_the_original_did(folder: Path, tmp_path: Path) -> None:
    checkpoint = open_model(str(folder))
    convert(checkpoint, tmp_path / "converted", Storage.FLOAT32, lambda line: None)
    again = open_model(str(tmp_path / "converted"))
    assert again.embedding == checkpoint.embedding
    texts = ["abc", "Z"]
    one, other = (twinfer.load(each, "reference").embed(texts) for each in (checkpoint, again))
    assert torch.equal(one, other)


def test_a_decoder_embeds_too(tiny: Checkpoint) -> None:
    """As far as its path encodes: the mean of its hidden vectors, not scaled."""
    model = twinfer.load(tiny, "reference", compute="float64")
    path = ReferencePath(tiny.source, compute=torch.float64)
    (hidden_TM,) = path.encode([torch.tensor(model.tokenize("hello"))])
    assert torch.equal(model.embed(["hello"])[0], hidden_TM.mean(0))


def test_what_cannot_be_embedded_is_refused(tiny: Checkpoint, witness: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = twinfer.load(tiny, "reference")
    with pytest.raises(RequestError, match=r"texts is the string 'ab'; it must be a sequence"):
        model.embed("ab")
    with pytest.raises(RequestError, match="pooling is 'max'; it must be one of mean, cls"):
        model.embed(["ab"], pooling="max")
    with pytest.raises(RequestError, match=r"tiny has no tokenizer \(it comes without\); give token ids"):
        replace(model, checkpoint=replace(tiny, tokenizer=None)).embed(["ab"])
    with pytest.raises(RequestError, match="Witness encodes no texts"):
        replace(model, decoder=witness).embed(["ab"])
    monkeypatch.setattr(ReferencePath, "encode", lambda path, tokens: [torch.full((3, 8), torch.nan) for _ in tokens])
    with pytest.raises(NumericsError, match="the vector of text 0 is not finite"):
        model.embed(["ab"])


@pytest.mark.parametrize(
    ("recipe", "how", "says"),
    [
        (
            {"pooling": None},
            {},
            "pooling is max; to embed in another way than the makers, choose pooling (mean or cls)",
        ),
        ({"pooling": None}, {"normalize": True}, "choose pooling (mean or cls)"),
        ({"pooling": None, "normalize": None}, {}, "choose pooling (mean or cls) and normalize"),
        ({"pooling": None, "normalize": None}, {"pooling": "cls"}, "the makers, choose normalize"),
        ({"pooling": None}, {"pooling": "cls"}, None),
        ({"pooling": None, "normalize": None}, {"pooling": "mean", "normalize": False}, None),
    ],
)
def test_what_the_makers_do_and_is_not_computed_must_be_chosen(
    recipe: dict[str, Any], how: dict[str, Any], says: str | None, tiny: Checkpoint
) -> None:
    unknown = replace(tiny.embedding, **recipe, unknown="pooling is max")
    model = twinfer.load(replace(tiny, embedding=unknown), "reference")
    if says is None:
        assert model.embed(["ab"], **how).shape == (1, 8)
        return
    with pytest.raises(RequestError) as caught:
        model.embed(["ab"], **how)
    assert str(caught.value).endswith(says)


def test_json_holds_the_vectors_and_the_table_their_cosines(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Texts of --text come first, then those of the file, a line each; markup in a text is text."""
    file = tmp_path / "texts"
    file.write_text("xyz\n\n[bold]a\n", encoding="utf-8")
    words = ["embed", str(folder), "--path", "reference", "--text", "abc", "--text", "Abc", "--texts", str(file)]
    assert main([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    about = ["model", "path", "storage", "compute", "device", "pooling", "normalize", "width"]
    assert list(report) == [*about, "texts", "cosines"]
    how = ["reference", "float32", "float32", "cpu", "mean", True, WIDTH]
    assert [report[key] for key in about] == [str(folder), *how]
    assert [each["text"] for each in report["texts"]] == ["abc", "Abc", "xyz", "[bold]a"]
    assert report["texts"][0]["ids"] == report["texts"][1]["ids"] == [2, 4, 5 + len(LETTERS), 6 + len(LETTERS), 3]
    vector_NM = torch.tensor([each["vector"] for each in report["texts"]], dtype=torch.float64)
    model = twinfer.load(str(folder), "reference")
    assert torch.equal(vector_NM.float(), model.embed(["abc", "Abc", "xyz", "[bold]a"]))
    cosine_NN = torch.tensor(report["cosines"], dtype=torch.float64)
    angle = vector_NM @ vector_NM.T / vector_NM.norm(dim=1) / vector_NM.norm(dim=1)[:, None]
    assert float((cosine_NN - angle).abs().max()) <= AGREEMENT
    assert main(words) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{folder}: vectors of {WIDTH} elements, pooling mean, scaled to length 1\n")
    rows = [line for line in out.splitlines() if line.startswith("│")]
    for text, ids, row, cosine_N in zip(
        ["abc", "Abc", "xyz", "[bold]a"], [5, 5, 5, 9], rows, cosine_NN.tolist(), strict=True
    ):
        cells = [cell.strip() for cell in row.strip("│").split("│")]
        assert cells[1:] == [text, str(ids), *(f"{cosine:z.3f}" for cosine in cosine_N)]


def test_of_many_texts_the_table_shows_the_first_columns(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [word for letter in LETTERS[:11] for word in ("--text", f"{letter}\x1b[31m\n{letter}")]
    options = ["--path", "reference", "--pooling", "cls", "--no-normalize"]
    assert main(["embed", str(folder), *options, *words]) == 0
    out = capsys.readouterr().out
    assert f": vectors of {WIDTH} elements, pooling cls, not scaled" in out
    assert "cosines to the first 8 texts; --json has all of them" in out
    assert "\x1b" not in out
    assert sum(line.startswith("│") for line in out.splitlines()) == 11


BAD = {
    "no text": ([], "there is no text; give --text or --texts"),
    "empty text": (["--text", "a", "--text", ""], "text 1 is '', in which the model sees nothing"),
    "blank text": (["--text", " \t"], "in which the model sees nothing"),
    "unknown pooling": (["--text", "a", "--pooling", "max"], "invalid choice: 'max'"),
    "too long": (
        ["--text", "a" * (MOST - 1)],
        f"text 0 has {MOST + 1} tokens, special ones included, and the model's makers allow {MOST} (its context is "
        f"{CONTEXT}); shorten it, or embed it in pieces: nothing is cut off for you",
    ),
    "half a character": (["--text", "\udce9"], "is not UTF-8 text"),
    "no file": (["--texts", "/nowhere/texts"], "texts file /nowhere/texts cannot be read: No such file"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_status_2(case: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, says = BAD[case]
    assert main(["embed", str(folder), "--path", "reference", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("twinfer: error: ")
    assert says in err
    assert err.count("\n") == 1


def test_a_text_may_be_as_long_as_the_makers_allow(folder: Path) -> None:
    assert twinfer.load(str(folder), "reference").embed(["a" * (MOST - 2)]).shape == (1, WIDTH)


def test_a_file_without_texts_and_a_model_without_a_tokenizer(
    tiny: Checkpoint,
    opens: Callable[[Checkpoint], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "texts").write_text("\n \n")
    opens(replace(tiny, tokenizer=None))
    assert main(["embed", "tiny", "--path", "reference", "--texts", str(tmp_path / "texts")]) == 2
    assert "holds no text; write one a line" in capsys.readouterr().err
    assert main(["embed", "tiny", "--path", "reference", "--text", "a"]) == 2
    assert "tiny has no tokenizer" in capsys.readouterr().err


def test_an_encoder_continues_no_text(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says so before anything is loaded or compiled."""
    monkeypatch.setattr("twinfer.commands.generate.load", None)
    assert main(["generate", str(folder), "--prompt", "abc"]) == 2
    assert "this bert model sees later tokens or has no head, so no text can be continued" in capsys.readouterr().err
    with pytest.raises(RequestError, match="no text can be continued with it"):
        twinfer.load(str(folder), "reference").generate(["abc"])
