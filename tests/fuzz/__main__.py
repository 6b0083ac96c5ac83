"""Damage valid models and open them: `python -m tests.fuzz --count 5000 --seed 0`, in a checkout, on Linux.

Every mutant must be refused by a `TwinferError` in one line, or be read as some other valid model. Each is opened in a
child process with limits of time and memory, which is used again as long as it lives.

    handled   refused by a TwinferError
    same      the answer of the undamaged model
    other     another answer, which may be right: a damaged weight is a weight
    crash     another exception, or a signal
    hang      no answer in time
    memory    more memory than such a model takes

Prints a table, and how to run each bad mutant alone; exits with status 1 where a mutant crashed, hung or took memory.
"""

import argparse
import multiprocessing
import tempfile
import time
from collections import Counter
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from . import seeds
from .child import serve

OUTCOMES = ("handled", "same", "other", "crash", "hang", "memory")
BAD = OUTCOMES[3:]

START_SECONDS = 300
"""Time to answer for all undamaged models."""


class Child:
    """A process that tries mutants one by one, replaced when it dies or hangs."""

    def __init__(self, models: list[Path], seed: int, seconds: float):
        self._models, self._seed, self._seconds = models, seed, seconds
        self._process: BaseProcess | None = None
        self._connection: Connection

    def tried(self, index: int) -> tuple[str, str]:
        if self._process is None:
            self._start()
        self._connection.send(index)
        try:
            if self._connection.poll(self._seconds):
                outcome: tuple[str, str] = self._connection.recv()
                return outcome
            self.stop()
            return "hang", f"no answer in {self._seconds} seconds"
        except (EOFError, ConnectionError):
            assert self._process is not None
            self._process.join()
            code = self._process.exitcode
            self.stop()
            return "crash", f"the process ended with status {code}"

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
        self._process = None

    def _start(self) -> None:
        fork = multiprocessing.get_context("fork")
        self._connection, theirs = fork.Pipe()
        self._process = fork.Process(target=serve, args=(theirs, self._models, self._seed), daemon=True)
        self._process.start()
        theirs.close()
        if not self._connection.poll(START_SECONDS) or self._connection.recv() != "ready":
            raise RuntimeError("an undamaged model gave no answer")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=5000, help="how many mutants")
    parser.add_argument("--seed", type=int, default=0, help="what they are drawn by")
    parser.add_argument("--only", type=int, help="this mutant alone, with what came of it")
    parser.add_argument("--seconds", type=float, default=30, help="the time that each may take")
    options = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        models = seeds.make(Path(folder))
        child = Child(models, options.seed, options.seconds)
        table: Counter[tuple[str, str]] = Counter()
        for index in range(options.count) if options.only is None else [options.only]:
            name = models[index % len(models)].name
            outcome, word = child.tried(index)
            table[name, outcome] += 1
            if outcome in BAD or options.only is not None:
                again = f"python -m tests.fuzz --seed {options.seed} --only {index}"
                print(f"{outcome}: mutant {index} of {name}; {again}\n{word}", flush=True)
        child.stop()
    print_table(table, [model.name for model in models])
    print(f"{table.total()} mutants in {time.monotonic() - begin:.0f} s")
    return int(any(table[name, outcome] for name, outcome in table if outcome in BAD))


def print_table(table: Counter[tuple[str, str]], names: list[str]) -> None:
    print(f"{'':14}" + "".join(f"{outcome:>9}" for outcome in OUTCOMES))
    rows = {name: [table[name, outcome] for outcome in OUTCOMES] for name in names}
    rows["all"] = [sum(column) for column in zip(*rows.values(), strict=True)]
    for name, row in rows.items():
        print(f"{name:14}" + "".join(f"{number:9}" for number in row))


if __name__ == "__main__":
    raise SystemExit(main())
