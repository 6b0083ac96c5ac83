"""What counts as a limit, how a share of it is made, and what the system says of memory."""

import mmap
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twinfer.bench import limits, machine
from twinfer.bench.limits import Probe, Probes, share_of_limit
from twinfer.bench.rows import Limits
from twinfer.bench.timing import Sample, Timing

_rate = st.floats(1e3, 1e15)


@pytest.mark.parametrize(
    ("bytes", "flops", "share"),
    [
        (40_000_000, 0, 0.1),  # 1 ms of reading in 10 ms
        (0, 400_000_000, 0.2),  # 2 ms of multiplying
        (40_000_000, 400_000_000, 0.2),  # both at once, and the longer of them counts
        (80_000_000, 100_000_000, 0.2),
    ],
)
def test_the_nearer_limit_counts(bytes: int, flops: int, share: float) -> None:
    machine_limits = Limits(read_bytes_per_s=4e10, read_by="", gemm_flops_per_s=2e11, gemm_by="")
    assert share_of_limit(bytes, flops, 0.01, machine_limits) == share


@given(read=_rate, gemm=_rate, bytes=st.integers(1, 10**12), flops=st.integers(1, 10**15))
def test_at_the_limit_the_share_is_one(read: float, gemm: float, bytes: int, flops: int) -> None:
    """And half of it in twice the time."""
    machine_limits = Limits(read_bytes_per_s=read, read_by="", gemm_flops_per_s=gemm, gemm_by="")
    seconds = max(bytes / read, flops / gemm)
    assert share_of_limit(bytes, flops, seconds, machine_limits) == 1
    assert share_of_limit(bytes, flops, 2 * seconds, machine_limits) == 0.5


def test_a_limit_is_the_best_sample_of_the_best_way(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = {"steady": (2.0, 2.0, 2.0), "lucky once": (9.0, 1.0, 9.0), "more bytes": (4.0, 4.0, 4.0)}

    def timed(samples: dict[str, Sample], rounds: int) -> dict[str, Timing]:
        return {name: Timing(seconds=taken[name], calls=1) for name in samples}

    monkeypatch.setattr(limits, "interleave", timed)
    monkeypatch.setattr(limits, "sample_of", lambda call, device: Sample(take=lambda: 0.0))
    ways = {"steady": (lambda: None, 100), "lucky once": (lambda: None, 100), "more bytes": (lambda: None, 600)}
    best = limits._best(ways, 3, "cpu")
    assert (best.name, best.rate, best.amount) == ("more bytes", 150.0, 600)
    del ways["more bytes"]
    best = limits._best(ways, 3, "cpu")
    assert (best.name, best.rate) == ("lucky once", 100.0)


def test_limits_are_those_of_the_rounds() -> None:
    """The machine when a row was timed counts, not when the ways were tried."""
    read = Probe(name="sum", call=lambda: None, amount=100, rate=50.0)
    gemm = Probe(name="square", call=lambda: None, amount=600, rate=200.0)
    probes = Probes(read=read, gemm=gemm)
    assert probes.limits() == Limits(read_bytes_per_s=50.0, read_by="sum", gemm_flops_per_s=200.0, gemm_by="square")
    seconds = [(4.0, 5.0), (6.0, 2.0)]
    timings = {name: Timing(seconds=each, calls=1) for name, each in zip(probes.calls, seconds, strict=True)}
    assert probes.limits(timings) == Limits(
        read_bytes_per_s=25.0, read_by="sum", gemm_flops_per_s=300.0, gemm_by="square"
    )


def test_products_are_tried_on_given_shapes_in_every_way() -> None:
    """And each way computes that product: the operations it is credited with are done."""
    ways = limits._ways_to_multiply("cpu", [(2, 3, 5)])
    assert [flops for _, flops in ways.values()] == [60, 60, 60]
    by_path, plain, turned = (call() for call, _ in ways.values())
    assert isinstance(by_path, torch.Tensor)
    assert isinstance(plain, torch.Tensor)
    assert isinstance(turned, torch.Tensor)
    assert plain.shape == (2, 5)
    bound = 6 * torch.finfo(torch.float32).eps * 3 * float(plain.abs().max().clamp_min(1))
    assert float((plain - by_path).abs().max()) <= bound
    assert float((plain - turned.t()).abs().max()) <= bound


def test_what_is_read_is_larger_than_any_cache() -> None:
    for call, size in limits._ways_to_read("cpu", compiled=False).values():
        assert size >= 8 * (machine.last_level_cache_bytes() or 0)
        assert size >= limits.LEAST_BUFFER
        call()


def test_the_peak_starts_anew() -> None:
    """A peak before `forget_peak` is forgotten, one after it is kept when its memory is gone."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the system does not let a process forget its peak")
    assert machine.forget_peak()
    before = machine.resident_bytes()
    assert before is not None
    size = 96 * 2**20
    with mmap.mmap(-1, size) as memory:  # an allocator may keep what is freed
        memory.write(b"x" * size)
    peak = machine.peak_resident_bytes()
    assert peak is not None
    assert peak - before >= 0.9 * size
    assert machine.forget_peak()
    forgotten = machine.peak_resident_bytes()
    assert forgotten is not None
    assert forgotten <= peak - 0.5 * size


def test_the_machine_names_its_processor() -> None:
    name = machine.this_machine()
    assert len(name.processor) > 2
    assert name.threads == torch.get_num_threads()
    assert name.torch == torch.__version__
    assert name.gpu is None
