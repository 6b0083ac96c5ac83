"""A peer in a subprocess, so that one library's threads and settings do not reach another's.

Libraries with OpenMP threads of their own make those of torch sleep between two loops instead of waiting ready: in one
process with all peers a decode step of the compiled path takes three times as long.

Shapes: T prompt tokens.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ...spec.errors import MachineError
from ..side_by_side import Workload, seconds_of
from ..subprocesses import Subprocess, SubprocessFailed
from .table import PEERS, Capacity


class SubprocessPeer:
    """A `Candidate` that answers, and is timed, in a subprocess; it lives until it is closed.

    Raises `MachineError` with the peer's own words where it fails, and with how its process ended where it does.
    """

    def __init__(self, name: str, model: str, folder: Path, capacity: Capacity) -> None:
        """Start peer `name` on what the command line named `model`; what it reads is written to `folder`."""
        try:
            self.process = Subprocess(Served, name, model, folder, capacity)
        except SubprocessFailed as error:
            raise MachineError(str(error)) from None

    def answer(self, prompt_T: Tensor, new: int, batch: int = 1) -> Iterator[Sequence[int]]:
        """Answer as `Candidate.answer`, but all steps are done when the first is handed out."""
        return iter(self._call("answer", prompt_T.tolist(), new, batch))

    def seconds(self, prompt_T: Tensor, workload: Workload) -> float:
        """Take one sample; from the second one on of a workload, a recompile is an error."""
        taken: float = self._call("seconds", prompt_T.tolist(), workload)
        return taken

    def close(self) -> None:
        self.process.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, method: str, *arguments: Any) -> Any:
        try:
            return self.process.call(method, *arguments)
        except SubprocessFailed as error:  # another library's
            raise MachineError(str(error)) from None


class Served:
    """The peer over there, with as many threads as it may have."""

    def __init__(self, name: str, model: str, folder: Path, capacity: Capacity) -> None:
        from ...checkpoint import open_model
        from .exported import Exports

        torch.set_num_threads(capacity.threads)
        self._candidate = PEERS[name].make(Exports(open_model(model).source, folder), capacity)
        self._sampled: set[Workload] = set()

    def answer(self, tokens: Sequence[int], new: int, batch: int) -> list[list[int]]:
        return [list(step) for step in self._candidate.answer(torch.tensor(tokens), new, batch)]

    def seconds(self, tokens: Sequence[int], workload: Workload) -> float:
        with torch.compiler.set_stance("fail_on_recompile" if workload in self._sampled else "default"):
            taken = seconds_of(self._candidate, torch.tensor(tokens), workload)
        self._sampled.add(workload)
        return taken
