"""What the ranks of a pool are asked to do; each function runs on all ranks with equal arguments."""

from contextlib import ExitStack
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from exact import ExactSource, without_norms  # beside this file
from mutants import MUTANTS, OF_PIECES
from stored import differing
from streamed import differing as differing_records
from streamed import stream
from torch import Tensor

from twinfer.checkpoint import open_model
from twinfer.compiled.moe import Moe
from twinfer.compiled.path import Mode
from twinfer.compiled.programs import Program
from twinfer.compiled.steps import eager
from twinfer.generation import generate
from twinfer.oracle.models import RandomSource
from twinfer.parallel.experts import expert_pieces, serve
from twinfer.parallel.groups import Groups, form_groups
from twinfer.parallel.ledger import Collective
from twinfer.parallel.path import RankPath
from twinfer.parallel.wire import Wire
from twinfer.spec import parallel as degrees
from twinfer.spec.config import ModelConfig, Storage
from twinfer.spec.moe import MoeConfig
from twinfer.spec.parallel import ParallelConfig
from twinfer.spec.weights import WeightSource

CPU = torch.device("cpu")


@cache
def groups_of(parallel: ParallelConfig) -> Groups:
    return form_groups(parallel, "cpu")


def path_of(
    config: ModelConfig, seed: int, parallel: ParallelConfig, storage: Storage, compute: torch.dtype
) -> RankPath:
    return path_over(RandomSource(config, seed), parallel, storage, compute)


def source_of(model: ModelConfig | str, seed: int) -> WeightSource:
    """Weights of a built-in model, or drawn ones."""
    return open_model(model).source if isinstance(model, str) else RandomSource(model, seed)


def path_over(source: WeightSource, parallel: ParallelConfig, storage: Storage, compute: torch.dtype) -> RankPath:
    wire = Wire(groups_of(parallel))
    return RankPath(source, wire, storage=storage, compute=compute, device=CPU, mode=Mode.EAGER)


def extend(
    config: ModelConfig,
    seed: int,
    parallel: ParallelConfig,
    storage: Storage,
    calls: list[list[Tensor]],
    compute: torch.dtype = torch.float32,
    every_position: bool = False,
) -> tuple[list[Any], list[tuple[str, tuple[int, ...], int]]]:
    """Return the logits of each call on one batch, and the ledger."""
    path = path_of(config, seed, parallel, storage, compute)
    sequences = path.open(len(calls[0]), 1)
    logits: list[Any] = [path.extend(sequences, call, every_position=every_position) for call in calls]
    return logits, [(call.kind.value, call.ranks, call.bytes) for call in path.wire.ledger.calls]


def extend_with(mutant: str, **given: Any) -> tuple[list[Any], list[tuple[str, tuple[int, ...], int]]]:
    """Do the same with a seeded fault."""
    with ExitStack() as stack:
        for each in MUTANTS[mutant]():
            stack.enter_context(each)
        return extend(**given)


def events(
    config: ModelConfig, seed: int, parallel: ParallelConfig, tokens: Tensor
) -> list[tuple[str, str, tuple[int, ...]]]:
    """Return the event log of one call: what begins and what is awaited, the kind, and the ranks."""
    path = path_of(config, seed, parallel, Storage.FLOAT32, torch.float32)
    path.extend(path.open(1, len(tokens)), [tokens])
    return [(step.value, call.kind.value, call.ranks) for step, call in path.wire.ledger.events]


def extend_in_pieces(
    shortest: int, mutant: str | None = None, **given: Any
) -> tuple[list[Any], list[tuple[str, tuple[int, ...], int]]]:
    """Do the same as `extend` where pieces of a prompt that overlap have at least so many tokens."""
    with ExitStack() as stack:
        stack.enter_context(patch.multiple(degrees, STAGED_PIECE=shortest, PAIRED_PIECE=shortest))
        for each in () if mutant is None else OF_PIECES[mutant]():
            stack.enter_context(each)
        return extend(**given)


def computing(
    config: ModelConfig, seed: int, parallel: ParallelConfig, prompts: list[Tensor], mutant: str | None = None
) -> list[tuple[str, Any]]:
    """Return the event log of one call, and in it how many rows each piece of the layers has as it is computed.

    Of a collective there is its kind and the bytes that this rank hands in.
    """
    with ExitStack() as stack:
        for each in () if mutant is None else OF_PIECES[mutant]():
            stack.enter_context(each)
        path = path_of(config, seed, parallel, Storage.FLOAT32, torch.float32)
        events: list[Any] = path.wire.ledger.events

        def logged(piece: Any) -> Any:
            def compute(x_TM: Tensor, *given: Any) -> Any:
                events.append(("computes", len(x_TM)))
                return piece(x_TM, *given)

            return piece and compute

        pieces = path._programs[Program.PREFILL]._pieces
        for layer, each in pieces.layers.items():
            changed = {name: logged(getattr(each, name)) for name in ("project", "attend", "feed", "close")}
            pieces.layers[layer] = each._replace(**changed)
        path.extend(path.open(len(prompts), 1), prompts)
    return [
        each if each[0] == "computes" else (f"{each[1].kind.value} {each[0].value}", each[1].bytes) for each in events
    ]


def generated(
    config: ModelConfig, seed: int, parallel: ParallelConfig, prompts: list[list[int]], tokens: int
) -> tuple[list[list[int]], list[int]]:
    """Return the new tokens of each prompt, and the rows of each message to the next stage, in their order."""
    path = path_of(config, seed, parallel, Storage.FLOAT32, torch.float64)
    outputs = generate(path, prompts, max_new_tokens=tokens).outputs()
    sends = [call.bytes for call in path.wire.ledger.calls if call.kind is Collective.SEND and call.bytes]
    return [list(each.ids) for each in outputs], [nbytes // (8 * config.hidden) for nbytes in sends]


def extend_exactly(
    config: ModelConfig,
    seed: int,
    parallel: ParallelConfig,
    storage: Storage,
    calls: list[list[Tensor]],
    compute: torch.dtype,
    mutant: str | None = None,
) -> list[Any]:
    """Return the logits of each call on a model without roundings."""
    with ExitStack() as stack:
        stack.enter_context(without_norms())
        for each in () if mutant is None else MUTANTS[mutant]():
            stack.enter_context(each)
        path = path_over(ExactSource(config, seed, storage), parallel, storage, compute)
        sequences = path.open(len(calls[0]), 1)
        return [path.extend(sequences, call) for call in calls]


def serve_exactly(
    config: ModelConfig,
    seed: int,
    parallel: ParallelConfig,
    storage: Storage,
    rows: list[Tensor],
    chosen: list[Tensor],
    compute: torch.dtype,
) -> Tensor:
    """Return what experts make of the rows of this rank's data group, [T, K, M]."""
    path = path_over(ExactSource(config, seed, storage), parallel, storage, compute)
    layer, data = path.share.config.layers[0], path.wire.groups.place.data
    assert isinstance(layer.mlp, MoeConfig)
    weights = path.share.model.layers[0].mlp
    assert isinstance(weights, Moe)
    pieces = expert_pieces(layer.mlp, storage, eager)
    return serve(rows[data].to(compute), chosen[data], weights, layer.mlp, pieces, path.wire)


def cell(
    model: ModelConfig | str, seed: int, parallel: ParallelConfig, storage: Storage, calls: list[list[Tensor]]
) -> tuple[list[Tensor], list[tuple[str, tuple[int, ...], int]], list[str]]:
    """Return the logits of each call in float64, the ledger, and what is not stored as one rank stores it."""
    source = source_of(model, seed)
    path = path_over(source, parallel, storage, torch.float64)
    sequences = path.open(len(calls[0]), 1)
    logits = [path.extend(sequences, call) for call in calls]
    counted = [(call.kind.value, call.ranks, call.bytes) for call in path.wire.ledger.calls]
    return logits, counted, differing(path, source, storage)


def sums(parallel: ParallelConfig, sizes: tuple[int, ...]) -> tuple[Tensor | int, ...]:
    """Return sums of tensors full of ones, twos and so on by rank; and how many of them went through shared memory."""
    groups = groups_of(parallel)
    wire, shared = Wire(groups), groups.tensor.sums
    assert shared is not None
    before = shared.begun
    found = [wire.all_reduce(torch.full((size,), 1.0 + groups.rank), groups.tensor) for size in sizes]
    return (*found, shared.begun - before)


def extend_streamed(parallel: ParallelConfig, **given: Any) -> dict[str, Any]:
    """Return what `stream` does, for these degrees."""
    return stream(groups_of(parallel), **given)


def differing_layers(
    config: ModelConfig, seed: int, parallel: ParallelConfig, storage: Storage, folder: str
) -> list[str]:
    """Return which records differ from a resident path's weights."""
    resident = path_of(config, seed, parallel, storage, torch.float32)
    return differing_records(groups_of(parallel), resident, folder)


def recorded(
    config: ModelConfig, parallel: ParallelConfig, storage: Storage, calls: list[list[Tensor]], forgets: set[int]
) -> tuple[list[Any], list[tuple[str, tuple[int, ...], int]], int]:
    """Return the logits of each call, the ledger, and how many steps are recorded at the end.

    Before calls of those numbers, a rank other than the first forgets what it has recorded; so does none if empty.
    """
    path = path_of(config, 1, parallel, storage, torch.float64)
    path._graphs = {}
    sequences, logits = path.open(len(calls[0]), 64), []
    for number, call in enumerate(calls):
        if number in forgets and path.wire.groups.rank:
            path._graphs.clear()
        logits.append(path.extend(sequences, call))
    kept = sum(len(graphs._graphs) for graphs in path._graphs.values())
    return logits, [(call.kind.value, call.ranks, call.bytes) for call in path.wire.ledger.calls], kept


def added_up(number: float, raises: set[int]) -> float:
    """Return the sum of all ranks' numbers."""
    if torch.distributed.get_rank() in raises:
        raise ArithmeticError("asked for")
    x = torch.tensor(number)
    torch.distributed.all_reduce(x)
    return float(x)


def muted(config: ModelConfig, parallel: ParallelConfig, storage: Storage, calls: list[list[Tensor]]) -> int | None:
    """Return how many collective calls the first rank makes that are counted, while the others do nothing."""
    path = path_of(config, 1, parallel, storage, torch.float32)
    if path.wire.groups.rank:
        return None
    with path.wire.muted():
        sequences = path.open(len(calls[0]), 64)
        for call in calls:
            path.extend(sequences, call)
    return len(path.wire.ledger.calls)


def compiled(
    config: ModelConfig,
    parallel: ParallelConfig,
    storage: Storage,
    calls: list[list[Tensor]],
    programs: list[Program],
) -> tuple[list[Any], list[tuple[str, tuple[int, ...], int]], int]:
    """Return the logits of each call on ranks that compile one after the other, the ledger, and how many steps are
    recorded."""
    wire = Wire(groups_of(parallel))
    path = RankPath(RandomSource(config, 1), wire, storage=storage, compute=torch.float64, device=CPU)
    for rank in range(parallel.ranks):
        for name in programs if rank == wire.groups.rank else []:
            path.compile(name)
        dist.barrier()
    assert path._graphs is not None, "a replay differs from the plain call"
    sequences = path.open(len(calls[0]), 64)
    logits: list[Any] = [path.extend(sequences, call) for call in calls]
    kept = sum(len(graphs._graphs) for graphs in path._graphs.values())
    return logits, [(call.kind.value, call.ranks, call.bytes) for call in wire.ledger.calls], kept
