"""A peer in a process of its own gives the same answers, is timed over there, and is missed at once when it ends."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from twinfer.bench import remote
from twinfer.bench.candidates import Candidate, TransformersCandidate
from twinfer.bench.exported import Exports, transformers_llama, write_gguf
from twinfer.bench.must_reach import EAGER
from twinfer.bench.peers import Peer, Room
from twinfer.bench.remote import Remote
from twinfer.bench.side_by_side import Workload, prompt
from twinfer.checkpoint import open_model
from twinfer.oracle.models import RandomSource
from twinfer.spec.errors import MachineError

from .tiny_llama import VOCABULARY, llama

PROMPT_T = prompt(VOCABULARY, 12)
ROOM = Room(decode_tokens=24, most_tokens=64, threads=1)


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
def elsewhere(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    with no_hang():
        candidate = Remote(EAGER, tiny, tmp_path_factory.mktemp("elsewhere"), ROOM)
    with candidate:
        yield candidate


@pytest.fixture(autouse=True)
def no_test_hangs() -> Iterator[None]:
    with no_hang():
        yield


@contextmanager
def started(model: str, folder: Path) -> Iterator[tuple[Remote, BaseProcess]]:
    """A peer of the test's own, and its process."""
    others = set(multiprocessing.active_children())
    with Remote(EAGER, model, folder, ROOM) as candidate:
        (process,) = set(multiprocessing.active_children()) - others
        yield candidate, process


def test_the_answers_are_the_same(elsewhere: Remote, tiny: str) -> None:
    here = TransformersCandidate(transformers_llama(open_model(tiny).source))
    for asked in ((PROMPT_T, 12), (PROMPT_T, 5, 3), (PROMPT_T[:3], 1)):
        assert list(elsewhere.answer(*asked)) == list(here.answer(*asked))


def test_seconds_pass_while_this_process_rests(elsewhere: Remote) -> None:
    """A step's seconds, all steps together, fit in what passed here; most of them was no work of this process."""
    workload = Workload(prompt=12, steps=300)
    elsewhere.seconds(PROMPT_T, workload)  # whatever is slow at first
    began, worked = time.perf_counter(), time.process_time()
    step_s = elsewhere.seconds(PROMPT_T, workload)
    passed, worked = time.perf_counter() - began, time.process_time() - worked
    assert 0 < worked < 300 * step_s / 2
    assert 300 * step_s < passed < 1200 * step_s


def test_a_prompt_is_timed_without_steps(elsewhere: Remote) -> None:
    began = time.perf_counter()
    prompt_s = elsewhere.seconds(PROMPT_T, Workload(prompt=12))
    assert 0 < prompt_s < time.perf_counter() - began


def test_what_fails_there_is_told_in_its_words_and_the_next_is_answered(elsewhere: Remote) -> None:
    unknown_T = torch.tensor([VOCABULARY])
    with pytest.raises(MachineError, match=r"^IndexError: index out of range"):
        elsewhere.answer(unknown_T, 1)
    with pytest.raises(MachineError, match=r"^IndexError: index out of range"):
        elsewhere.seconds(unknown_T, Workload(prompt=1))
    assert len(list(elsewhere.answer(PROMPT_T, 2))) == 2


def test_what_cannot_start_is_told_in_its_words_and_leaves_no_process(tmp_path: Path) -> None:
    others = set(multiprocessing.active_children())
    with pytest.raises(MachineError, match=r"^there is no model 'nowhere\.gguf'"):
        Remote(EAGER, "nowhere.gguf", tmp_path, ROOM)
    assert set(multiprocessing.active_children()) <= others


def test_a_process_that_is_killed_as_it_starts_is_missed_at_once(tiny: str, tmp_path: Path) -> None:
    """As where the model is too large for the memory."""
    others = set(multiprocessing.active_children())

    def kill() -> None:
        while not (started := set(multiprocessing.active_children()) - others):
            time.sleep(0.01)
        started.pop().kill()

    threading.Thread(target=kill, daemon=True).start()
    with pytest.raises(MachineError, match="killed by SIGKILL; is there enough memory"):
        Remote(EAGER, tiny, tmp_path, ROOM)


def test_a_process_that_is_killed_is_missed_at_once(tiny: str, tmp_path: Path) -> None:
    """While it is waited for, and when it is asked again."""
    with started(tiny, tmp_path) as (candidate, process):
        assert process.pid is not None
        threading.Timer(0.5, os.kill, (process.pid, signal.SIGKILL)).start()
        began = time.perf_counter()
        with pytest.raises(MachineError, match="killed by SIGKILL"):
            candidate.answer(PROMPT_T, 100_000)
        with pytest.raises(MachineError, match="killed by SIGKILL"):
            candidate.seconds(PROMPT_T, Workload(prompt=12))
        assert 0.4 < time.perf_counter() - began < 4


def test_closing_ends_the_process(tiny: str, tmp_path: Path) -> None:
    """By itself; to close it once more changes nothing."""
    with started(tiny, tmp_path) as (candidate, process):
        assert process.is_alive()
    assert process.exitcode == 0
    candidate.close()


class Asked:
    """The connection of a process that is asked all this, and then left."""

    def __init__(self, *requests: tuple[Any, ...]) -> None:
        self.requests = list(requests)
        self.answers: list[tuple[bool, Any]] = []

    def recv(self) -> tuple[Any, ...]:
        if not self.requests:
            raise EOFError
        return self.requests.pop(0)

    def send(self, answer: tuple[bool, Any]) -> None:
        self.answers.append(answer)


Serve = Callable[..., list[tuple[bool, Any]]]


@pytest.fixture
def serve(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """What the new process does, in this one: the answers of a made-up peer to all requests."""
    standard_output, threads = os.dup(1), torch.get_num_threads()

    def answers(make: Callable[[], Candidate], *requests: tuple[Any, ...]) -> list[tuple[bool, Any]]:
        def made(exports: Exports, room: Room) -> Candidate:
            assert (exports.folder, room) == (tmp_path, ROOM)
            return make()

        peer = Peer(name="made up", package="math", install="", precision="float32", make=made)
        monkeypatch.setattr(remote, "PEERS", {"made up": peer})
        connection: Any = Asked(*requests)
        remote._serve(connection, "made up", tiny, tmp_path, ROOM)
        return connection.answers

    yield answers
    os.dup2(standard_output, 1)
    os.close(standard_output)
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
    long, short = (("seconds", [1] * length, Workload(prompt=length)) for length in (7, 5))
    (_, *told) = serve(
        lambda: Recompiling(2, 2, 3, 3, 3, 3, 4, 5, 3, 3), long, short, long, long, ("answer", [1], 1, 1), short
    )
    assert [failed for failed, _ in told] == [False, False, False, True, False, False]
    assert "Detected recompile" in told[3][1]


class Thready:
    def answer(self, prompt_T: Tensor, new: int, batch: int = 1) -> Iterator[Sequence[int]]:
        os.write(1, b"a library talks\n")
        yield (torch.get_num_threads(),) * batch


def test_the_peer_has_its_threads_and_no_standard_output(serve: Serve, capfd: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(2)
    assert serve(Thready, ("answer", [1, 2], 1, 3)) == [(False, None), (False, [[1, 1, 1]])]
    assert capfd.readouterr() == ("", "a library talks\n")


def test_a_peer_that_cannot_be_made_says_why_and_answers_nothing(serve: Serve) -> None:
    def fail() -> Candidate:
        raise OSError("no\nroom")

    assert serve(fail, ("answer", [1], 1, 1)) == [(True, "OSError: no room")]
