"""What `twinfer bench model` and `twinfer bench peers` run, and the rows that come of it.

Shapes: T prompt tokens.
"""

import argparse
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..checkpoint import Checkpoint
from ..compiled.path import CompiledPath
from ..spec.config import INT4_GROUP, ModelConfig, Storage
from ..spec.counts import Count
from ..spec.decoder import check_extensible
from ..spec.errors import RequestError
from .candidates import Candidate, PathCandidate
from .limits import share_of_limit
from .products import flops, layer_shapes, step_shapes
from .rows import Kind, Limits, Machine, Row
from .side_by_side import Key, Measured, ModelSample, Workload, prompt, sample
from .targets import own
from .timing import paired_ratios, quantile


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Which storages, at which sizes."""

    storages: tuple[Storage, ...]
    rounds: int
    prompt: int
    """Tokens before a decode step."""
    steps: int
    batches: tuple[int, ...]
    prefills: tuple[int, ...]

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Plan":
        storages = tuple(Storage(each) for each in dict.fromkeys(args.storage)) or tuple(Storage)
        return cls(
            storages=storages,
            rounds=args.rounds,
            prompt=args.prompt,
            steps=args.steps,
            batches=tuple(dict.fromkeys((1, *(args.batch or (8, 32))))),
            prefills=tuple(dict.fromkeys(args.prefill or (512, 260, 300))),
        )

    def check(self, config: ModelConfig) -> None:
        """Raise `RequestError` unless the model can be run so."""
        check_extensible(config)
        if self.most_tokens > config.context:
            raise RequestError(
                f"the longest of --prefill, and of --prompt with 1 + --steps, is {self.most_tokens} tokens; the "
                f"model's context is {config.context}"
            )

    @property
    def decode_tokens(self) -> int:
        return self.prompt + self.steps + 1

    @property
    def most_tokens(self) -> int:
        return max(self.decode_tokens, *self.prefills)

    @property
    def decode(self) -> Workload:
        """Of one sequence."""
        return Workload(prompt=self.prompt, steps=self.steps)

    @property
    def workloads(self) -> list[Workload]:
        """Of this project's path."""
        batches = [Workload(prompt=self.prompt, steps=self.steps, batch=batch) for batch in self.batches]
        return batches + [Workload(prompt=length) for length in self.prefills]

    def repro(self, command: str, model: str, storage: Storage | None) -> str:
        """The command that measures one storage (or what is not of a storage) again."""
        words = ["twinfer", "bench", command, model, "--rounds", str(self.rounds)]
        words += ["--storage", (storage or self.storages[0]).value]
        words += ["--prompt", str(self.prompt), "--steps", str(self.steps)]
        words += [word for batch in self.batches if batch > 1 for word in ("--batch", str(batch))]
        words += [word for length in self.prefills for word in ("--prefill", str(length))]
        return shlex.join(words)


def own_candidates(
    checkpoint: Checkpoint, plan: Plan, report: Callable[[str], None]
) -> tuple[dict[str, Candidate], dict[Storage, float]]:
    """This project's path in each storage, compiled, and the seconds that took with the caches as they are."""
    candidates: dict[str, Candidate] = {}
    seconds: dict[Storage, float] = {}
    for storage in plan.storages:
        report(f"compiling {storage}, unless it is found in the cache")
        path = CompiledPath(checkpoint.source, storage=storage)
        seconds[storage] = path.compile()
        candidates[own(storage)] = PathCandidate(path)
    return candidates, seconds


def samples_of(
    candidates: Mapping[str, Candidate], workloads: Mapping[str, Sequence[Workload]], vocabulary: int
) -> dict[Key, ModelSample]:
    """What is to be sampled of each candidate, one workload of all of them after the other."""
    every = dict.fromkeys(workload for each in workloads.values() for workload in each)
    return {
        Key(name, workload.title): sample(candidate, prompt(vocabulary, workload.prompt), workload)
        for workload in every
        for name, candidate in candidates.items()
        if workload in workloads[name]
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What all rows of a run share."""

    name: str
    """Of the model."""
    config: ModelConfig
    machine: Machine
    limits: Limits
    baseline: str
    """By its key's name."""


def row(
    key: Key,
    workload: Workload,
    measured: Mapping[Key, Measured],
    about: About,
    *,
    storage: Storage | str,
    implementation: str,
    repro: str,
    note: str | None = None,
) -> Row:
    """One line of results; bytes and operations are counted where the storage is one of this project's."""
    timing = measured[key].timing
    p20, p50, p80 = (timing.quantile(share) for share in (0.2, 0.5, 0.8))
    result = Row(
        kind=Kind.MODEL,
        name=about.name,
        shape=workload.shape,
        storage=str(storage),
        implementation=implementation,
        rows=workload.tokens,
        error=timing.error,
        note=note,
        p20_s=p20,
        p50_s=p50,
        p80_s=p80,
        repeats=len(timing.seconds),
        calls=max(1, workload.steps),
        tokens_per_s=None if p50 is None else workload.tokens / p50,
        baseline=about.baseline,
        seed=0,
        limits=about.limits,
        machine=about.machine,
        repro=repro,
    )
    base = measured.get(Key(about.baseline, key.what))
    if base is not None and base.timing.seconds and timing.seconds:
        ratios = paired_ratios(base.timing, timing)
        low, middle, high = (quantile(ratios, share) for share in (0.2, 0.5, 0.8))
        result = replace(result, speed_up_p20=low, speed_up=middle, speed_up_p80=high)
    if p50 is None or not isinstance(storage, Storage):
        return result
    read, operations = stored_bytes(about.config, storage), operations_of(about.config, workload)
    return replace(
        result,
        bytes=read,
        flops=operations,
        gb_per_s=read / p50 / 1e9,
        gflop_per_s=operations / p50 / 1e9,
        share_of_limit=share_of_limit(read, operations, p50, about.limits),
    )


def stored_bytes(config: ModelConfig, storage: Storage) -> int:
    """Of every matrix that a step multiplies by, as stored: each is read once."""
    counts = Count()
    for (outputs, inputs), count in step_shapes(config).items():
        groups = outputs * -(-inputs // INT4_GROUP)
        counts += count * Count(matrix=outputs * inputs, rows=outputs, groups=groups)
    return counts.bytes(storage)


def operations_of(config: ModelConfig, workload: Workload) -> int:
    """Of the weight products: all of a decode step's; of a prompt the layers', and the head's of its last token."""
    shapes = step_shapes(config)
    if workload.steps:
        return flops(shapes, workload.batch)
    return flops(layer_shapes(config), workload.prompt) + flops(shapes - layer_shapes(config), 1)
