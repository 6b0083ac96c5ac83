"""Many ranks measured on this machine: `python -m twinfer.bench.ranks`, or `--json`, or only `--part one-rank`.

Every process has one thread, unless it is named otherwise. What is compared is measured by turns, and a ratio is the
median of those of single rounds. Weights are float32.

    one-rank    the path of many ranks with one rank, over the compiled path
    prefill     512 tokens on two ranks, over one process with two threads
    step        a decode step of two tensor ranks, over what one rank computes alone and its collectives
    experts     a decode step in which rows travel to experts, recorded and not
    pipeline    the dynamic queue over the baseline schedule, and what their slots say
    exchange    all-to-all messages between tensor groups, coordinated over direct
    memory      peak of a rank beyond that of the same process on a model of one layer a stage
    start       from the command to the first token
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, Self

from torch._C._distributed_c10d import TCPStore

from ..reference.parallel.schedule import baseline, dynamic_queue
from ..spec.parallel import Exchange, ParallelConfig
from .rank_process import EIGHT_HEADS, Process, Work
from .subprocesses import Subprocess
from .timing import quantile

PROMPT = 512
MICRO_BATCHES, PIPELINE_TOKENS = 4, 32
MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One thing measured, beside what is wanted."""

    what: str
    value: float
    wanted: float
    at_most: bool = False
    """Whether `wanted` is the largest that will do; else it is the smallest."""
    note: str = ""

    @property
    def reached(self) -> bool:
        return self.value <= self.wanted if self.at_most else self.value >= self.wanted


class Processes:
    """The ranks of a job, or one process with the compiled path."""

    def __init__(self, work: Work, threads: int = 1) -> None:
        ranks = 1 if work.parallel is None else work.parallel.ranks
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))
        self._pool = ThreadPoolExecutor(ranks)
        meeting = {
            "OMP_NUM_THREADS": str(threads),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "WORLD_SIZE": str(ranks),
        }

        def start(rank: int) -> Subprocess:
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            return Subprocess(Process, work, environment=meeting | own)

        self._ranks = list(self._pool.map(start, range(ranks)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.call("leave")
        for each in self._ranks:
            each.close()
        self._pool.shutdown()

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Return what the method returns on each rank; all call it at the same time."""
        return list(self._pool.map(lambda rank: rank.call(method, *arguments), self._ranks))

    def seconds(self, method: str, *arguments: Any) -> float:
        """Return the time on rank 0, which has the logits at the end."""
        seconds: float = self.call(method, *arguments)[0]
        return seconds

    def seconds_alone(self, batch: int, rank: int = 0) -> float:
        """Return the time of a step without what is sent, on one rank while the others do nothing."""
        seconds: float = self._ranks[rank].call("step_alone", batch)
        return seconds


def by_turns(samples: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Take every sample once uncounted, then by turns."""
    times: dict[str, list[float]] = {name: [] for name in samples}
    for turn in range(rounds + 1):
        for name, sample in samples.items():
            seconds = sample()
            if turn:
                times[name].append(seconds)
    return times


def median_ratio(over: Sequence[float], under: Sequence[float]) -> float:
    return quantile([first / second for first, second in zip(over, under, strict=True)], 0.5)


def ms(times: Sequence[float]) -> str:
    return f"{quantile(times, 0.5) * 1e3:.2f} ms"


def one_rank(rounds: int) -> Iterator[Figure]:
    with Processes(Work(model="smollm2")) as single, Processes(Work(model="smollm2", parallel=ParallelConfig())) as one:
        for what, method, size in (("decode step", "step", 1), (f"prefill {PROMPT}", "prefill", PROMPT)):
            times = by_turns(
                {"single": lambda: single.seconds(method, size), "one": lambda: one.seconds(method, size)},  # noqa: B023
                rounds,
            )
            yield Figure(
                what=f"one rank over the compiled path, smollm2, {what}",
                value=median_ratio(times["single"], times["one"]),
                wanted=0.95,
                note=f"{ms(times['one'])}; compiled path {ms(times['single'])}",
            )


def prefill(rounds: int) -> Iterator[Figure]:
    for model, parallel, prompts in (
        (EIGHT_HEADS, ParallelConfig(tensor=2), 1),
        ("smollm2", ParallelConfig(pipeline=2), 1),
        ("smollm2", ParallelConfig(pipeline=2), 4),
    ):
        with Processes(Work(model=model), threads=2) as single, Processes(Work(model=model, parallel=parallel)) as two:
            times = by_turns(
                {
                    "single": lambda: single.seconds("prefill", PROMPT, prompts),  # noqa: B023
                    "two": lambda: two.seconds("prefill", PROMPT, prompts),  # noqa: B023
                },
                rounds,
            )
        degree = "tensor 2" if parallel.tensor == 2 else "pipeline 2"
        yield Figure(
            what=f"{degree} over two threads, {model}, prefill {prompts} x {PROMPT}",
            value=median_ratio(times["single"], times["two"]),
            wanted=0.8,
            note=f"{ms(times['two'])}; two threads {ms(times['single'])}",
        )


def step(rounds: int) -> Iterator[Figure]:
    with Processes(Work(model=EIGHT_HEADS, parallel=ParallelConfig(tensor=2), batches=True)) as two:
        for batch in (1, 8):
            two.seconds("step", batch)
            count = len(two.call("calls", batch)[0])
            times = by_turns(
                {
                    "step": lambda: two.seconds("step", batch),  # noqa: B023
                    "alone": lambda: two.seconds_alone(batch),  # noqa: B023
                    "together": lambda: two.seconds("step_alone", batch),  # noqa: B023
                    "collective": lambda: two.seconds("collective", batch, count),  # noqa: B023
                },
                rounds,
            )
            parts = [own + count * each for own, each in zip(times["alone"], times["collective"], strict=True)]
            yield Figure(
                what=f"tensor 2 over compute and collectives, {EIGHT_HEADS}, step of {batch}",
                value=median_ratio(times["step"], parts),
                wanted=1.15,
                at_most=True,
                note=f"{ms(times['step'])}; alone {ms(times['alone'])}, both ranks at once without what is sent "
                f"{ms(times['together'])}; {count} collectives of "
                f"{ms(times['collective'])}",
            )


def experts(rounds: int) -> Iterator[Figure]:
    for parallel in (ParallelConfig(tensor=2, expert=2), ParallelConfig(data=2, expert=2)):
        batch, degree = parallel.data, "tensor 2" if parallel.tensor == 2 else "data 2"
        with Processes(Work(model="tiny-moe", parallel=parallel)) as two:
            two.seconds("step", batch)
            count = len(two.call("calls", batch)[0])
            times = by_turns(
                {
                    "recorded": lambda: two.seconds("step", batch),  # noqa: B023
                    "plain": lambda: two.seconds("step_plain", batch),  # noqa: B023
                },
                rounds,
            )
        yield Figure(
            what=f"recorded step over plain one, {degree}, expert 2, tiny-moe, step of {batch}",
            value=median_ratio(times["plain"], times["recorded"]),
            wanted=1.0,
            note=f"{ms(times['recorded'])}; plain {ms(times['plain'])}; {count} collectives",
        )


def pipeline(rounds: int) -> Iterator[Figure]:
    sizes = 2, MICRO_BATCHES, PIPELINE_TOKENS
    slots = baseline(*sizes).slots / dynamic_queue(*sizes).slots
    with Processes(Work(model="smollm2", parallel=ParallelConfig(pipeline=2))) as two:
        two.seconds("step", 1)
        stages = [quantile([two.seconds_alone(1, rank) for _ in range(rounds)], 0.5) for rank in range(2)]
        times = two.call("pipeline", MICRO_BATCHES, PIPELINE_TOKENS, rounds)[0]
    plain, queued = ([each[place] for each in times] for place in range(2))
    tokens = MICRO_BATCHES * PIPELINE_TOKENS
    yield Figure(
        what="dynamic queue over baseline schedule, pipeline 2, smollm2, share of the slots' ratio",
        value=median_ratio(plain, queued) / slots,
        wanted=0.9,
        note=f"{tokens / quantile(queued, 0.5):.1f} and {tokens / quantile(plain, 0.5):.1f} tokens/s; slots say "
        f"{slots:.2f}x; stages alone take {stages[0] * 1e3:.1f} and {stages[1] * 1e3:.1f} ms",
    )


def exchange(_: int) -> Iterator[Figure]:
    counted = {}
    for how in (Exchange.DIRECT, Exchange.COORDINATED):
        parallel = ParallelConfig(data=2, tensor=2, expert=4, exchange=how)
        with Processes(Work(model="tiny-moe", parallel=parallel, compiled=False)) as four:
            calls = four.call("calls_of_prompts", 16, 2)
        counted[how] = sum(
            sum(other // parallel.tensor != rank // parallel.tensor for other in ranks)
            for rank, of_rank in enumerate(calls)
            for kind, ranks, _ in of_rank
            if kind == "all_to_all"
        )
    yield Figure(
        what="coordinated over direct, messages between groups, tiny-moe, data 2, tensor 2, expert 4",
        value=counted[Exchange.COORDINATED] / counted[Exchange.DIRECT],
        wanted=1 / 2,
        at_most=True,
        note=f"{counted[Exchange.COORDINATED]} and {counted[Exchange.DIRECT]} messages",
    )


def memory(_: int) -> Iterator[Figure]:
    for name, parallel in (("pipeline 2", ParallelConfig(pipeline=2)), ("tensor 3", ParallelConfig(tensor=3))):
        found = []
        for layers in (None, parallel.pipeline):
            with Processes(Work(model="smollm2", parallel=parallel, layers=layers)) as ranks:
                ranks.seconds("prefill", 64)
                ranks.seconds("step", 1)
                found.append(ranks.call("memory"))
        for rank, ((peak, share), (small_peak, small_share)) in enumerate(zip(*found, strict=True)):
            allowed = (share - small_share) * 1.15 + 20 * MIB
            yield Figure(
                what=f"peak of rank {rank} of {name} beyond one layer a stage, smollm2, MiB",
                value=(peak - small_peak) / MIB,
                wanted=allowed / MIB,
                at_most=True,
                note=f"peak {peak / MIB:.0f}, weights {share / MIB:.0f}; one layer {small_peak / MIB:.0f}, "
                f"{small_share / MIB:.0f}; wanted is of what the other layers weigh",
            )


def start(_: int) -> Iterator[Figure]:
    command = [sys.executable, "-m", "twinfer", "generate", "smollm2", "--pipeline", "2", "--max-new-tokens", "1"]
    taken = []
    for _ in range(2):  # the first warms the caches
        began = time.perf_counter()
        subprocess.run([*command, "--prompt", "Once upon a time"], check=True, capture_output=True, env=os.environ)
        taken.append(time.perf_counter() - began)
    yield Figure(
        what="from the command to its end after one token, pipeline 2, smollm2, s",
        value=taken[-1],
        wanted=30.0,
        at_most=True,
        note=f"run before: {taken[0]:.1f} s",
    )


PARTS: dict[str, Callable[[int], Iterator[Figure]]] = {
    "one-rank": one_rank,
    "prefill": prefill,
    "step": step,
    "experts": experts,
    "pipeline": pipeline,
    "exchange": exchange,
    "memory": memory,
    "start": start,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS, default=[], help="only this part; repeatable")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="to take medians over (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print a list of objects instead of a table")
    args = parser.parse_args()
    found = []
    for part in args.part or PARTS:
        for figure in PARTS[part](args.rounds):
            found.append(figure)
            if not args.json:
                sign = "<=" if figure.at_most else ">="
                verdict = "reached" if figure.reached else "missed"
                print(
                    f"{figure.what}: {figure.value:.3g} ({sign} {figure.wanted:.3g}, {verdict}) {figure.note}",
                    flush=True,
                )
    if args.json:
        print(json.dumps([{**asdict(each), "reached": each.reached} for each in found]))


if __name__ == "__main__":
    main()
