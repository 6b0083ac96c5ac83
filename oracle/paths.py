"""Comparing whole models: a path beside the reference, through any schedule of open, extend and close.

Teacher-forced: the truth (the reference in float64), the eager reference (in the candidate's compute dtype) and the
candidate are fed the same tokens, and judged after each step. A row is one position of one sequence; its scale is that
of the head's contraction, max(|head| @ |last hidden|). Greedy choices must be equal unless the float64 gap is
within the sum of both budgets: such a tie is admissible, and printed. Choices of experts are forced (`routes`).

Shapes: B sequences, T_i new tokens of sequence i, R rows judged in a step, N eager runs, M hidden, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..reference.path import ReferenceSequences
from ..spec.decoder import Decoder, Routed, Routes, Sequences
from .baseline import Baseline, worst_of
from .budget import Budget
from .leaning import Leaning, is_judged, leaning
from .routes import Forced, RouteTie
from .rows import judge_rows
from .scale import linear_scale
from .schedule import GREEDY, Close, Extend, Open, Schedule, generation
from .steering import Steering
from .trial import Verdict, same_bits

WHOLE_MODEL = Budget(rows="R")


@dataclass(frozen=True, slots=True)
class Tie:
    """A greedy choice that differs from the truth's, within what both budgets allow."""

    step: int
    sequence: int
    position: int
    chosen: int
    best: int
    gap: float
    allowed: float

    def __str__(self) -> str:
        return (
            f"step {self.step}, sequence {self.sequence}, position {self.position}: token {self.chosen} instead of "
            f"{self.best}; they are {self.gap:.3g} apart, and {self.allowed:.3g} is allowed"
        )


@dataclass(slots=True, kw_only=True)
class PathComparison:
    """What came of a comparison. `holds` is the verdict; the rest says how near it was, or what went wrong."""

    rows: int = 0
    """Rows of logits, or of hidden vectors, judged."""
    decisions: int = 0
    """Greedy choices compared: one a row of logits."""
    largest_ratio: float = 0.0
    """Largest error / bound."""
    ties: list[Tie] = field(default_factory=list)
    choices: int = 0
    """Choices of experts that were compared: one a token and layer, of a path that reports them."""
    route_ties: list[RouteTie] = field(default_factory=list)
    """Choices that differ from the truth's and are admissible; and near-ties behind which rows were left out."""
    left_out: int = 0
    """Rows not judged: they stand behind a near-tie of a router, and the path does not say what it chose."""
    failures: list[str] = field(default_factory=list)
    leaning: Leaning | None = None
    """How the errors of all rows lean; more of them resolve more."""

    @property
    def holds(self) -> bool:
        return not self.failures

    def __add__(self, other: "PathComparison") -> "PathComparison":
        return PathComparison(
            rows=self.rows + other.rows,
            decisions=self.decisions + other.decisions,
            largest_ratio=max(self.largest_ratio, other.largest_ratio),
            ties=self.ties + other.ties,
            choices=self.choices + other.choices,
            route_ties=self.route_ties + other.route_ties,
            left_out=self.left_out + other.left_out,
            failures=self.failures + other.failures,
            leaning=_sum(self.leaning, other.leaning),
        )


def _sum(one: Leaning | None, other: Leaning | None) -> Leaning | None:
    return one + other if one is not None and other is not None else one or other


class PathMismatch(AssertionError):
    """A path departed from the reference."""


def compare_paths(baseline: Baseline, candidate: Decoder, schedule: Schedule) -> PathComparison:
    """Run a schedule on the reference and the candidate, and judge every row of logits they return."""
    return Comparison(baseline, candidate).run(schedule)


def assert_paths_agree(baseline: Baseline, candidate: Decoder, schedule: Schedule) -> PathComparison:
    """`compare_paths`, raising `PathMismatch` with all failures and the schedule where it does not hold."""
    comparison = compare_paths(baseline, candidate, schedule)
    if not comparison.holds:
        raise PathMismatch("\n".join([*comparison.failures, f"schedule = {schedule!r}"]))
    return comparison


class Comparison:
    """A comparison under way: feed it one step at a time, or a schedule."""

    def __init__(self, baseline: Baseline, candidate: Decoder) -> None:
        self.result = PathComparison()
        self._steering = Steering(baseline.truth, baseline.runs)
        self._truth, self._eager, self._candidate = self._steering.truth, self._steering.eager, candidate
        self._bounding = len(baseline.eager)
        self._groups: dict[str, _Group] = {}
        self._step = 0
        self._kept: tuple[int, list[Tensor], list[Tensor]] | None = None
        self._head = baseline.truth.weights.projection

    def run(self, schedule: Schedule) -> PathComparison:
        try:
            for step in schedule:
                self.do(step)
                if not self.result.holds:  # once apart, caches differ and every later row would be reported
                    break
        finally:
            for group in list(self._groups):
                self.do(Close(group))
        check_leaning(self.result, self._eager[0].compute)
        return self.result

    def do(self, step: Open | Extend | Close) -> None:
        match step:
            case Open(name, batch, reserve):
                self._groups[name] = _Group(
                    truth=self._truth.open(batch, reserve),
                    eager=[eager.open(batch, reserve) for eager in self._eager],
                    candidate=self._candidate.open(batch, reserve),
                    last=[None] * batch,
                    texts=[_Text() for _ in range(batch)],
                )
            case Extend(name, new_tokens, every_position):
                self._extend(self._groups[name], new_tokens, every_position)
            case Close(name):
                group = self._groups.pop(name)
                for sequences in (group.truth, *group.eager, group.candidate):
                    sequences.close()
                if self.result.holds and is_judged(self._eager[0].compute):
                    self._lean(group)
        self._check_kept()
        self._step += 1

    def _lean(self, group: "_Group") -> None:
        for text in group.texts:
            if text.rows:
                error_RV, eager_errors_NRV, floor_R = (torch.cat(each, -2) for each in zip(*text.errors, strict=True))
                of_rows = (text.rows, error_RV, eager_errors_NRV, floor_R[:, 0])
                each = leaning(self._truth, torch.tensor(text.tokens), *of_rows, route=text.route())
                self.result.leaning = _sum(self.result.leaning, each)

    def _check_kept(self) -> None:
        """Logits belong to the caller: those of the step before must be as they were, NaN included."""
        if self._kept is not None:
            step, returned, copies = self._kept
            if not all(map(same_bits, returned, copies)):
                self._fail(f"the logits that step {step} returned were changed by step {self._step}")

    def lengths(self, group: str) -> tuple[int, ...]:
        return self._groups[group].truth.lengths

    @torch.no_grad()
    def _extend(self, group: "_Group", new_tokens: Sequence[tuple[int, ...]], every_position: bool) -> None:
        before = group.truth.lengths
        tokens = [_tensor(new, last) for new, last in zip(new_tokens, group.last, strict=True)]
        got = self._candidates(group, tokens, every_position)
        reported = self._reported([len(token_T) for token_T in tokens])
        self._steering.begin(reported)
        true_hidden = self._truth.extend_hidden(group.truth, tokens)
        self._steering.follow()
        runs = [path.extend_hidden(held, tokens) for path, held in zip(self._eager, group.eager, strict=True)]
        eager_hidden = [torch.stack(samples) for samples in zip(*runs, strict=True)]
        for index, (hidden_TM, eager_NTM) in enumerate(zip(true_hidden, eager_hidden, strict=True)):
            if len(hidden_TM):
                choice = int(self._truth.logits(hidden_TM[-1]).argmax())
                group.last[index] = _Last(hidden_TM[-1:], eager_NTM[:, -1:], choice)
        first = before
        if not every_position:
            true_hidden = [_known(last).hidden_1M for last in group.last]
            eager_hidden = [_known(last).eager_E1M for last in group.last]
            first = tuple(length - 1 for length in group.truth.lengths)
        self._check_kept()
        self._kept = (self._step, got, [rows.clone() for rows in got])
        if group.candidate.lengths != group.truth.lengths:
            self._fail(f"lengths are {group.candidate.lengths}, the reference's {group.truth.lengths}")
        for text, token_T in zip(group.texts, tokens, strict=True):
            text.tokens.extend(token_T.tolist())
        self._choose(group, before, [len(token_T) for token_T in tokens], reported is not None)
        for index, rows in enumerate(zip(got, true_hidden, eager_hidden, strict=True)):
            self._judge(index, first[index], group.texts[index], *rows)

    def _candidates(self, group: "_Group", tokens: list[Tensor], every_position: bool) -> list[Tensor]:
        fed = [token_T.clone().to(self._candidate.device) for token_T in tokens]
        if every_position:
            return list(self._candidate.extend(group.candidate, fed, every_position=True))
        return list(self._candidate.extend(group.candidate, fed)[:, None])

    def _reported(self, lengths: list[int]) -> Routes | None:
        """The experts that the candidate says it chose; None where it says nothing, or nothing of use."""
        if not self._steering.layers or not isinstance(self._candidate, Routed):
            return None
        routes = self._candidate.routes
        misfit = self._steering.misfit(routes, lengths)
        if misfit is not None:
            self._fail(f"step {self._step}: {misfit}")
        return routes if misfit is None else None

    def _choose(self, group: "_Group", first: tuple[int, ...], lengths: list[int], reports: bool) -> None:
        calls = self._steering.judged(self._step, first, lengths, reports)
        self.result.choices += sum(lengths) * len(self._steering.layers) if reports else 0
        self.result.route_ties += [tie for tie in calls.ties if tie.admissible]
        wrong = min((t for t in calls.ties if not t.admissible), key=lambda t: (t.layer, t.position), default=None)
        if wrong is not None:
            self._fail(f"a choice of experts that no tie explains: {wrong}")
        for sequence, tie in calls.cut.items():
            if group.texts[sequence].cut is None:
                group.texts[sequence].cut = tie.position
                self.result.route_ties.append(tie)
        for sequence, choices in calls.choices.items():
            group.texts[sequence].choices.append(choices)

    def _judge(
        self, sequence: int, first: int, text: "_Text", got_RV: Tensor, hidden_RM: Tensor, eager_NRM: Tensor
    ) -> None:
        truth_RV = self._truth.logits(hidden_RM).cpu()
        runs = [path.logits(eager_RM).cpu() for path, eager_RM in zip(self._eager, eager_NRM, strict=True)]
        eager_RV = worst_of(runs[: self._bounding], truth_RV)
        got_RV = got_RV.cpu()
        where = f"step {self._step}, sequence {sequence}, positions from {first}"
        if got_RV.shape != truth_RV.shape or got_RV.dtype != eager_RV.dtype:
            self._fail(
                f"{where}: logits are {list(got_RV.shape)} of {got_RV.dtype}, "
                f"the reference's {list(truth_RV.shape)} of {eager_RV.dtype}"
            )
            return
        judged = len(truth_RV) if text.cut is None else min(max(text.cut - first, 0), len(truth_RV))
        self.result.left_out += len(truth_RV) - judged
        truth_RV, got_RV, eager_RV, hidden_RM = (x[:judged] for x in (truth_RV, got_RV, eager_RV, hidden_RM))
        if truth_RV.numel() == 0:
            return
        reach_RV = self._truth.config.logit_scale * linear_scale(hidden_RM.abs(), self._head)
        scale_R1 = reach_RV.amax(-1, keepdim=True).cpu()
        verdict = judge_rows(WHOLE_MODEL, "R V", got_RV, eager_RV, truth_RV, scale_R1)
        self.result.rows += len(truth_RV)
        self.result.decisions += len(truth_RV)
        if verdict.failed:
            self._fail(f"{where}: {_with_details(verdict)}")
            return
        self.result.largest_ratio = max(self.result.largest_ratio, verdict.ratio)
        self._decide(sequence, first, got_RV, eager_RV, truth_RV, scale_R1)
        if first not in text.rows and bool(torch.isfinite(truth_RV).all()):  # a repeated row says nothing new
            eager_errors_NRV = torch.stack(runs)[:, :judged].double() - truth_RV
            floor_R1 = torch.finfo(got_RV.dtype).eps * scale_R1
            text.errors.append((got_RV.double() - truth_RV, eager_errors_NRV, floor_R1))
            text.rows.extend(range(first, first + len(truth_RV)))

    def _decide(
        self, sequence: int, first: int, got_RV: Tensor, eager_RV: Tensor, truth_RV: Tensor, scale_R1: Tensor
    ) -> None:
        best_R, chosen_R = truth_RV.argmax(-1), got_RV.argmax(-1)
        eps = torch.finfo(got_RV.dtype).eps
        budget_R = WHOLE_MODEL.k * (eager_RV.double() - truth_RV).abs().amax(-1) + WHOLE_MODEL.c * eps * scale_R1[:, 0]
        for row in (best_R != chosen_R).nonzero()[:, 0].tolist():
            best, chosen = int(best_R[row]), int(chosen_R[row])
            gap = float(truth_RV[row, best] - truth_RV[row, chosen])
            tie = Tie(self._step, sequence, first + row, chosen, best, gap, 2 * float(budget_R[row]))
            if gap <= tie.allowed:
                self.result.ties.append(tie)
            else:
                self._fail(f"another greedy choice that no tie explains: {tie}")

    def _fail(self, what: str) -> None:
        self.result.failures.append(what)


@dataclass(frozen=True, slots=True)
class _Last:
    """Of a sequence's last token: hidden vectors, and the truth's greedy choice of what follows."""

    hidden_1M: Tensor
    eager_E1M: Tensor
    choice: int


@dataclass(slots=True)
class _Group:
    truth: ReferenceSequences
    eager: list[ReferenceSequences]
    candidate: Sequences
    last: list[_Last | None]
    texts: list["_Text"]


@dataclass(slots=True)
class _Text:
    """The tokens of a sequence so far, and the errors of its rows: the candidate's, the eager runs', the least."""

    tokens: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    errors: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    choices: list[list[Tensor]] = field(default_factory=list)
    """For each step and layer with experts, what the truth was forced to."""
    cut: int | None = None
    """The position from which rows are left out."""

    def route(self) -> Forced:
        """The same choices for all tokens at once."""
        return Forced([torch.cat(steps) for steps in zip(*self.choices, strict=True)])


def check_leaning(result: PathComparison, compute: torch.dtype) -> None:
    """Add a failure where errors, small as they are, lean one way."""
    fault = result.leaning.fault(compute) if result.leaning is not None else None
    if fault is not None and result.holds:
        result.failures.append(fault)


def _known(last: _Last | None) -> _Last:
    assert last is not None, "a path refuses to extend a sequence that stays empty"
    return last


def _tensor(new: tuple[int, ...], last: _Last | None) -> Tensor:
    if new == (GREEDY,):
        return torch.tensor([_known(last).choice])
    return torch.tensor(new, dtype=torch.int64)


def _with_details(verdict: Verdict) -> str:
    return "\n  ".join([verdict.complaint, *verdict.details])


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeRun:
    """Greedy text of the truth and of a candidate, each fed its own tokens."""

    truth: tuple[int, ...]
    candidate: tuple[int, ...]
    tie: Tie | RouteTie | None
    """What parts them, if it is an admissible tie, of tokens or of experts: after it, nothing can be compared."""

    @property
    def equal_for(self) -> int:
        """How many tokens they share from the start."""
        pairs = zip(self.truth, self.candidate, strict=True)
        return next((index for index, (a, b) in enumerate(pairs) if a != b), len(self.truth))

    @property
    def holds(self) -> bool:
        """Whether they are equal, or part at an admissible tie."""
        return self.truth == self.candidate or self.tie is not None


def free_run(baseline: Baseline, candidate: Decoder, prompt: Sequence[int], new_tokens: int) -> FreeRun:
    """Let both generate greedily from a prompt, and say how far they agree.

    Up to the first difference both were fed the same tokens, so the teacher-forced comparison judges that choice.
    """
    one, other = (_greedy(path, prompt, new_tokens) for path in (baseline.truth, candidate))
    parted = FreeRun(truth=one, candidate=other, tie=None)
    if one == other:
        return parted
    forced = compare_paths(baseline, candidate, generation((tuple(prompt),), parted.equal_for + 1))
    at = len(prompt) - 1 + parted.equal_for
    if not forced.holds:
        return parted
    experts = (tie for tie in forced.route_ties if tie.position <= at)
    return replace(parted, tie=next((tie for tie in forced.ties if tie.position == at), next(experts, None)))


def _greedy(path: Decoder, prompt: Sequence[int], new_tokens: int) -> tuple[int, ...]:
    sequences = path.open(1, min(len(prompt) + new_tokens, path.config.context))
    out: list[int] = []
    token_T = torch.tensor(prompt, device=path.device)
    for _ in range(new_tokens):
        out.append(int(path.extend(sequences, [token_T])[0].argmax()))
        token_T = torch.tensor(out[-1:], device=path.device)
    sequences.close()
    return tuple(out)
