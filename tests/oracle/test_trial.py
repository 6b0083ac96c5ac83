"""What a candidate must leave alone: its inputs, its earlier results, and the process."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor

from twinfer.oracle.budget import Budget
from twinfer.oracle.case import Case
from twinfer.oracle.guarantees import Bitwise, Discrete, Statistical
from twinfer.oracle.process import ProcessState
from twinfer.oracle.trial import Arithmetic, Trial
from twinfer.reference.cache import KVCache

CASE = Case(op="none", sizes={})
ALL = (
    Budget(rows="T"),
    Bitwise(),
    Discrete(regret=lambda exact, got: torch.ones(()), scale=lambda exact: torch.ones(())),
)


def twice(x: Tensor) -> Tensor:
    return 2 * x


def complaints(candidate: Callable[..., Any], reference: Callable[..., Any] = twice, **inputs: Any) -> list[str]:
    """What each kind of guarantee says of it."""
    given = inputs or {"x": torch.arange(1.0, 5.0).view(2, 2)}
    return [guarantee.judge(Trial(CASE, given, reference, candidate, ("T M",))).complaint for guarantee in ALL]


def test_a_buffer_that_is_used_again_is_seen() -> None:
    buffer = torch.empty(2, 2)

    def reuses(x: Tensor) -> Tensor:
        return torch.mul(x, 2, out=buffer)

    assert all("second call changes what the first returned" in complaint for complaint in complaints(reuses))


def test_what_is_remembered_by_address_is_seen() -> None:
    """The second call finds other values where the first found its own."""
    memory: dict[int, Tensor] = {}

    def remembers(x: Tensor) -> Tensor:
        if x.data_ptr() not in memory:
            memory[x.data_ptr()] = 2 * x
        return memory[x.data_ptr()].clone()

    assert all(complaints(remembers))


def test_of_two_trials_one_judges_the_call_that_is_wrong() -> None:
    """Each calls three times and judges the second, so a fault at every other call cannot hide from both."""
    calls = count()
    one, other, _ = complaints(lambda x: 2 * x + next(calls) % 2)
    assert one
    assert not other


def test_the_third_call_must_give_what_the_first_gave() -> None:
    calls = count()
    sees = complaints(lambda x: 2 * x + (next(calls) % 3 == 0))
    assert all("depends on what was called before" in complaint for complaint in sees)


def test_memory_that_is_given_again_is_seen() -> None:
    """A view of a table of results; unless the reference returns its input."""
    table: dict[str, Tensor] = {}
    sees = complaints(lambda x: table.setdefault(str(x.tolist()), 2 * x))
    assert all("two calls return the same memory" in complaint for complaint in sees)


def test_a_result_whose_elements_share_memory_is_seen() -> None:
    sees = complaints(lambda x: (2 * x[:1]).expand_as(x), x=torch.ones(2, 2))
    assert all("two elements of a result are one in memory" in complaint for complaint in sees)


@pytest.mark.parametrize("layout", [1, 3, 5])
def test_the_same_numbers_lie_elsewhere_in_memory(layout: int) -> None:
    """With gaps, behind other memory, or transposed, also within a dataclass."""
    cache = KVCache(torch.arange(12.0).view(2, 1, 3, 2), torch.ones(2, 1, 3, 2))
    seen: list[tuple[bool, int]] = []

    def candidate(cache: KVCache) -> Tensor:
        seen.append((cache.key_BSKD.is_contiguous(), cache.key_BSKD.storage_offset()))
        return cache.key_BSKD + 0

    case = replace(CASE, seed=layout)
    verdict = Bitwise().judge(Trial(case, {"cache": cache}, lambda cache: cache.key_BSKD + 0, candidate, ("B S K D",)))
    assert not verdict.failed
    assert seen == [{1: (False, 1), 3: (True, 16), 5: (False, 0)}[layout]] * 3


def test_results_that_are_their_inputs_are_seen() -> None:
    """Unless the reference returns its input too."""
    x = torch.ones(2, 2)
    assert all("returns memory of its inputs" in each for each in complaints(lambda x: x, lambda x: x.clone(), x=x))
    assert not any(complaints(lambda x: x, lambda x: x, x=x))
    assert not any(complaints(lambda x: x.clone(), lambda x: x, x=x))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda: torch.set_flush_denormal(True), "subnormals_become_zero"),
        (lambda: torch.set_default_dtype(torch.float64), "default_dtype"),
        (lambda: torch.set_grad_enabled(False), "grad_mode"),
        (lambda: torch.set_num_threads(torch.get_num_threads() + 1), "threads"),
        (lambda: torch.use_deterministic_algorithms(True), "deterministic_algorithms"),
        (lambda: torch.set_float32_matmul_precision("medium"), "float32_matmul_precision"),
        (lambda: setattr(torch.backends.mkldnn, "enabled", False), "mkldnn"),
        (lambda: torch.set_autocast_enabled("cpu", True), "autocast"),
        (lambda: torch.set_default_device("meta"), "default_device"),
        (lambda: torch.manual_seed(3), "random_numbers"),
    ],
)
def test_the_process_is_left_as_it_was(change: Callable[[], Any], named: str) -> None:
    """Whoever changes it is told, and what comes after is judged as before."""
    before = ProcessState.now()

    def changes_it(x: Tensor) -> Tensor:
        change()
        return 2 * x

    assert all(f"changes the state of the process: {named}" in each for each in complaints(changes_it))
    assert ProcessState.now() == before


def test_truth_and_baseline_are_computed_before_the_candidate_runs() -> None:
    order: list[str] = []

    def reference(x: Tensor) -> Tensor:
        order.append(f"reference in {x.dtype}")
        return 2 * x

    def candidate(x: Tensor) -> Tensor:
        order.append("candidate")
        return 2 * x

    Budget(rows="T").judge(Trial(CASE, {"x": torch.ones(2, 2)}, reference, candidate, ("T M",)))
    assert order[-3:] == ["candidate", "candidate", "candidate"]
    assert set(order[:-3]) == {"reference in torch.float32", "reference in torch.float64"}


def test_draws_leave_their_inputs_alone_too() -> None:
    def writes(p_V: Tensor, generator: torch.Generator) -> int:
        p_V.mul_(1)[0] += 1
        return 0

    given = {"p_V": torch.tensor([1.0, 0.0]), "generator": torch.Generator()}
    statistical = Statistical(probability=lambda exact: torch.tensor([1.0, 0.0]))
    verdict = statistical.judge(Trial(CASE, given, writes, writes, ("",)))
    assert "writes to its argument p_V" in verdict.complaint


def test_who_sums_in_16_bits_says_so_and_gets_the_wider_bound() -> None:
    """A sum of 64 ones and 64 minus ones, each partial sum rounded, is off by far more than its own rounding."""
    x = torch.randn(1, 256, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)

    def reference(x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return wide.sum(-1, keepdim=True).to(x.dtype)

    def in_16_bits(x: Tensor) -> Tensor:
        total = torch.zeros(1, 1, dtype=x.dtype)
        for column in x.unbind(-1):
            total = total + column[:, None]
        return total

    budget = Budget(rows="T", scale=lambda exact, _: [exact["x"].abs().sum(-1, keepdim=True)])
    failed = {
        arithmetic: budget.judge(Trial(CASE, {"x": x}, reference, in_16_bits, ("T M",), arithmetic)).failed
        for arithmetic in Arithmetic
    }
    assert failed == {Arithmetic.WIDE: True, Arithmetic.NARROW: False}


@pytest.mark.parametrize(("dtype", "passes"), [(torch.bfloat16, True), (torch.float32, False)])
def test_subnormal_inputs_may_be_read_as_zero_of_bfloat16_alone(dtype: torch.dtype, passes: bool) -> None:
    """x86's products of bfloat16 do so, which costs 4000 times the smallest normal number here."""
    tiny = torch.finfo(dtype).smallest_normal
    x, w = torch.full((1, 8), tiny / 2, dtype=dtype), torch.full((1, 8), 1000.0, dtype=dtype)

    def product(x: Tensor, w: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return (x.to(wide) @ w.to(wide).T).to(x.dtype)

    def flushing(x: Tensor, w: Tensor) -> Tensor:
        return product(x.where(x.abs() >= tiny, 0.0), w)

    budget = Budget(rows="T", scale=lambda exact, _: [exact["x"].abs() @ exact["w"].abs().T])
    assert budget.judge(Trial(CASE, {"x": x, "w": w}, product, flushing, ("T M",))).failed != passes


@pytest.fixture(autouse=True)
def state_restored() -> Iterator[None]:
    before = ProcessState.now()
    yield
    before.restore()
