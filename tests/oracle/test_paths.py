"""Whole models compared: schedules are what they claim, right paths pass, seeded faults of paths are caught."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from twinfer.oracle.baseline import Baseline, worst_of
from twinfer.oracle.case import RandomPicker
from twinfer.oracle.model_alarms import draw_source
from twinfer.oracle.models import RandomSource, draw_model_config
from twinfer.oracle.ops.layer import LAYER
from twinfer.oracle.paths import PathComparison, PathMismatch, assert_paths_agree, compare_paths, free_run
from twinfer.oracle.schedule import GREEDY, Close, Extend, Open, Schedule, draw_schedule, generation
from twinfer.oracle.strategies import drawn
from twinfer.reference.components import DEFAULT
from twinfer.reference.path import ReferencePath, ReferenceSequences
from twinfer.spec.config import Head, NormConfig, NormKind, Storage
from twinfer.spec.weights import HeadWeights, LinearWeights, NormWeights

CONFIG = draw_model_config(RandomPicker(3), context=24)
seeds = st.integers(0, 2**20)


@given(schedule=drawn(lambda pick: draw_schedule(pick, CONFIG)))
@settings(max_examples=200)
def test_a_schedule_asks_for_nothing_impossible(schedule: Schedule) -> None:
    """Groups are open when used, closed at the end, never empty, never over the context; ids are in the vocabulary."""
    lengths: dict[str, list[int]] = {}
    for step in schedule:
        match step:
            case Open(group, batch, reserve):
                assert group not in lengths
                assert 1 <= reserve <= CONFIG.context
                lengths[group] = [0] * batch
            case Extend(group, new_tokens):
                assert len(new_tokens) == len(lengths[group])
                for row, new in enumerate(new_tokens):
                    assert new == (GREEDY,) if GREEDY in new else all(0 <= token < CONFIG.vocabulary for token in new)
                    assert lengths[group][row] > 0 or GREEDY not in new
                    lengths[group][row] += len(new)
                    assert 0 < lengths[group][row] <= CONFIG.context
            case Close(group):
                del lengths[group]
    assert not lengths


def test_schedules_hold_what_they_promise() -> None:
    """Ragged prompts, chunks, decode steps, sequences given nothing, growth, two groups open at a time."""
    seen: dict[str, int] = {}
    for seed in range(200):
        lengths: dict[str, list[int]] = {}
        reserves: dict[str, int] = {}
        for step in draw_schedule(RandomPicker(seed), CONFIG):
            features = {"two groups": len(lengths) == 2}
            match step:
                case Open(group, batch, reserve):
                    lengths[group], reserves[group] = [0] * batch, reserve
                case Close(group):
                    del lengths[group]
                case Extend(group, new_tokens, every_position):
                    held = lengths[group]
                    features |= {
                        "ragged": len({len(new) for new in new_tokens}) > 1,
                        "nothing": () in new_tokens,
                        "decode": (GREEDY,) in new_tokens,
                        "chunk": any(h and len(new) > 1 for h, new in zip(held, new_tokens, strict=True)),
                        "every position": every_position,
                    }
                    held[:] = [h + len(new) for h, new in zip(held, new_tokens, strict=True)]
                    features["growth"] = max(held) > reserves[group]
            for feature, here in features.items():
                seen[feature] = seen.get(feature, 0) + here
    assert min(seen.values()) >= 50, seen


def yardstick_of(seed: int, storage: Storage = Storage.FLOAT32) -> tuple[RandomSource, Baseline]:
    source = RandomSource(draw_model_config(RandomPicker(seed)), seed)
    return source, Baseline.of(source, storage=storage)


@given(seed=seeds, storage=st.sampled_from(Storage))
@settings(max_examples=12)
def test_a_path_that_sums_in_another_order_agrees(seed: int, storage: Storage) -> None:
    source, baseline = yardstick_of(seed, storage)
    components: Any = LAYER.variants["summed_otherwise"]
    path = ReferencePath(source, storage=storage, components=components.keywords["components"])
    comparison = assert_paths_agree(baseline, path, draw_schedule(RandomPicker(seed), source.config))
    assert comparison.rows > 0
    assert 0 < comparison.largest_ratio <= 1


class Faulty(ReferencePath):
    """A reference path with one mistake of the kind that batching, caching and reuse of buffers bring."""

    fault: str
    _buffer: Tensor | None = None

    def extend(  # type: ignore[override]
        self, sequences: ReferenceSequences, new_tokens: Sequence[Tensor], *, every_position: bool = False
    ) -> Tensor | list[Tensor]:
        held = list(sequences.states)
        match self.fault:
            case "sequences share a cache":
                sequences.states[:] = [held[0]] * len(held) if len({s.length for s in held}) == 1 else held
            case "a token is lost in decoding" if all(len(new) == 1 for new in new_tokens) and max(sequences.lengths):
                new_tokens = [torch.zeros_like(new) for new in new_tokens]
            case "the last token is fed twice":
                new_tokens = [torch.cat([new[:1], new[:-1]]) for new in new_tokens]
            case "padded on the left with token 0":
                longest = max(len(new) for new in new_tokens)
                pads = [torch.zeros(longest - len(new) if len(new) else 0, dtype=torch.int64) for new in new_tokens]
                room = all(s.length + longest <= self.config.context for s in held)
                new_tokens = [torch.cat([p, n]) for p, n in zip(pads, new_tokens, strict=True)] if room else new_tokens
        out: Any = super().extend(sequences, new_tokens, every_position=every_position)  # type: ignore[call-overload]
        match self.fault:
            case "given nothing, zeros come back" if not every_position:
                out = torch.stack([row if len(n) else 0 * row for row, n in zip(out, new_tokens, strict=True)])
            case "rows come back in another order" if not every_position:
                out = out.flip(0)
            case "logits in half precision" if not every_position:
                out = out.to(torch.bfloat16).to(out.dtype)
            case "logits in another dtype" if not every_position:
                out = out.double()
            case "logits of the last position alone" if every_position:
                out = [rows[-1:].expand_as(rows) for rows in out]
            case "the returned buffer is used again" if not every_position:
                if self._buffer is None or self._buffer.shape != out.shape:
                    self._buffer = out.clone()
                out = self._buffer.copy_(out)
        return out  # type: ignore[no-any-return]


FAULTS = (
    "sequences share a cache",
    "a token is lost in decoding",
    "the last token is fed twice",
    "padded on the left with token 0",
    "given nothing, zeros come back",
    "rows come back in another order",
    "logits in half precision",
    "logits in another dtype",
    "logits of the last position alone",
    "the returned buffer is used again",
)


@pytest.mark.parametrize("fault", FAULTS)
def test_no_fault_of_a_path_is_missed(fault: str) -> None:
    """Within 30 drawn models and schedules."""
    for seed in range(30):
        source, baseline = yardstick_of(seed)
        path = Faulty(source)
        path.fault = fault
        schedule = draw_schedule(RandomPicker(seed), source.config)
        if not compare_paths(baseline, path, schedule).holds:
            with pytest.raises(PathMismatch, match="schedule = "):
                assert_paths_agree(baseline, path, schedule)
            return
    pytest.fail(f"{fault}: passed 30 schedules")


@pytest.mark.parametrize("name", [name for name in LAYER.mutants if hasattr(LAYER.mutants[name], "keywords")])
def test_no_fault_of_a_component_is_missed(name: str) -> None:
    """The seeded faults of the ops, inside a whole model; those of experts inside one that has some."""
    wrong: Any = LAYER.mutants[name]
    components = wrong.keywords["components"]
    of_experts = components.moe is not DEFAULT.moe or components.route is not DEFAULT.route
    for seed in range(30):
        source = draw_source(RandomPicker(seed), seed) if of_experts else yardstick_of(seed)[0]
        baseline = Baseline.of(source)
        path = ReferencePath(source, components=components)
        if not compare_paths(baseline, path, draw_schedule(RandomPicker(seed), source.config)).holds:
            return
    pytest.fail(f"{name}: passed 30 schedules")


def test_a_schedule_printed_runs_again() -> None:
    schedule = draw_schedule(RandomPicker(5), CONFIG)
    assert eval(repr(schedule), {"Open": Open, "Extend": Extend, "Close": Close}) == schedule


class Twins(RandomSource):
    """A model that always finds tokens 0 and 1 likeliest, and equally so: their rows of the head are the same."""

    def head(self) -> HeadWeights:
        hidden, vocabulary = self.config.hidden, self.config.vocabulary
        weight_NI = 0.01 * torch.randn(vocabulary, hidden, generator=torch.Generator().manual_seed(0))
        weight_NI[:2] = 1.0
        norm = NormWeights(gain_M=torch.full((hidden,), 0.01), bias_M=torch.ones(hidden))
        return HeadWeights(norm=norm, projection=LinearWeights(weight_NI=weight_NI))


class Nudged(ReferencePath):
    """Adds to the logit of token 1."""

    def __init__(self, source: RandomSource, by: float) -> None:
        super().__init__(source)
        self.by = by

    def extend(self, *args: Any, **options: Any) -> Any:
        out = super().extend(*args, **options)
        for rows in out if isinstance(out, list) else [out]:
            rows[..., 1] += self.by
        return out


def tied_source() -> Twins:
    final_norm = NormConfig(kind=NormKind.LAYER, epsilon=1e-5)
    plain = replace(CONFIG, head_bias=False, logit_scale=1.0, logit_softcap=None, embedding_size=None)
    return Twins(replace(plain, head=Head.UNTIED, final_norm=final_norm), 1)


def test_an_admissible_tie_is_printed_and_no_failure() -> None:
    """Tokens 0 and 1 tie exactly; a candidate that prefers 1 by less than rounding is right, and says so."""
    source = tied_source()
    baseline = Baseline.of(source)
    schedule = generation(((3, 4, 5),), 4)
    right = compare_paths(baseline, ReferencePath(source), schedule)
    assert right.holds
    assert not right.ties
    last = baseline.truth.extend(baseline.truth.open(1, 3), [torch.tensor([3, 4, 5])])[0]
    assert set(last.topk(2).indices.tolist()) == {0, 1}, "the model does not tie"
    step = float(torch.finfo(torch.float32).eps * last.max())
    nudged = compare_paths(baseline, Nudged(source, step), schedule)
    assert nudged.holds, nudged.failures
    assert nudged.ties
    assert "token 1 instead of 0" in str(nudged.ties[0])


def test_free_running_text_is_compared_up_to_the_first_tie() -> None:
    source = tied_source()
    baseline = Baseline.of(source)
    same = free_run(baseline, ReferencePath(source), [3, 4, 5], 6)
    assert same.holds
    assert same.equal_for == 6
    assert same.tie is None
    step = float(torch.finfo(torch.float32).eps * CONFIG.hidden)
    parted = free_run(baseline, Nudged(source, step), [3, 4, 5], 6)
    assert parted.equal_for < 6
    assert parted.tie is not None
    assert parted.holds
    wrong = free_run(baseline, Nudged(source, 1.0), [3, 4, 5], 6)
    assert wrong.equal_for < 6
    assert not wrong.holds


def test_worst_of_takes_the_furthest_sample() -> None:
    truth = torch.tensor([1.0, 1.0], dtype=torch.float64)
    samples = [torch.tensor([1.1, 1.2]), torch.tensor([0.8, 1.1]), torch.tensor([1.0, 1.0])]
    assert worst_of(samples, truth).tolist() == pytest.approx([0.8, 1.2])


def test_comparisons_add_up() -> None:
    total = PathComparison(rows=2, largest_ratio=0.5) + PathComparison(rows=3, largest_ratio=0.25, failures=["x"])
    assert (total.rows, total.largest_ratio, total.holds) == (5, 0.5, False)
