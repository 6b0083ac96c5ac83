"""Work in a subprocess, so that its peak memory, its caches, its environment and its threads are its own.

The subprocess is a new interpreter that runs this file: it makes an object, then calls the methods that it is asked
for, until this side closes. Requests and answers are pickled, over its standard input and over what was its standard
output; from then on the latter is standard error, for results go to ours, and what libraries print is no result.
"""

import contextlib
import functools
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import IO, Any, Self, TypeVar

from ..spec.errors import MachineError, TwinferError
from .reasons import reason

Result = TypeVar("Result")

_CLOSING_S = 5
"""Seconds for a subprocess to end by itself before it is killed."""


class SubprocessEnded(MachineError):
    """A subprocess ended before it answered; the message says how."""


class SubprocessFailed(RuntimeError):
    """Something raised an error over there that is not this project's own; its traceback is a note of this one."""


class Subprocess:
    """An object that lives in a subprocess, until it is closed."""

    def __init__(
        self, make: Callable[..., object], *arguments: Any, environment: Mapping[str, str] | None = None
    ) -> None:
        """Make the object, `make(*arguments)`, over there, with these environment variables beside our own.

        Raises what making it raises, as `call` does.
        """
        self._process = subprocess.Popen(
            [sys.executable, "-m", "twinfer.bench.subprocesses"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **(environment or {})},
        )
        try:
            self._request((make, arguments))
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def call(self, method: str, *arguments: Any) -> Any:
        """Return what the object's method returns.

        Raises the `TwinferError` that it raises, `SubprocessFailed` for another error, and `SubprocessEnded` where the
        subprocess is gone.
        """
        return self._request((method, arguments))

    def close(self) -> None:
        """End the subprocess; once more changes nothing."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # of a request that it never read
                pipe.close()
        try:
            self._process.wait(_CLOSING_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _request(self, request: tuple[Any, tuple[Any, ...]]) -> Any:
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None
        assert answers is not None
        try:
            _send(requests, request)
            error, answer = pickle.load(answers)
        except (OSError, EOFError, pickle.UnpicklingError):  # the last of an answer that breaks off
            raise SubprocessEnded(f"its process {self._how_it_ended()}") from None
        if error is None:
            return answer
        error.add_note(answer)
        raise error

    def _how_it_ended(self) -> str:
        try:
            return how_it_ended(self._process.wait(_CLOSING_S))
        except subprocess.TimeoutExpired:
            return "does not answer"


def run_in_subprocess(
    function: Callable[..., Result], *arguments: Any, what: str, environment: Mapping[str, str] | None = None
) -> Result:
    """Return what the function returns in a subprocess of its own.

    Raises as `Subprocess.call` does, and says that it was measuring `what` where the subprocess is gone.
    """
    try:
        with Subprocess(functools.partial, function, *arguments, environment=environment) as process:
            result: Result = process.call("__call__")
            return result
    except SubprocessEnded as error:
        raise MachineError(f"measuring {what}: {error}") from None


def how_it_ended(status: int) -> str:
    """Return what a process's exit status says, and what to do if a signal ended it.

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


def _send(pipe: IO[bytes], value: Any) -> None:
    pipe.write(pickle.dumps(value))
    pipe.flush()


def _serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Over there: make the object, then answer until the other side closes."""
    made: Any = None
    while True:
        try:
            what, arguments = pickle.load(requests)
            if callable(what):
                made = what(*arguments)
                _send(answers, (None, None))
            else:
                _send(answers, (None, getattr(made, what)(*arguments)))
        except EOFError:
            return
        except Exception as error:
            known = error if isinstance(error, TwinferError) else SubprocessFailed(reason(error))
            _send(answers, (known.with_traceback(None), traceback.format_exc()))


def main() -> None:
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        _serve(requests, answers)
    except (KeyboardInterrupt, BrokenPipeError):  # as whoever asks has it too, or is gone
        sys.exit(130)


if __name__ == "__main__":
    from twinfer.bench.subprocesses import main as imported_main  # errors are those of the module that others import

    imported_main()
