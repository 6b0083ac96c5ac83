"""A peer in a process of its own, so that one library's threads and settings do not reach another's.

Libraries with OpenMP threads of their own make those of torch sleep between two loops in place of waiting ready: in one
process with all peers a decode step of the compiled path takes three times as long.

Shapes: T prompt tokens.
"""

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ..spec.errors import MachineError
from .child import how_it_ended
from .peers import PEERS, Room
from .side_by_side import Workload, reason, seconds_of


class Remote:
    """A `Candidate` that answers, and is timed, over there; it lives until it is closed.

    Raises `MachineError` with the peer's own words where it fails, and with how its process ended where it does.
    """

    def __init__(self, name: str, model: str, folder: Path, room: Room) -> None:
        """Start peer `name` on what the command line named `model`; what it reads is written to `folder`."""
        context = multiprocessing.get_context("spawn")  # a fork would share the state of torch's threads
        self._here, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, name, model, folder, room), daemon=True)
        self._process.start()
        there.close()
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def answer(self, prompt_T: Tensor, new: int, batch: int = 1) -> Iterator[Sequence[int]]:
        """As `Candidate.answer`, but all steps are done when the first is handed out."""
        return iter(self._asked("answer", prompt_T.tolist(), new, batch))

    def seconds(self, prompt_T: Tensor, workload: Workload) -> float:
        """One sample; from the second one on of a workload, a recompile is an error."""
        taken: float = self._asked("seconds", prompt_T.tolist(), workload)
        return taken

    def close(self) -> None:
        self._here.close()
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _asked(self, *request: Any) -> Any:
        try:
            self._here.send(request)
        except OSError:
            raise self._ended() from None
        return self._answer()

    def _answer(self) -> Any:
        try:
            failed, answer = self._here.recv()
        except (EOFError, OSError):
            raise self._ended() from None
        if failed:
            raise MachineError(answer)
        return answer

    def _ended(self) -> MachineError:
        self._process.join(timeout=5)
        status = self._process.exitcode
        return MachineError("its process does not answer" if status is None else f"its process {how_it_ended(status)}")


def _serve(requests: Connection, name: str, model: str, folder: Path, room: Room) -> None:
    """In the new process: make the peer, then answer until the other side closes."""
    os.dup2(2, 1)  # results go to the parent's standard output; what other libraries print is no result
    torch.set_num_threads(room.threads)
    from ..checkpoint import open_model
    from .exported import Exports

    try:
        candidate = PEERS[name].make(Exports(open_model(model).source, folder), room)
    except Exception as error:  # another library's
        requests.send((True, reason(error)))
        return
    requests.send((False, None))
    sampled: set[Workload] = set()
    while True:
        try:
            what, tokens, *others = requests.recv()
        except EOFError:
            return
        prompt_T = torch.tensor(tokens)
        try:
            if what == "answer":
                requests.send((False, [list(step) for step in candidate.answer(prompt_T, *others)]))
                continue
            (workload,) = others
            with torch.compiler.set_stance("fail_on_recompile" if workload in sampled else "default"):
                taken = seconds_of(candidate, prompt_T, workload)
            sampled.add(workload)
            requests.send((False, taken))
        except Exception as error:
            requests.send((True, reason(error)))
