"""One compiled path used from several threads, and after a fork."""

import os
import signal
import subprocess
import sys
import threading
from functools import cache

import torch
from torch import Tensor

from twinfer.compiled.path import CompiledPath
from twinfer.oracle.models import RandomSource
from twinfer.spec.config import (
    Activation,
    AttentionConfig,
    Head,
    LayerConfig,
    MlpConfig,
    ModelConfig,
    NormConfig,
    NormKind,
)
from twinfer.spec.errors import MachineError  # noqa: F401  (for the forked program)


def config() -> ModelConfig:
    """As little as has every program."""
    norm = NormConfig(kind=NormKind.RMS, epsilon=1e-5, bias=False)
    attention = AttentionConfig(heads=2, kv_heads=1, head_size=8, scale=0.4)
    mlp = MlpConfig(width=24, activation=Activation.SILU, gated=True)
    return ModelConfig(
        family="random",
        hidden=16,
        vocabulary=50,
        context=200,
        layers=(LayerConfig(norm=norm, attention=attention, mlp=mlp),) * 2,
        final_norm=norm,
        learned_positions=True,
        head=Head.TIED,
    )


@cache
def compiled() -> CompiledPath:
    """Compiled where a caller's settings of torch are not the usual ones."""
    with torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        path = CompiledPath(Plain(config()))
        path.compile()
    return path


class Plain(RandomSource):
    def _tensor(self, part: str, name: str, shape: tuple[int, ...]) -> Tensor:
        with torch.device("cpu"):
            return super()._tensor(part, name, shape)


def story(path: CompiledPath, first: int, *, steps: int = 70) -> list[int]:
    """The likeliest tokens after a prompt: long enough for several graphs, and for a growth of the cache."""
    sequences = path.open(1, 40)
    token_T, ids = torch.tensor([first, 1, 2]), []
    for _ in range(steps):
        token_T = path.extend(sequences, [token_T]).argmax(-1)
        ids.append(int(token_T))
        path.encode([torch.tensor([first, *ids[-3:]])])
    sequences.close()
    return ids


def test_two_threads_get_what_one_gets() -> None:
    """Each with sequences of its own, at the same time, several times over: opening, growing, closing."""
    path = compiled()
    right = {first: story(path, first) for first in range(4)}
    wrong: list[str] = []
    together = threading.Barrier(2)

    def use(own: int) -> None:
        together.wait()
        for again in range(3):
            first = (own + again) % 4
            try:
                if story(path, first) != right[first]:
                    wrong.append(f"thread {own}: other tokens after {first}")
            except Exception as error:
                wrong.append(f"thread {own}: {error!r}")

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    threads = [threading.Thread(target=use, args=(own,)) for own in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(before)
    assert wrong == []


FORKED = """
import os, signal, sys
import torch
torch.set_num_threads({threads})
sys.path.insert(0, {here!r})
from test_turn import CompiledPath, MachineError, Plain, config, story
path = CompiledPath(Plain(config()), mode='eager' if {eager} else 'compiled')
right = story(path, 3, steps=3)
big = torch.randn(600, 600)
big @ big, big.exp().sum()  # threads of OpenMP are there now
child = os.fork()
if child == 0:
    signal.alarm(60)
    path = CompiledPath(Plain(config()), mode='eager' if {eager} else 'compiled') if {anew} else path
    try:
        os._exit(10 if story(path, 3, steps=3) == right else 11)
    except MachineError as error:
        print(error, flush=True)
        os._exit(12)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def forked(*, threads: int, eager: bool, anew: bool = False) -> str:
    """What a forked child says: 10 for the right tokens, 11 for others, 12 behind an error, -14 if it hangs."""
    here = os.path.dirname(__file__)
    program = FORKED.format(threads=threads, eager=eager, anew=anew, here=here)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=500).stdout.strip()


def test_a_forked_child_answers_or_says_what_to_do() -> None:
    """With one thread it gets the right tokens; compiled for two, the path is refused in a line; it never hangs."""
    compiled()  # so that children find the programs
    assert forked(threads=1, eager=False) == "10"
    assert forked(threads=2, eager=True) == "10"
    said, status = forked(threads=2, eager=False).splitlines()
    assert status == "12"
    assert "load the model in the forked process" in said


def test_a_forked_child_may_load_the_model_itself() -> None:
    """Then it is compiled for one thread, whatever its parent had."""
    compiled()
    assert forked(threads=2, eager=True, anew=True) == "10"


def test_a_lock_that_another_thread_held_is_free_in_a_forked_child() -> None:
    path, inside, leave = CompiledPath(Plain(config()), mode="eager"), threading.Event(), threading.Event()

    def hold() -> None:
        with path._turn:
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(60)
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        os._exit(10 if len(story(path, 3, steps=2)) == 2 else 11)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    leave.set()
    thread.join()
    assert status == 10
