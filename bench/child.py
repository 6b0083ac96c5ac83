"""A measurement in a process of its own: started here, and what that process does with its one argument.

The argument is a task, as JSON; the last line that the process prints is its result, or `{"error": ...}`. Both are
dataclasses. Standard error is shared.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, TypeVar

from ..spec.errors import MachineError, TwinferError

Result = TypeVar("Result")


def run_child(
    module: str, task: Any, result: type[Result], what: str, environment: Mapping[str, str] | None = None
) -> Result:
    """The result of `python -m MODULE TASK`, with these environment variables beside our own.

    Raises `TwinferError` with what the process tells, `MachineError` if it was killed while measuring `what`, and
    `RuntimeError` if it failed in another way.
    """
    command = [sys.executable, "-m", module, json.dumps(asdict(task))]
    child = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})}, check=False
    )
    if child.returncode < 0:
        raise MachineError(f"measuring {what}: its process {how_it_ended(child.returncode)}")
    if child.returncode:
        raise RuntimeError(f"measuring {what} failed; its own traceback is above")
    told = json.loads(child.stdout.splitlines()[-1])
    if "error" in told:
        raise TwinferError(told["error"])
    return result(**told)


def how_it_ended(status: int) -> str:
    """What a process's exit status says, and what to do if a signal ended it.

    >>> how_it_ended(-signal.SIGKILL), how_it_ended(3)
    ('was killed by SIGKILL; is there enough memory?', 'ended with exit code 3')
    """
    if status >= 0:
        return f"ended with exit code {status}"
    names = {each.value: each.name for each in signal.Signals}  # not all have one
    advice: dict[int, str] = {
        signal.SIGKILL: "; is there enough memory?",
        signal.SIGILL: ", for an instruction that this machine does not run; build that library anew without it",
    }
    return f"was killed by {names.get(-status, f'signal {-status}')}{advice.get(-status, '')}"


def answer_parent(task: type[Any], measure: Callable[[Any], Any]) -> None:
    """In the new process: measure what the argument says, and print the result."""
    try:
        told = asdict(measure(task(**json.loads(sys.argv[1]))))
    except TwinferError as error:
        told = {"error": str(error)}
    print(json.dumps(told))
