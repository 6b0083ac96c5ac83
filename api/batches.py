"""Many prompts through one path, in batches, their results kept in a file as they finish.

Each line of the file is one prompt's result, with a digest of everything that it depends on. A run that was killed is
gone on with: prompts whose results are there are not run again, and a line that was cut short is written anew. So
whenever it is killed nothing that finished is lost, and nothing is there twice.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from twinfer.offload.locked import locked
from twinfer.spec.errors import RequestError

from .generation import Output

Run = Callable[[Sequence[int]], Iterable[tuple[int, Output]]]
"""Takes the numbers of some prompts; returns, as they finish, their places among these and what they yield."""


def run_batches(
    file: Path, prompts: Sequence[Sequence[int]], request: Any, batch: int, run: Run, report: Callable[[str], None]
) -> int:
    """Run the prompts that the file lacks, `batch` at a time; returns how many that were.

    `request` is JSON of what results depend on besides the prompt. Raises `RequestError` where the file holds results
    of other prompts or another request, is being written by another process, or cannot be written.
    """
    digests = [_digest(index, prompt, request) for index, prompt in enumerate(prompts)]
    new = not file.exists()
    try:
        file.touch()
        with (
            locked(file, f"{file} is being written by another process; wait for it, or give another file"),
            _removed_if_empty(file) if new else nullcontext(),
        ):
            done = _finished(file, digests)
            left = [index for index in range(len(prompts)) if index not in done]
            begin_s = time.perf_counter()
            for first in range(0, len(left), batch):
                numbers = left[first : first + batch]
                _append(file, (_line(numbers[place], output, digests) for place, output in run(numbers)))
                ran = first + len(numbers)
                rest_s = (time.perf_counter() - begin_s) / ran * (len(left) - ran)
                report(f"{len(done) + ran} of {len(prompts)} prompts, {rest_s:.0f} s left")
            return len(left)
    except OSError as error:
        raise RequestError(f"{file} cannot be written: {error.strerror or error}") from None


@contextmanager
def _removed_if_empty(file: Path) -> Iterator[None]:
    """Remove the file where what happens within fails before a result is in it."""
    try:
        yield
    except BaseException:
        if not file.stat().st_size:
            file.unlink()
        raise


def _finished(file: Path, digests: Sequence[str]) -> set[int]:
    """Return the prompts whose results are there, and cut off a line that is not whole."""
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    done: set[int] = set()
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            result = json.loads(line)
            index, digest = result["prompt"], result["digest"]
            fits = isinstance(index, int) and 0 <= index < len(digests) and digest == digests[index]
        except (ValueError, TypeError, KeyError):
            fits = False
        if not fits:
            raise RequestError(
                f"{file}, line {number} is no result of these prompts and options; give those it was made with, or "
                "another file"
            )
        done.add(index)
    if len(whole) < len(content):
        os.truncate(file, len(whole))
    return done


def _append(file: Path, lines: Iterable[str]) -> None:
    """Write each line as it comes; once the last is written all are on the disk."""
    with file.open("a", encoding="utf-8") as out:
        for line in lines:
            out.write(line)
            out.flush()
        os.fsync(out.fileno())


def _line(index: int, output: Output, digests: Sequence[str]) -> str:
    result = {"prompt": index, **asdict(output), "digest": digests[index]}
    return json.dumps(result, allow_nan=False) + "\n"


def _digest(index: int, prompt: Sequence[int], request: Any) -> str:
    return hashlib.sha256(json.dumps([index, list(prompt), request], sort_keys=True).encode()).hexdigest()[:16]
