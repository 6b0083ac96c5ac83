"""The ratios that are targets for the compiled path, each of two things measured in the same run.

A ratio is taken round by round, and its value is the median; its spread, the 20th and 80th percentile, is that of the
rounds. Whatever it needs that was not measured is named instead of a value.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..spec.config import Storage
from .side_by_side import Key, Measured
from .timing import quantile

GEMM, MEMORY = "torch's matrix products", "memory"
PRODUCTS, SMALL = "weight products", "product"
EAGER, STATIC = "transformers eager", "transformers static cache"
"""Who is measured, besides this project's path and llama.cpp."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The least speed-up over something else; for times, the most that they may be longer."""

    name: str
    own: Key
    over: tuple[Key, ...]
    """The fastest of these."""
    bound: float
    at_most: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """A target with its measurement."""

    name: str
    value: float | None
    p20: float | None
    p80: float | None
    bound: float
    at_most: bool
    over: str | None
    """Which of several it was over."""
    missing: str | None
    """What was not measured."""

    @property
    def reached(self) -> bool | None:
        if self.value is None:
            return None
        return self.value <= self.bound if self.at_most else self.value >= self.bound


def own(storage: str) -> str:
    """This project's path, as keys have it."""
    return f"compiled {storage}"


def ratio(target: Target, measured: Mapping[Key, Measured], absent: Mapping[str, str]) -> Ratio:
    """Return the ratio of tokens a second that a target is about; `absent` says why whoever is not there is not.

    >>> from twinfer.bench.timing import Timing
    >>> a, b = Key("compiled int8", "decode batch 1"), Key("other", "decode batch 1")
    >>> times = {key: Measured(timing=Timing(seconds=s, calls=1)) for key, s in ((a, (1.0, 2.0)), (b, (3.0, 4.0)))}
    >>> found = ratio(Target(name="", own=a, over=(b,), bound=2.0), times, {})  # 3 and 2, by rounds
    >>> found.value, found.reached
    (2.5, True)
    """
    rates = {key: measured[key].rates for key in (target.own, *target.over) if key in measured and measured[key].rates}
    over = [key for key in target.over if key in rates]
    if target.own not in rates or not over:
        lacking = target.own if target.own not in rates else target.over[0]
        error = measured[lacking].timing.error if lacking in measured else None
        why = absent.get(lacking.who) or error or "not measured"
        return _result(target, None, None, f"{lacking.who}, {lacking.what}: {why}")
    best = max(over, key=lambda key: quantile(rates[key], 0.5))
    values = [mine / other for mine, other in zip(rates[target.own], rates[best], strict=True)]
    return _result(target, values, best.who, None)


def _result(target: Target, values: Sequence[float] | None, over: str | None, missing: str | None) -> Ratio:
    low, middle, high = (None if values is None else quantile(values, share) for share in (0.2, 0.5, 0.8))
    return Ratio(
        name=target.name,
        value=middle,
        p20=low,
        p80=high,
        bound=target.bound,
        at_most=target.at_most,
        over=over,
        missing=missing,
    )


_LLAMA_CPP = {
    Storage.FLOAT32: ("F32", 1.0),
    Storage.BFLOAT16: ("F16", 1.0),
    Storage.INT8: ("Q8_0", 1.2),
    Storage.INT4: ("Q4_1", 1.2),
}
"""The precision class of each storage, and the target of its decode speed, in times."""
_SMALL = {Storage.FLOAT32: (0.6, 1.6), Storage.BFLOAT16: (0.6, 1.6), Storage.INT8: (0.5, 2.0)}
"""Of a product alone: the share of the speed of memory with one row, and how many times as long four take."""
_ONE = "decode batch 1"


def targets(
    storages: Sequence[Storage], prefills: Sequence[int], batches: Sequence[int], squares: Sequence[int]
) -> list[Target]:
    """Return the targets for these storages, at these sizes; shorter prompts are compared with the longest."""
    full, shorter = max(prefills), sorted(set(prefills) - {max(prefills)})
    found: list[Target] = []
    for storage in storages:
        kind, bound = _LLAMA_CPP[storage]
        found.append(_decode(storage, f"llama.cpp {kind}", bound))
    if Storage.INT8 in storages:
        found += [_decode(Storage.INT8, EAGER, 6.0), _decode(Storage.INT8, STATIC, 4.0)]
        found += _of_batches(batches)
    if Storage.FLOAT32 in storages:
        found += _of_prefill(full)
    found += [_of_length(storage, length, full) for storage in storages for length in shorter]
    return found + [each for storage in storages for size in squares for each in _of_small(storage, size)]


def _decode(storage: Storage, other: str, bound: float) -> Target:
    name = f"{_ONE}, {storage} over {other}"
    return Target(name=name, own=Key(own(storage), _ONE), over=(Key(other, _ONE),), bound=bound)


def _of_batches(batches: Sequence[int]) -> Iterator[Target]:
    mine = own(Storage.INT8)
    if 8 in batches:
        name = "decode batch 8, int8, all its tokens, over batch 1"
        yield Target(name=name, own=Key(mine, "decode batch 8"), over=(Key(mine, _ONE),), bound=1.5)
    if 32 in batches:
        name = f"decode batch 32, int8, over {GEMM} of the model's shapes"
        yield Target(name=name, own=Key(mine, "decode batch 32"), over=(products_of(32),), bound=0.6)


def _of_prefill(length: int) -> Iterator[Target]:
    formats = tuple(Key(f"llama.cpp {kind}", f"prefill {length}") for kind, _ in _LLAMA_CPP.values())
    name = f"prefill {length}, float32 over llama.cpp's best"
    yield Target(name=name, own=Key(own(Storage.FLOAT32), f"prefill {length}"), over=formats, bound=1.2)
    name = f"prefill {length}, its weight products alone, over {GEMM} of the model's shapes"
    yield Target(name=name, own=Key(PRODUCTS, products_of(length).what), over=(products_of(length),), bound=0.85)


def _of_length(storage: Storage, length: int, full: int) -> Target:
    name = f"prefill {length}, {storage} over its own {full}"
    mine = own(storage)
    return Target(name=name, own=Key(mine, f"prefill {length}"), over=(Key(mine, f"prefill {full}"),), bound=0.85)


def _of_small(storage: Storage, size: int) -> Iterator[Target]:
    if storage not in _SMALL:
        return
    share, times = _SMALL[storage]
    one, four = small(storage, size, 1), small(storage, size, 4)
    name = f"{size} x {size} {storage}, 1 row, over reading it"
    yield Target(name=name, own=one, over=(reading(storage, size),), bound=share)
    name = f"{size} x {size} {storage}, time of 4 rows over that of 1"
    yield Target(name=name, own=one, over=(four,), bound=times, at_most=True)


def products_of(rows: int) -> Key:
    """All weight products of a step, by the fastest way that torch has for each."""
    return Key(GEMM, f"{rows} rows")


def small(storage: Storage, size: int, rows: int) -> Key:
    """One square product, alone."""
    return Key(SMALL, f"{size} x {size} {storage}, {rows} row{'s' if rows > 1 else ''}")


def reading(storage: Storage, size: int) -> Key:
    """The bytes of its matrix read as fast as this machine reads."""
    return Key(MEMORY, f"{size} x {size} {storage}")
