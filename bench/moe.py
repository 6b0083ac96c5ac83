"""Mixtures of experts timed: routing, the two forms of dispatch, whole layers beside floors and peers, time over E.

Everything of one size is timed in turn, the fastest reading and multiplying of this machine among it. A layer's floor
is the larger of two times: reading the router and the chosen experts as stored, and the products of all choices.

Shapes: T tokens, M hidden, E experts, K = top_k, C capacity.
"""

import functools
import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..compiled.dispatch import one_hot_form, table_form
from ..compiled.linear import materialized
from ..compiled.programs import graph
from ..compiled.routing import Routing, route
from ..reference.moe import moe as reference_moe
from ..reference.routing import route as reference_route
from ..spec.config import Storage
from ..spec.moe import RouterConfig
from ..spec.weights import MoeWeights
from .limits import share_of_limit
from .mixtures import CompiledMixture, Mixture, chosen_bytes, draw_weights, growing, prepare_mixture
from .ops import COMPILED, EAGER, Run
from .reasons import reason
from .rows import Kind, Limits, Row
from .side_by_side import Key, Measured
from .targets import Target, own
from .timing import Timing, interleave, paired_ratios, quantile, sample_of

TABLES, ONE_HOT = "tables", "one-hot einsums"
FLOOR = "floor"
DISPATCH_EXPERTS, DISPATCH_HIDDEN = 128, 1024
DISPATCH_TOKENS = (64, 512, 4096)
LEAST_PLACES = (1, 4)
"""The least capacity of an expert: none but what its share of the tokens needs, and DeepSpeed's default."""
TOKENS = (1, 8, 64, 512)
EXPERTS = (8, 32, 128, 256)
EXPERTS_TOKENS = 64

Call = Callable[[], object]
Peers = Callable[[Mixture, MoeWeights], "Mapping[str, Callable[[Tensor], Tensor] | str]"]
"""Other libraries' layers of the same weights by their names, or why one is not there."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One implementation of one thing at one size."""

    implementation: str
    call: Call
    storage: Storage = Storage.FLOAT32
    bytes: int | None = None
    note: str | None = None

    @property
    def who(self) -> str:
        return own(self.storage) if self.implementation == COMPILED else self.implementation


@dataclass(frozen=True, kw_only=True)
class Timed:
    """Rows, what targets are judged by, and who could not be timed."""

    rows: list[Row] = field(default_factory=list)
    measured: dict[Key, Measured] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)

    def add(self, other: "Timed") -> None:
        self.rows.extend(other.rows)
        self.measured.update(other.measured)
        self.targets.extend(other.targets)
        self.absent.update(other.absent)


@torch.no_grad()
def measure(
    name: str, shape: Mapping[str, int], entries: Sequence[Entry], run: Run, *, part: str, flops: int | None = None
) -> Timed:
    """Time the entries in turn; speed-ups are over the fastest of those that are not this project's, or the first."""
    samples = {who: sample_of(call) for who, call in run.probes.calls.items()}
    samples |= {entry.who: sample_of(entry.call) for entry in entries}
    timings = interleave(samples, run.rounds)
    limits = run.probes.limits(timings)
    others = [entry for entry in entries if entry.implementation not in (COMPILED, TABLES)]
    baseline = min(others, key=lambda entry: quantile(timings[entry.who].seconds, 0.5)) if others else entries[0]
    what = f"{name} {shape['T']}"
    timed = Timed()
    for entry in entries:
        timing = timings[entry.who]
        timed.measured[Key(entry.who, what)] = Measured(timing=timing)
        timed.rows.append(_row(name, shape, entry, timing, timings[baseline.who], baseline, limits, run, part, flops))
        if flops is not None and entry.bytes is not None and entry.implementation == COMPILED:
            floor_s = share_of_limit(entry.bytes, flops, 1.0, limits)
            floor = Timing(seconds=(floor_s,) * len(timing.seconds), calls=1)
            timed.measured[Key(f"{FLOOR} {entry.storage}", what)] = Measured(timing=floor)
    return timed


def _row(
    name: str,
    shape: Mapping[str, int],
    entry: Entry,
    timing: Timing,
    base: Timing,
    baseline: Entry,
    limits: Limits,
    run: Run,
    part: str,
    flops: int | None,
) -> Row:
    median, ratios = quantile(timing.seconds, 0.5), paired_ratios(base, timing)
    figures: dict[str, Any] = {}
    if flops is not None and entry.bytes is not None:
        figures = {
            "bytes": entry.bytes,
            "flops": flops,
            "gb_per_s": entry.bytes / median / 1e9,
            "gflop_per_s": flops / median / 1e9,
            "share_of_limit": share_of_limit(entry.bytes, flops, median, limits),
        }
    words = ["twinfer", "bench", "moe", "--part", part, "--tokens", str(shape["T"]), "--storage", entry.storage.value]
    return Row(
        kind=Kind.OP,
        name=name,
        shape=shape,
        storage=entry.storage,
        implementation=entry.implementation,
        rows=shape["T"],
        note=entry.note,
        p20_s=quantile(timing.seconds, 0.2),
        p50_s=median,
        p80_s=quantile(timing.seconds, 0.8),
        repeats=len(timing.seconds),
        calls=timing.calls,
        tokens_per_s=shape["T"] / median,
        baseline=baseline.who,
        speed_up=quantile(ratios, 0.5),
        speed_up_p20=quantile(ratios, 0.2),
        speed_up_p80=quantile(ratios, 0.8),
        seed=run.seed,
        limits=limits,
        machine=run.machine,
        repro=shlex.join([*words, "--rounds", str(run.rounds), "--seed", str(run.seed)]),
        **figures,
    )


def routing(tokens: int, top_k: int, run: Run) -> Timed:
    """Logits to choices and weights: compiled, and the reference as it stands."""
    router = _router(top_k)
    logit_TE = torch.randn(tokens, router.experts, generator=torch.Generator().manual_seed(run.seed))

    def choose(logit_TE: Tensor) -> Routing:
        return route(logit_TE, router)

    entries = [
        Entry(implementation=COMPILED, call=functools.partial(graph(choose), logit_TE)),
        Entry(implementation=EAGER, call=functools.partial(reference_route, logit_TE, router)),
    ]
    shape = {"T": tokens, "E": router.experts, "K": top_k}
    return measure("routing", shape, entries, run, part="routing")


def dispatch_sizes(tokens: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return tokens, top-k and least capacity of each size, those left out whose least is no more than their share.

    >>> dispatch_sizes([64, 512])
    [(64, 1, 1), (64, 1, 4), (64, 2, 1), (64, 2, 4), (512, 1, 1), (512, 2, 1)]
    """
    return [
        (count, top_k, least)
        for count in tokens
        for top_k in (1, 2)
        for least in LEAST_PLACES
        if least == LEAST_PLACES[0] or least > math.ceil(count * top_k / DISPATCH_EXPERTS)
    ]


def dispatch(tokens: int, top_k: int, least: int, run: Run) -> Timed:
    """Logits to combined outputs, what experts compute left out: each returns what it is given."""
    router, hidden = _router(top_k), DISPATCH_HIDDEN
    generator = torch.Generator().manual_seed(run.seed)
    x_TM = torch.randn(tokens, hidden, generator=generator)
    logit_TE = torch.randn(tokens, router.experts, generator=generator)
    places = max(least, math.ceil(tokens * top_k / router.experts))

    def tables(x_TM: Tensor, logit_TE: Tensor) -> Tensor:
        return table_form(x_TM, route(logit_TE, router), router.experts, places, materialized)

    def one_hot(x_TM: Tensor, logit_TE: Tensor) -> Tensor:
        return one_hot_form(x_TM, route(logit_TE, router), router.experts, places, materialized)

    entries = [
        Entry(implementation=TABLES, call=functools.partial(graph(tables), x_TM, logit_TE)),
        Entry(implementation=ONE_HOT, call=functools.partial(graph(one_hot), x_TM, logit_TE)),
    ]
    shape = {"T": tokens, "E": router.experts, "K": top_k, "C": places, "M": hidden}
    name = f"dispatch and combine, top-{top_k}, capacity {places},"
    timed = measure(name, shape, entries, run, part="dispatch")
    what = f"{name} {tokens}"
    target = Target(
        name=f"{what} tokens, {TABLES} over {ONE_HOT}", own=Key(TABLES, what), over=(Key(ONE_HOT, what),), bound=6.0
    )
    timed.targets.append(target)
    return timed


def _router(top_k: int) -> RouterConfig:
    return RouterConfig(experts=DISPATCH_EXPERTS, top_k=top_k, renormalize=top_k > 1)


def layer(
    mixture: Mixture, tokens: Sequence[int], storages: Sequence[Storage], run: Run, peers: Peers | None
) -> Iterator[Timed]:
    """The whole layer in each storage beside other libraries' in float32, at one number of tokens after the other."""
    weights = draw_weights(mixture, run.seed)
    mine = {storage: prepare_mixture(weights, storage) for storage in storages}
    compiled = {storage: CompiledMixture(mine[storage], mixture, storage) for storage in storages}
    others = {} if peers is None else dict(peers(mixture, weights))
    for count in tokens:
        x_TM = torch.randn(count, mixture.hidden, generator=torch.Generator().manual_seed(run.seed + 1))
        with torch.no_grad():
            wanted_TM = reference_moe(x_TM[None], weights, mixture.config)[0]
        entries, absent = [], {}
        for storage in storages:
            call = functools.partial(compiled[storage], x_TM)
            entries.append(
                Entry(
                    implementation=COMPILED,
                    call=call,
                    storage=storage,
                    bytes=chosen_bytes(x_TM, mine[storage], mixture),
                    note=_difference(call, wanted_TM),
                )
            )
        for name, peer in others.items():
            if isinstance(peer, str):
                absent[name] = peer
                continue
            call = functools.partial(peer, x_TM)
            try:
                entries.append(Entry(implementation=name, call=call, note=_difference(call, wanted_TM)))
            except Exception as error:  # another library's
                absent[name] = reason(error)
        timed = measure(mixture.name, mixture.shape(count), entries, run, part="layer", flops=mixture.flops(count))
        timed.absent.update(absent)
        timed.targets.extend(_targets(mixture, count, storages, [*others]))
        yield timed


@torch.no_grad()
def _difference(call: Callable[[], Tensor], wanted_TM: Tensor) -> str:
    """Say how far a result is from the reference's with float32 weights."""
    off = float((call() - wanted_TM).abs().max() / wanted_TM.abs().max())
    return f"at most {off:.1e} of the reference's largest output away from it"


def _targets(mixture: Mixture, tokens: int, storages: Sequence[Storage], peers: Sequence[str]) -> Iterator[Target]:
    what = f"{mixture.name} {tokens}"
    title = f"{mixture.name}, {tokens} token{'s' if tokens > 1 else ''}"
    for storage in storages if mixture.name != "deepspeed" else ():
        floor, mine = Key(f"{FLOOR} {storage}", what), Key(own(storage), what)
        yield Target(name=f"{title}, {storage}, time over its floor", own=floor, over=(mine,), bound=1.7, at_most=True)
    if Storage.FLOAT32 not in storages:
        return
    mine = Key(own(Storage.FLOAT32), what)
    bound = {8: 5.0, 64: 3.0, 512: 1.5}.get(tokens) if mixture.name == "deepspeed" else 1.0 if tokens > 64 else 1.2
    if peers and bound is not None:
        over = tuple(Key(name, what) for name in peers)
        library = peers[0].split()[0]
        yield Target(name=f"{title}, float32 over {library}'s fastest", own=mine, over=over, bound=bound)
    if Storage.INT8 in storages and tokens == 1:
        yield Target(name=f"{title}, int8 over float32", own=Key(own(Storage.INT8), what), over=(mine,), bound=2.0)


def over_experts(experts: Sequence[int], storages: Sequence[Storage], run: Run) -> Iterator[Timed]:
    """A layer of experts alike, of which there are more and more."""
    for count in experts:
        mixture = growing(count)
        weights = draw_weights(mixture, run.seed)
        x_TM = torch.randn(EXPERTS_TOKENS, mixture.hidden, generator=torch.Generator().manual_seed(run.seed + 1))
        entries = []
        for storage in storages:
            mine = prepare_mixture(weights, storage)
            compiled = CompiledMixture(mine, mixture, storage)
            entries.append(
                Entry(
                    implementation=COMPILED,
                    call=functools.partial(compiled, x_TM),
                    storage=storage,
                    bytes=chosen_bytes(x_TM, mine, mixture),
                )
            )
        shape, flops = mixture.shape(EXPERTS_TOKENS), mixture.flops(EXPERTS_TOKENS)
        yield measure("over experts", shape, entries, run, part="experts", flops=flops)
