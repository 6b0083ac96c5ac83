"""What this machine can do at most: bytes read a second, and float32 multiplications and additions a second.

A limit is only one if nothing is faster, so each is the best sample of several ways of trying. What an op takes is held
against the nearer of the two (Williams et al. 2009, the roofline): a product for one row against reading its weights,
one for many rows against the multiplications.

Shapes: T rows, I inputs, N outputs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from ..compiled.linear import product
from .machine import last_level_cache_bytes
from .rows import Limits
from .timing import Timing, interleave, sample_of

LEAST_BUFFER = 256 * 2**20
_CACHES_IN_BUFFER = 8
SQUARE = 2048
"""T, I and N of the product that every machine is tried on."""

Way = tuple[Callable[[], object], int]
"""What to call, and the bytes or the operations that one call stands for."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A roofline probe: the way of reading, or of multiplying, that was best."""

    name: str
    call: Callable[[], object]
    amount: int
    """Bytes or operations of a call."""
    rate: float
    """The most of them a second."""


@dataclass(frozen=True, kw_only=True)
class Probes:
    """The best way to read and the best way to multiply, to be timed again in turn with what they measure."""

    read: Probe
    gemm: Probe

    @property
    def calls(self) -> dict[str, Callable[[], object]]:
        return {f"read: {self.read.name}": self.read.call, f"multiply: {self.gemm.name}": self.gemm.call}

    def limits(self, timings: Mapping[str, Timing] | None = None) -> Limits:
        """The best samples when the ways were tried, or among timings of `calls`."""
        rates = [self.read.rate, self.gemm.rate]
        if timings is not None:
            taken = [min(timings[name].seconds) for name in self.calls]
            rates = [probe.amount / seconds for probe, seconds in zip((self.read, self.gemm), taken, strict=True)]
        return Limits(
            read_bytes_per_s=rates[0], read_by=self.read.name, gemm_flops_per_s=rates[1], gemm_by=self.gemm.name
        )


@torch.no_grad()
def find_probes(
    device: torch.device | str = "cpu",
    *,
    shapes: Sequence[tuple[int, int, int]] = (),
    rounds: int = 7,
    compiled: bool = True,
) -> Probes:
    """Try every way of reading and multiplying, and keep the best.

    `shapes` are further products (T, I, N) to try beside the square one, such as a model's own. `compiled` = False
    leaves out the way of reading that has to be compiled first, for a quick look: the limit may then be too low.
    """
    return Probes(
        read=_best(_ways_to_read(device, compiled), rounds, device),
        gemm=_best(_ways_to_multiply(device, [(SQUARE, SQUARE, SQUARE), *shapes]), rounds, device),
    )


def measure_limits(
    device: torch.device | str = "cpu", *, shapes: Sequence[tuple[int, int, int]] = (), rounds: int = 7
) -> Limits:
    """The most that any way of reading and of multiplying reached now."""
    return find_probes(device, shapes=shapes, rounds=rounds).limits()


def share_of_limit(bytes: int, flops: int, seconds: float, limits: Limits) -> float:
    """The time that the nearer limit allows over the time taken: 1 cannot be beaten, but by what lies in a cache.

    >>> limits = Limits(read_bytes_per_s=1e9, read_by="", gemm_flops_per_s=1e12, gemm_by="")
    >>> share_of_limit(bytes=10**9, flops=10**11, seconds=2.0, limits=limits)  # reading: 1 s; multiplying: 0.1 s
    0.5
    """
    return max(bytes / limits.read_bytes_per_s, flops / limits.gemm_flops_per_s) / seconds


def _best(ways: Mapping[str, Way], rounds: int, device: torch.device | str) -> Probe:
    """The way of which any sample was the fastest of all ways'."""
    timings = interleave({name: sample_of(call, device) for name, (call, _) in ways.items()}, rounds)
    rates = {name: ways[name][1] / min(timing.seconds) for name, timing in timings.items()}
    best = max(rates, key=lambda name: rates[name])
    call, amount = ways[best]
    return Probe(name=best, call=call, amount=amount, rate=rates[best])


def _ways_to_read(device: torch.device | str, compiled: bool) -> dict[str, Way]:
    """A buffer of several times the largest cache, read whole."""
    size = max(LEAST_BUFFER, _CACHES_IN_BUFFER * (last_level_cache_bytes() or 0))
    buffer_NI = torch.ones(size // (4 * 4096), 4096, device=device)  # written: untouched pages would all be one page
    vector_I = torch.ones(4096, device=device)
    ways: dict[str, Way] = {
        "sum": (lambda: buffer_NI.sum(), buffer_NI.nbytes),
        "matrix-vector product": (lambda: buffer_NI @ vector_I, buffer_NI.nbytes),
    }
    if compiled:
        by_row = torch.compile(_products_by_row, dynamic=False)
        ways["compiled matrix-vector product"] = (lambda: by_row(buffer_NI, vector_I), buffer_NI.nbytes)
    return ways


def _products_by_row(buffer_NI: Tensor, vector_I: Tensor) -> Tensor:
    return (buffer_NI * vector_I).sum(-1)


def _ways_to_multiply(device: torch.device | str, shapes: Sequence[tuple[int, int, int]]) -> dict[str, Way]:
    """By torch's plain product, either operand first, and by the library that the compiled path chose."""
    ways: dict[str, Way] = {}
    generator = torch.Generator().manual_seed(0)
    for rows, inputs, outputs in shapes:
        x_TI = torch.randn(rows, inputs, generator=generator).to(device)
        weight_NI = torch.randn(outputs, inputs, generator=generator).to(device)
        x_IT = x_TI.t().contiguous()
        at, flops = f"T={rows},I={inputs},N={outputs}", 2 * rows * inputs * outputs
        ways[f"the compiled path's product {at}"] = (partial(product, x_TI, weight_NI, None), flops)
        ways[f"x @ weight.t() {at}"] = (partial(functional.linear, x_TI, weight_NI), flops)
        ways[f"weight @ x.t() {at}"] = (partial(torch.matmul, weight_NI, x_IT), flops)
    return ways
