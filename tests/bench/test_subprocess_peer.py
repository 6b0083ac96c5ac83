"""A peer in a process of its own gives the same answers, is timed over there, and is missed at once when it ends."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from twinfer.bench.candidates import Candidate
from twinfer.bench.peers import subprocess_peer
from twinfer.bench.peers.exported import Exports, transformers_llama, write_gguf
from twinfer.bench.peers.libraries import TransformersCandidate
from twinfer.bench.peers.subprocess_peer import Served, SubprocessPeer
from twinfer.bench.peers.table import Capacity, Peer
from twinfer.bench.side_by_side import Workload, prompt
from twinfer.bench.targets import EAGER
from twinfer.checkpoint import open_model
from twinfer.oracle.models import RandomSource
from twinfer.spec.errors import CheckpointError, MachineError

from .tiny_llama import VOCABULARY, llama

Started = list[subprocess.Popen[bytes]]
PROMPT_T = prompt(VOCABULARY, 12)
CAPACITY = Capacity(decode_tokens=24, most_tokens=64, threads=1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_gguf(RandomSource(llama(), seed=3), path)
    return str(path)


@contextmanager
def no_hang() -> Iterator[None]:
    """What waits for ever fails instead."""

    def over(*_: object) -> None:
        pytest.fail("it still waits")

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(60)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def elsewhere(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SubprocessPeer]:
    with no_hang():
        candidate = SubprocessPeer(EAGER, tiny, tmp_path_factory.mktemp("elsewhere"), CAPACITY)
    with candidate:
        yield candidate


@pytest.fixture(autouse=True)
def no_test_hangs() -> Iterator[None]:
    with no_hang():
        yield


def test_the_answers_are_the_same(elsewhere: SubprocessPeer, tiny: str) -> None:
    here = TransformersCandidate(transformers_llama(open_model(tiny).source))
    for asked in ((PROMPT_T, 12), (PROMPT_T, 5, 3), (PROMPT_T[:3], 1)):
        assert list(elsewhere.answer(*asked)) == list(here.answer(*asked))


def test_seconds_pass_while_this_process_rests(elsewhere: SubprocessPeer) -> None:
    """A step's seconds, all steps together, fit in what passed here; most of them was no work of this process."""
    workload = Workload(prompt=12, steps=300)
    elsewhere.seconds(PROMPT_T, workload)  # whatever is slow at first
    began, worked = time.perf_counter(), time.process_time()
    step_s = elsewhere.seconds(PROMPT_T, workload)
    passed, worked = time.perf_counter() - began, time.process_time() - worked
    assert 0 < worked < 300 * step_s / 2
    assert 300 * step_s < passed < 1200 * step_s


def test_a_prompt_is_timed_without_steps(elsewhere: SubprocessPeer) -> None:
    began = time.perf_counter()
    prompt_s = elsewhere.seconds(PROMPT_T, Workload(prompt=12))
    assert 0 < prompt_s < time.perf_counter() - began


def test_what_fails_there_is_told_in_its_words_and_the_next_is_answered(elsewhere: SubprocessPeer) -> None:
    unknown_T = torch.tensor([VOCABULARY])
    with pytest.raises(MachineError, match=r"^IndexError: index out of range"):
        elsewhere.answer(unknown_T, 1)
    with pytest.raises(MachineError, match=r"^IndexError: index out of range"):
        elsewhere.seconds(unknown_T, Workload(prompt=1))
    assert len(list(elsewhere.answer(PROMPT_T, 2))) == 2


def test_what_cannot_start_is_told_in_its_words_and_leaves_no_process(tmp_path: Path, started: Started) -> None:
    with pytest.raises(CheckpointError, match=r"^there is no model 'nowhere\.gguf'"):
        SubprocessPeer(EAGER, "nowhere.gguf", tmp_path, CAPACITY)
    (process,) = started
    assert process.returncode is not None


def test_a_process_that_is_killed_as_it_starts_is_missed_at_once(tiny: str, tmp_path: Path, started: Started) -> None:
    """As where the model is too large for the memory."""

    def kill() -> None:
        while not started:
            time.sleep(0.01)
        started[0].kill()

    threading.Thread(target=kill, daemon=True).start()
    with pytest.raises(MachineError, match="killed by SIGKILL; is there enough memory"):
        SubprocessPeer(EAGER, tiny, tmp_path, CAPACITY)


def test_a_process_that_is_killed_is_missed_at_once(tiny: str, tmp_path: Path) -> None:
    """While it is waited for, and when it is asked again."""
    with SubprocessPeer(EAGER, tiny, tmp_path, CAPACITY) as candidate:
        threading.Timer(0.5, os.kill, (candidate.process.pid, signal.SIGKILL)).start()
        began = time.perf_counter()
        with pytest.raises(MachineError, match="killed by SIGKILL"):
            candidate.answer(PROMPT_T, 100_000)
        with pytest.raises(MachineError, match="killed by SIGKILL"):
            candidate.seconds(PROMPT_T, Workload(prompt=12))
        assert 0.4 < time.perf_counter() - began < 4


Serve = Callable[[Callable[[], Candidate]], Served]


@pytest.fixture
def serve(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """What lives in the subprocess, in this process, with a made-up peer."""
    threads = torch.get_num_threads()

    def served(make: Callable[[], Candidate]) -> Served:
        def made(exports: Exports, capacity: Capacity) -> Candidate:
            assert (exports.folder, capacity) == (tmp_path, CAPACITY)
            return make()

        peer = Peer(name="made up", package="math", install="", precision="float32", make=made)
        monkeypatch.setattr(subprocess_peer, "PEERS", {"made up": peer})
        return Served("made up", tiny, tmp_path, CAPACITY)

    yield served
    torch.set_num_threads(threads)


class Recompiling:
    """Every answer adds to a tensor of the next of these sizes, in a graph for one size."""

    def __init__(self, *sizes: int) -> None:
        self.sizes = iter(sizes)
        self.program = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)

    def answer(self, prompt_T: Tensor, new: int, batch: int = 1) -> Iterator[Sequence[int]]:
        for _ in range(new):
            self.program(torch.ones(next(self.sizes)))
            yield [0]


def test_to_compile_is_allowed_once_for_each_workload(serve: Serve) -> None:
    long, short = (([1] * length, Workload(prompt=length)) for length in (7, 5))
    peer = serve(lambda: Recompiling(2, 2, 3, 3, 3, 3, 4, 5, 3, 3))
    for request in (long, short, long):
        peer.seconds(*request)
    with pytest.raises(RuntimeError, match="Detected recompile"):
        peer.seconds(*long)
    assert peer.answer([1], 1, 1) == [[0]]
    peer.seconds(*short)


class Thready:
    def answer(self, prompt_T: Tensor, new: int, batch: int = 1) -> Iterator[Sequence[int]]:
        yield (torch.get_num_threads(),) * batch


def test_the_peer_has_its_threads(serve: Serve) -> None:
    torch.set_num_threads(2)
    assert serve(Thready).answer([1, 2], 1, 3) == [[1, 1, 1]]
