"""A rank with a fault: `python faulty.py PHASE RANK FAULT`, started as one of a job's ranks.

At the phase the rank of that number kills itself, is halted, loops forever, or raises; "none" does nothing of it.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from twinfer.compiled.path import Mode
from twinfer.oracle.case import RandomPicker
from twinfer.oracle.models import RandomSource
from twinfer.parallel.compiling import compile_in_turn
from twinfer.parallel.leading import Leader, follow
from twinfer.parallel.member import joined
from twinfer.parallel.path import RankPath
from twinfer.parallel.programs import RankProgram
from twinfer.parallel.shared_sums import SharedSums
from twinfer.spec.parallel import ParallelConfig

sys.path.insert(0, str(Path(__file__).parent.parent))
from shards import shareable


def fault(kind: str) -> None:
    print(f"at {os.getpid()}", file=sys.stderr, flush=True)
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "halt":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "loop":
        while True:
            pass
    elif kind == "raise":
        raise ArithmeticError("a fault that was put here")


class Faulty:
    """Stands in for a method: the fault comes at the call of that number."""

    def __init__(self, method: Any, call: int, kind: str) -> None:
        self.method, self.left, self.kind = method, call, kind

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            fault(self.kind)
        return self.method(*arguments, **options)


def main(phase: str, rank: int, kind: str, tensor: int, pipeline: int) -> None:
    torch.set_grad_enabled(False)
    mine = rank == int(os.environ["RANK"])
    if mine and phase == "join":
        fault(kind)
    source: Any = RandomSource(shareable(RandomPicker(40)), 1)
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline)
    with joined(parallel, {}) as member:
        if mine and phase == "read":
            source.layer = Faulty(source.layer, 1, kind)
        path = RankPath(source, member.wire, device=torch.device("cpu"), mode=Mode.EAGER, on_step=member.progress.step)
        path._uncompiled = set(path._programs)  # so that all take turns, though nothing is compiled
        if mine and phase == "compile":
            path.compile = Faulty(path.compile, 2, kind)  # type: ignore[method-assign]
        compile_in_turn(path, member, batches=True)
        if mine and phase in ("prefill", "decode"):
            through = RankProgram.through
            at = Faulty(through, 1 if phase == "prefill" else 3, kind)
            RankProgram.through = lambda *given: at(*given)  # type: ignore[method-assign]
        if mine and phase == "sum":  # of a decode step, in which the other waits for this rank's part
            start = SharedSums.start
            in_sum = Faulty(start, 1 + 2 * (1 + 2 * len(source.config.layers)), kind)
            SharedSums.start = lambda *given: in_sum(*given)  # type: ignore[method-assign]
        if not member.leads:
            follow(path, member)
            return
        leader = Leader(path, member)
        sequences = leader.open(2, 8)
        logits_BV = leader.extend(sequences, [torch.tensor([0, 1, 1]), torch.tensor([1, 0])])
        for _ in range(4):
            logits_BV = leader.extend(sequences, list(logits_BV.argmax(-1)[:, None]))  # type: ignore[union-attr]
        print(sequences.lengths, flush=True)
        leader.end()


main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
