"""Is this machine's fast path right? What `twinfer verify` does.

Two questions: does the whole model, through drawn schedules, stay within its budget of the reference; and does every op
that has a fast twin keep its guarantee on drawn cases. Nothing here needs Hypothesis.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from itertools import islice
from operator import add
from typing import Any

import torch

from ..compiled.path import CompiledPath
from ..spec.config import Storage
from ..spec.decoder import Decoder, Encoder, Path
from ..spec.weights import WeightSource
from .baseline import Baseline
from .case import Case, RandomPicker
from .check import described
from .encodings import Texts, compare_encodings, draw_texts
from .op import Fast, Op
from .paths import FreeRun, PathComparison, check_leaning, compare_paths, free_run
from .schedule import Schedule, draw_schedule
from .table import OPS
from .trial import Status

TypedTexts = tuple[Texts, Texts | None]


@dataclass(frozen=True, kw_only=True)
class OpVerdict:
    """How one op's fast twin did."""

    op: str
    path: Path
    function: str
    """The path's function that does it."""
    guarantee: str
    cases: int
    rejected: int
    """Cases on which the reference itself overflows."""
    largest_ratio: float
    """Largest error / bound; above 1 fails."""
    complaint: str | None
    """What is wrong, of the first case that fails."""

    @property
    def holds(self) -> bool:
        return self.complaint is None


@dataclass(frozen=True, kw_only=True)
class VerifyResult:
    storage: Storage
    drawn: tuple[Schedule | TypedTexts, ...]
    """What the model was taken through: schedules, or the texts that an encoder encoded together, with their types."""
    model: PathComparison
    """All of them together."""
    free_run: FreeRun | None
    """Greedy text of both, each fed its own tokens; None for an encoder."""
    ops: tuple[OpVerdict, ...]

    @property
    def holds(self) -> bool:
        said_the_same = self.free_run is None or self.free_run.holds
        return self.model.holds and said_the_same and all(op.holds for op in self.ops)


def verify(
    source: WeightSource,
    *,
    storage: Storage = Storage.FLOAT32,
    compute: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    candidate: Decoder | None = None,
    schedules: int = 4,
    cases: int = 25,
    seed: int = 0,
    report: Callable[[str], None] | None = None,
) -> VerifyResult:
    """Hold a path (by default the compiled one) against the reference, on the same stored weights.

    A model that cannot be extended is compared as what it is, an `Encoder`. `report` is told, in a line each, what is
    being done. Raises what the paths raise where they cannot be made.
    """
    tell = report or (lambda line: None)
    if candidate is None:
        tell(f"preparing the compiled path, weights kept in {storage}")
        given: dict[str, Any] = {"storage": storage, "compute": compute, "device": device}
        candidate = CompiledPath(source, **given, report=report, routes=bool(source.config.mixtures))
    tell("preparing the reference in float64, and in the candidate's arithmetic")
    baseline = Baseline.of(source, storage=storage, compute=compute, device=device)

    pickers = [RandomPicker(seed + index) for index in range(schedules)]
    drawn: list[Schedule | TypedTexts] = []
    comparisons: list[PathComparison] = []
    ran: FreeRun | None = None
    for index, pick in enumerate(pickers):
        if source.config.extensible:
            schedule = draw_schedule(pick, source.config)
            tell(f"comparing the paths through schedule {index + 1} of {schedules} ({len(schedule)} steps)")
            comparisons.append(compare_paths(baseline, candidate, schedule))
            drawn.append(schedule)
        else:
            assert isinstance(candidate, Encoder), "a path that runs an encoder encodes"
            texts = draw_texts(pick, source.config)
            tell(f"comparing the paths on batch {index + 1} of {schedules} ({len(texts[0])} texts)")
            comparisons.append(compare_encodings(baseline, candidate, *texts))
            drawn.append(texts)
    if source.config.extensible:
        tell("comparing their greedy text")
        prompt = [RandomPicker(seed).integer(0, source.config.vocabulary - 1)]
        ran = free_run(baseline, candidate, prompt, min(8, source.config.context - 1))
    model = reduce(add, comparisons, PathComparison())
    check_leaning(model, compute)
    tell("comparing op by op")
    return VerifyResult(
        storage=storage,
        drawn=tuple(drawn),
        model=model,
        free_run=ran,
        ops=tuple(verify_ops(cases=cases, seed=seed)),
    )


def verify_ops(*, cases: int = 25, seed: int = 0) -> list[OpVerdict]:
    """Every fast twin on drawn cases, run as it is written (compiling each for every shape would take hours)."""
    return [
        _judged(op, path, fast, cases, seed) for op in OPS.values() for path, twins in op.fast.items() for fast in twins
    ]


def fast_cases(op: Op, fast: Fast, seed: int) -> Iterator[Case]:
    """Drawn cases of the kind that the fast twin's path meets."""
    drawn = (op.cases(RandomPicker(seed + index)) for index in range(10_000))
    return (case for case in drawn if fast.applies(op.inputs(case)))


def _judged(op: Op, path: Path, fast: Fast, cases: int, seed: int) -> OpVerdict:
    judged, rejected, largest, complaint = 0, 0, 0.0, None
    for case in islice(fast_cases(op, fast, seed), cases):
        judged += 1
        verdict = op.guarantee.judge(op.trial(fast, case))
        rejected += verdict.status is Status.REJECTED
        largest = max(largest, verdict.ratio)
        if verdict.failed:
            complaint = f"{verdict.complaint}, on {case!r}"
            break
    return OpVerdict(
        op=op.name,
        path=path,
        function=fast.name,
        guarantee=described(op),
        cases=judged,
        rejected=rejected,
        largest_ratio=largest,
        complaint=complaint,
    )
