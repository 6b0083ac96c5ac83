"""The laws of `test_graph` on CUDA itself, where there is one."""

import gc
import weakref

import pytest
import torch
from torch import Tensor

from twinfer.compiled.graph import CudaDevice, DecodeGraphs, Step, bucket
from twinfer.compiled.layers import Cache
from twinfer.compiled.linear import PASS_ROWS
from twinfer.compiled.path import CompiledPath
from twinfer.compiled.programs import Program
from twinfer.oracle.baseline import Baseline
from twinfer.oracle.case import RandomPicker
from twinfer.oracle.models import RandomSource, draw_model_config
from twinfer.oracle.paths import assert_paths_agree
from twinfer.oracle.schedule import draw_schedule
from twinfer.spec.config import Storage

from .graph_machine import cloned, same_bits, same_caches

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
CONTEXT = 600


def path_of(storage: Storage = Storage.FLOAT32, captured: bool = True) -> CompiledPath:
    config = draw_model_config(RandomPicker(3), context=CONTEXT)
    return CompiledPath(RandomSource(config, 3), storage=storage, device="cuda", captured=captured)


def given(path: CompiledPath, rows: int, capacity: int, position: int) -> tuple[Step, Tensor]:
    """A step and its slots; the last sequence is at this position, those before it each two earlier."""
    positions = [max(0, position - 2 * (rows - 1 - row)) for row in range(rows)]
    tokens = [(each + position) % path.config.vocabulary for each in positions]
    step = tokens, positions, [row * capacity for row in range(rows)]
    return step, torch.arange(bucket(position + 1, capacity), device="cuda")


def noisy(path: CompiledPath, rows: int, capacity: int) -> tuple[Cache, ...]:
    caches = path.open(rows, capacity).caches
    generator = torch.Generator("cuda").manual_seed(rows)
    for each in (each for cache in caches for each in cache):
        each.normal_(generator=generator)
    return caches


@pytest.mark.parametrize("rows", [1, PASS_ROWS])
@pytest.mark.parametrize("storage", list(Storage))
@torch.no_grad()
def test_a_captured_step_is_the_plain_compiled_step(storage: Storage, rows: int) -> None:
    """To the bit, at capture and later, in every bucket; and nothing that was handed out changes."""
    path = path_of(storage)
    program = path.program(Program.DECODE if rows == 1 else Program.DECODE_ROWS)
    graphs = DecodeGraphs(path.model, CudaDevice(path.device))
    caches = noisy(path, rows, CONTEXT)
    held: list[tuple[Tensor, Tensor]] = []
    for position in (5, 6, 7, 200, 500, 8, 201):
        step, slot_S = given(path, rows, CONTEXT, position)
        plain = cloned(caches)
        plain_RV = program(path.model, plain, torch.tensor(step, device="cuda"), slot_S)
        logits_RV = graphs.step(program, caches, step, slot_S)
        assert same_bits(logits_RV, plain_RV)
        assert same_caches(caches, plain)
        held.append((logits_RV, plain_RV))
    assert all(same_bits(now, then) for now, then in held)


@torch.no_grad()
def test_evicting_one_graph_leaves_the_others_valid() -> None:
    """Two are kept; a third caches' step lets the least recently used go, whose memory others may then use."""
    path = path_of()
    program = path.program(Program.DECODE_ROWS)
    graphs = DecodeGraphs(path.model, CudaDevice(path.device), most=2)
    groups = [noisy(path, PASS_ROWS, CONTEXT) for _ in range(3)]
    for turn, number in enumerate((0, 1, 0, 2, 0, 1, 2, 2, 1)):
        step, slot_S = given(path, PASS_ROWS, CONTEXT, 10 + turn)
        plain = cloned(groups[number])
        plain_RV = program(path.model, plain, torch.tensor(step, device="cuda"), slot_S)
        assert same_bits(graphs.step(program, groups[number], step, slot_S), plain_RV)
        assert same_caches(groups[number], plain)


@torch.no_grad()
def test_a_capture_that_breaks_off_leaves_the_caches_as_they_were() -> None:
    """Reading a value breaks the capture off, after warm-up has written; and the next step can be captured."""
    path = path_of()
    program = path.program(Program.DECODE)
    graphs = DecodeGraphs(path.model, CudaDevice(path.device))
    caches = noisy(path, 1, CONTEXT)
    (step, slot_S), before = given(path, 1, CONTEXT, 9), cloned(caches)

    def reads_a_value(*everything: object) -> Tensor:
        logits_RV: Tensor = program(*everything)
        return logits_RV * logits_RV[0, 0].item()

    with pytest.raises(RuntimeError):
        graphs.step(reads_a_value, caches, step, slot_S)
    assert same_caches(caches, before)
    plain_RV = program(path.model, cloned(caches), torch.tensor(step, device="cuda"), slot_S)
    assert same_bits(graphs.step(program, caches, step, slot_S), plain_RV)


@torch.no_grad()
def test_the_pool_grows_to_the_largest_bucket_and_the_logits_of_each() -> None:
    """The largest first: what smaller ones need is there already, but for logits and the allocator's rounding."""
    path = path_of()
    program = path.program(Program.DECODE)
    graphs = DecodeGraphs(path.model, CudaDevice(path.device))
    caches = noisy(path, 1, CONTEXT)
    reserved = []
    for position in (500, 250, 120):
        graphs.step(program, caches, *given(path, 1, CONTEXT, position))
        reserved.append(pool_bytes(graphs))
    assert reserved[0] > 0
    assert reserved == [reserved[0]] * 3, "2 MiB segments hold the logits of a tiny vocabulary too"


def pool_bytes(graphs: DecodeGraphs) -> int:
    """What the allocator holds for the graphs' pool."""
    segments = torch.cuda.memory_snapshot()
    return sum(each["total_size"] for each in segments if tuple(each["segment_pool_id"]) == tuple(graphs._pool))


@torch.no_grad()
def test_closed_sequences_keep_no_memory() -> None:
    path = path_of()
    sequences = path.open(1, CONTEXT)
    path.extend(sequences, [torch.zeros(3, dtype=torch.int64)])
    path.extend(sequences, [torch.zeros(1, dtype=torch.int64)])
    caches = [weakref.ref(each) for cache in sequences.caches for each in cache]
    sequences.close()
    gc.collect()
    assert all(each() is None for each in caches)


@pytest.mark.parametrize("captured", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_any_schedule_gives_what_the_reference_gives(captured: bool, seed: int) -> None:
    """Captured or not: open, extend, growth and closing, judged by the budget."""
    path = path_of(captured=captured)
    config = path.config
    schedule = draw_schedule(RandomPicker(seed), config)
    assert_paths_agree(Baseline.of(RandomSource(config, 3), storage=Storage.FLOAT32), path, schedule)
