"""Whatever form a peer is given the model in, it is the same model."""

from pathlib import Path

import pytest
import torch

from twinfer.bench.candidates import Candidate, PathCandidate
from twinfer.bench.peers import exported
from twinfer.bench.peers.exported import Exports, transformers_llama, write_gguf
from twinfer.bench.peers.libraries import (
    CTranslate2Candidate,
    DeepSpeedCandidate,
    LlamaCppCandidate,
    StaticCacheCandidate,
    TransformersCandidate,
)
from twinfer.bench.peers.llama_like import check_llama_like, rotary_base
from twinfer.bench.side_by_side import greedy, prompt
from twinfer.checkpoint import open_model
from twinfer.oracle.models import RandomSource
from twinfer.reference.path import ReferencePath
from twinfer.spec.config import Head
from twinfer.spec.errors import RequestError
from twinfer.spec.weights import WeightSource, tensors

from .tiny_llama import VOCABULARY, Scaled, llama

SOURCES = [
    pytest.param(RandomSource(llama(head=Head.TIED), seed=3), id="tied"),
    pytest.param(RandomSource(llama(), seed=3), id="own-head"),
    pytest.param(Scaled(llama(), seed=3), id="scaled"),
]
PROMPT_T = prompt(VOCABULARY, 12)
NEW = 12


def agrees(candidate: Candidate, source: WeightSource) -> bool:
    return greedy(candidate, PROMPT_T, NEW) == greedy(PathCandidate(ReferencePath(source)), PROMPT_T, NEW)


def exports(tmp_path: Path, source: WeightSource | None = None) -> Exports:
    return Exports(source or RandomSource(llama(layers=1), seed=3), tmp_path)


@pytest.mark.parametrize("source", SOURCES)
def test_the_gguf_file_holds_the_same_weights(source: WeightSource, tmp_path: Path) -> None:
    """To the bit, as this project's own reader has them; frequencies to a rounding of float32."""
    write_gguf(source, tmp_path / "model.gguf")
    again = open_model(str(tmp_path / "model.gguf")).source
    assert again.config == source.config
    parts = [(again.layer(index), source.layer(index)) for index in range(len(source.config.layers))]
    parts += [(again.embedding(), source.embedding()), (again.head(), source.head())]  # type: ignore[list-item]
    for found, wanted in parts:
        there = dict(tensors(found))
        assert list(there) == [name for name, _ in tensors(wanted)]
        for name, tensor in tensors(wanted):
            if name == "attention.rotary_frequency_J":
                assert ((there[name] / tensor - 1).abs() < 2 * torch.finfo(torch.float32).eps).all()
            else:
                assert torch.equal(there[name], tensor), name


@pytest.mark.parametrize("source", SOURCES)
def test_transformers_computes_the_same_model(source: WeightSource) -> None:
    """Its choice after every prefix of a prompt is the reference's: the weights went where they belong."""
    token_T = prompt(VOCABULARY, 40)
    with torch.no_grad():
        peer_TV = transformers_llama(source)(token_T[None]).logits[0]
    path = ReferencePath(source)
    (own_TV,) = path.extend(path.open(1, 40), [token_T], every_position=True)
    assert torch.equal(peer_TV.argmax(-1), own_TV.argmax(-1))


def test_the_transformers_folder_is_the_same_model(tmp_path: Path) -> None:
    source = RandomSource(llama(), seed=3)
    folder = exports(tmp_path, source).transformers_folder
    assert agrees(PathCandidate(ReferencePath(open_model(str(folder)).source)), source)


def test_no_folder_is_written_of_what_a_folder_cannot_say(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="scaled"):
        _ = exports(tmp_path, Scaled(llama(), seed=3)).transformers_folder


def test_what_another_process_has_written_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = exports(tmp_path)
    written = (given.gguf_float32, given.transformers_folder)

    def never(*_: object) -> None:
        raise AssertionError("it is there")

    monkeypatch.setattr(exported, "write_gguf", never)
    monkeypatch.setattr(exported, "transformers_llama", never)
    again = exports(tmp_path)
    assert (again.gguf_float32, again.transformers_folder) == written


def test_what_another_process_could_not_finish_is_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half_a_file(source: WeightSource, path: Path) -> None:
        path.write_bytes(b"GGUF")
        raise OSError("no room")

    def half_a_tokenizer(self: object, folder: Path) -> None:
        (folder / "tokenizer_config.json").write_text("{}")
        raise OSError("no room")

    given = exports(tmp_path)
    with monkeypatch.context() as full_disk:
        full_disk.setattr(exported, "write_gguf", half_a_file)
        full_disk.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", half_a_tokenizer)
        for form in ("gguf_float32", "transformers_folder"):
            with pytest.raises(OSError, match="no room"):
                getattr(given, form)
    again = exports(tmp_path)
    for written in (again.gguf_float32, again.transformers_folder):
        assert agrees(PathCandidate(ReferencePath(open_model(str(written)).source)), given.source)
    assert (again.transformers_folder / "tokenizer.json").exists()


@pytest.mark.parametrize("source", SOURCES)
def test_the_eager_candidate_decodes_the_same_tokens(source: WeightSource) -> None:
    assert agrees(TransformersCandidate(transformers_llama(source)), source)


def test_a_batch_is_the_same_sequence_several_times() -> None:
    source = RandomSource(llama(), seed=3)
    wanted = list(PathCandidate(ReferencePath(source)).answer(PROMPT_T, 5, 3))
    assert wanted == list(TransformersCandidate(transformers_llama(source)).answer(PROMPT_T, 5, 3))
    assert all(len(each) == 3 and len(set(each)) == 1 for each in wanted)


def test_the_static_candidate_decodes_the_same_tokens_and_compiles_once(tmp_path: Path) -> None:
    given = exports(tmp_path)
    candidate = StaticCacheCandidate(given.transformers, len(PROMPT_T) + NEW)
    assert agrees(candidate, given.source)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert agrees(candidate, given.source)  # the cache begins anew


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_1"])
def test_llama_cpp_decodes_the_same_tokens(kind: str, tmp_path: Path) -> None:
    """In float32 as the reference does, in other formats something of the same vocabulary."""
    pytest.importorskip("llama_cpp")
    source = Scaled(llama(), seed=3)
    candidate = LlamaCppCandidate(exports(tmp_path, source).gguf(kind), 64, 1)
    if kind == "F32":
        assert agrees(candidate, source)
        assert agrees(candidate, source)  # the cache begins anew
    else:
        assert all(0 <= token < VOCABULARY for token in greedy(candidate, PROMPT_T, NEW))


def test_llama_cpp_reads_long_prompts_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llama_cpp")
    monkeypatch.setattr(LlamaCppCandidate, "PIECE", 5)
    given = exports(tmp_path)
    assert agrees(LlamaCppCandidate(given.gguf("F32"), 64, 1), given.source)


def test_ctranslate2_decodes_the_same_tokens(tmp_path: Path) -> None:
    pytest.importorskip("ctranslate2")
    threads = torch.get_num_threads()
    given = exports(tmp_path, RandomSource(llama(layers=1, hidden=64), seed=3))  # it wants heads as wide as that
    candidate = CTranslate2Candidate(given.transformers_folder, tmp_path / "converted", "float32", 1)
    assert torch.get_num_threads() == threads
    assert agrees(candidate, given.source)
    assert torch.get_num_threads() == threads


def test_deepspeed_decodes_the_same_tokens(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    given = exports(tmp_path)
    assert agrees(DeepSpeedCandidate(given.transformers), given.source)


def test_the_trained_model_is_one_that_peers_know() -> None:
    """Whatever its file says in other words than the peers' configs."""
    source = open_model("smollm2").source
    check_llama_like(source.config)
    frequency_J = source.layer(0).attention.rotary_frequency_J
    assert frequency_J is not None
    assert rotary_base(frequency_J) == 100_000


def test_models_that_peers_are_not_are_refused(tmp_path: Path) -> None:
    source = RandomSource(llama(gated=False))
    with pytest.raises(RequestError, match="LLaMA-like"):
        Exports(source, tmp_path)
    with pytest.raises(RequestError, match="LLaMA-like"):
        transformers_llama(source)
