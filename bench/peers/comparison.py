"""The compiled path and its peers on one model, each peer in a subprocess, and all that the ratios need."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...checkpoint import Checkpoint
from ...compiled.weights import prepare
from ...reference.path import ReferencePath
from ...spec.config import Storage
from ..candidates import Candidate, PathCandidate
from ..limits import measure_limits
from ..machine import this_machine
from ..perplexity import PARAGRAPH
from ..plan import About, Plan, own_candidates, row, samples_of
from ..products import layer_shapes, matrix_products, memory_limit, prefill_products, small_products, step_shapes
from ..reasons import reason
from ..rows import Row
from ..side_by_side import Key, Measured, ModelSample, Workload, greedy, measure_in_turn, prompt
from ..targets import EAGER, own, products_of
from .llama_like import check_llama_like
from .subprocess_peer import SubprocessPeer
from .table import PEERS, Capacity, ready_peers

AGREEMENT = 16
"""Greedy tokens of everyone that are compared with the reference's."""
Report = Callable[[str], None]

start_peer: Callable[[str, str, Path, Capacity], AbstractContextManager[Candidate]] = SubprocessPeer


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How far a candidate goes with the reference in float32, over so many greedy tokens after a prompt."""

    alone: int
    """Tokens before the first that differs; a near tie parts two texts for good."""
    led: int
    """Tokens that it picks after the prompt and all of the reference's tokens before."""
    of: int

    @property
    def text(self) -> str:
        return f"the reference's first {self.alone} of {self.of} tokens; led by them, picks {self.led}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a run found out."""

    plan: Plan
    about: About
    measured: Mapping[Key, Measured]
    workloads: Mapping[str, Sequence[Workload]]
    """Of everyone who was measured, by name."""
    absent: Mapping[str, str]
    """Why others were not, in a line each."""
    agreements: Mapping[str, Agreement]

    def rows(self, model: str) -> list[Row]:
        """Of models; `model` is what the command line named."""
        return [self._row(name, workload, model) for name, each in self.workloads.items() for workload in each]

    def _row(self, name: str, workload: Workload, model: str) -> Row:
        storage = next((each for each in self.plan.storages if own(each) == name), None)
        repro = f"{self.plan.repro('peers', model, storage)} --peer '{EAGER}'"
        return row(
            Key(name, workload.title),
            workload,
            self.measured,
            self.about,
            storage=PEERS[name].precision if storage is None else storage,
            implementation="compiled" if storage is not None else name,
            repro=repro if storage is not None or name == EAGER else f"{repro} --peer '{name}'",
            note=self.agreements[name].text,
        )


def measure(
    model: str,
    checkpoint: Checkpoint,
    plan: Plan,
    names: Sequence[str],
    squares: Sequence[int],
    folder: Path,
    report: Report,
) -> Found:
    """Prepare everyone, then time all in turn. Raises `RequestError` where the model is no plain LLaMA.

    `model` is what the command line named, and `checkpoint` what was opened by it; `names` are the peers that are
    wanted; what they read is written to `folder`, the caller's.
    """
    check_llama_like(checkpoint.config)
    capacity = _capacity(plan)
    with contextlib.ExitStack() as stack:

        def start(name: str) -> Candidate:
            return stack.enter_context(start_peer(name, model, folder, capacity))

        return _measure(checkpoint, plan, names, squares, start, report)


def _capacity(plan: Plan) -> Capacity:
    longest = plan.prompt + max(plan.steps + 1, AGREEMENT)
    return Capacity(decode_tokens=longest, most_tokens=max(longest, *plan.prefills), threads=torch.get_num_threads())


def _measure(
    checkpoint: Checkpoint,
    plan: Plan,
    names: Sequence[str],
    squares: Sequence[int],
    start: Callable[[str], Candidate],
    report: Report,
) -> Found:
    report("measuring this machine's limits")
    limits = measure_limits()
    paths, _ = own_candidates(checkpoint, plan, report)
    peers, absent = ready_peers(names, start, report)
    report("comparing first tokens")
    agreements = dict(_agreements({**paths, **peers}, set(peers), absent, checkpoint, plan))
    candidates = {name: each for name, each in {**paths, **peers}.items() if name in agreements}
    workloads = {name: plan.workloads if name in paths else _of_peer(name, plan) for name in candidates}
    samples = samples_of(candidates, workloads, checkpoint.config.vocabulary)
    samples.update(_products(checkpoint, plan, squares))
    measured = measure_in_turn(samples, plan.rounds, may_fail=set(peers), report=report)
    measured.update(memory_limit(each, size, limits, plan.rounds) for each in plan.storages for size in squares)
    return Found(
        plan=plan,
        about=About(
            name=checkpoint.name, config=checkpoint.config, machine=this_machine(), limits=limits, baseline=EAGER
        ),
        measured=measured,
        workloads=workloads,
        absent=absent,
        agreements=agreements,
    )


def _agreements(
    candidates: Mapping[str, Candidate],
    peers: set[str],
    absent: dict[str, str],
    checkpoint: Checkpoint,
    plan: Plan,
) -> Iterator[tuple[str, Agreement]]:
    """How far each goes with the reference; a peer that raises is absent from then on.

    After a text where the model has a tokenizer: after ids drawn at random much is nearly a tie.
    """
    prompt_T = prompt(checkpoint.config.vocabulary, plan.prompt)
    if checkpoint.tokenizer is not None:
        prompt_T = torch.tensor(checkpoint.tokenizer.encode(PARAGRAPH)[: plan.prompt])
    wanted = greedy(PathCandidate(ReferencePath(checkpoint.source)), prompt_T, AGREEMENT)
    for name, candidate in candidates.items():
        try:
            yield name, agreement(candidate, prompt_T, wanted)
        except Exception as error:  # another library's
            if name not in peers:
                raise
            absent[name] = reason(error)


def agreement(candidate: Candidate, prompt_T: Tensor, wanted: Sequence[int]) -> Agreement:
    """How far a candidate goes with these greedy tokens, by itself and when it is given them."""
    alone = equal_for(wanted, greedy(candidate, prompt_T, len(wanted)))
    led = 0
    for at, token in enumerate(wanted):
        led += greedy(candidate, torch.cat([prompt_T, torch.tensor(wanted[:at], dtype=torch.int64)]), 1) == [token]
    return Agreement(alone=alone, led=led, of=len(wanted))


def equal_for(wanted: Sequence[int], found: Sequence[int]) -> int:
    """
    >>> equal_for([5, 6, 7], [5, 6, 8])
    2
    """
    return next((at for at, pair in enumerate(zip(wanted, found, strict=True)) if pair[0] != pair[1]), len(wanted))


def _of_peer(name: str, plan: Plan) -> list[Workload]:
    """One sequence decoded, and the longest prompt."""
    return [plan.decode, Workload(prompt=max(plan.prefills))] if PEERS[name].prefills else [plan.decode]


def _products(checkpoint: Checkpoint, plan: Plan, squares: Sequence[int]) -> dict[Key, ModelSample]:
    """What ratios of products are made of, as far as the plan has their storages."""
    config, longest = checkpoint.config, max(plan.prefills)
    samples: dict[Key, ModelSample] = {}
    if Storage.INT8 in plan.storages and 32 in plan.batches:
        samples[products_of(32)] = matrix_products(step_shapes(config), 32)
    if Storage.FLOAT32 in plan.storages:
        samples[products_of(longest)] = matrix_products(layer_shapes(config), longest)
        model = prepare(checkpoint.source, Storage.FLOAT32, torch.device("cpu"))
        key, sample = prefill_products(model, config, longest)
        samples[key] = sample
    for storage in plan.storages:
        for size in squares:
            samples.update(small_products(storage, size))
    return samples
