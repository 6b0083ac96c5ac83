"""A tape replays a decode step to the bit, keeps no caches alive, and is not trusted where it would not."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.codecache import PyCodeCache

from twinfer.compiled import cpu_graph as tape
from twinfer.compiled.cpu_graph import CpuGraph, CpuGraphs
from twinfer.compiled.graph import DecodeGraphs, Step
from twinfer.compiled.path import CompiledPath
from twinfer.compiled.programs import Program
from twinfer.oracle.models import RandomSource

from ..bench.tiny_llama import llama
from .graph_machine import same_bits
from .stand_in import CountedTapes


def compiled_path(**options: Any) -> CompiledPath:
    config = replace(llama(layers=3), context=300)
    return CompiledPath(RandomSource(config, 5), **options)


def decoded(path: CompiledPath, tokens: list[int], steps: int, batch: int = 1, room: int = 290) -> list[Tensor]:
    """Logits of all steps, the sequences closed by the end."""
    sequences = path.open(batch, room)
    for token in tokens:  # one by one: no prefill has to be compiled
        logits = [path.extend(sequences, [torch.tensor([token + row]) for row in range(batch)])]
    for _ in range(steps):
        logits.append(path.extend(sequences, list(logits[-1].argmax(-1).split(1))))
    sequences.close()
    return logits


def of_kernels(
    path: CompiledPath, report: Callable[[str], None] = lambda line: None
) -> tuple[CompiledPath, CountedTapes]:
    """The path with a fresh device that counts."""
    device = CountedTapes()
    path._graphs = DecodeGraphs(path.model, device, report=report)
    return path, device


@pytest.fixture(scope="module")
def path() -> CompiledPath:
    return compiled_path()


@pytest.mark.parametrize("batch", [1, 3])
def test_tapes_of_kernels_give_what_the_programs_give(path: CompiledPath, batch: int) -> None:
    """Through several buckets. The plain call is given as many slots, for a sum over more of them may round apart."""

    class Called(DecodeGraphs):
        def step(self, program: Any, caches: Any, step: Step, slot_S: Tensor) -> Tensor:
            result: Tensor = program(self._model, caches, torch.tensor(step), slot_S)
            return result

    taped = decoded(of_kernels(path)[0], [1, 2, 3], 140, batch)
    path._graphs = Called(path.model, CpuGraphs())
    called = decoded(path, [1, 2, 3], 140, batch)
    assert all(map(same_bits, taped, called))


def test_a_tape_holds_kernels_and_no_python_between_them(path: CompiledPath) -> None:
    """Before the layers, each layer, and after them: one call each, or the gain would be gone."""
    path, _ = of_kernels(path)
    decoded(path, [1, 2], 2)
    assert isinstance(path._graphs, DecodeGraphs)
    (graph,) = path._graphs._graphs.values()
    assert isinstance(graph.captured, CpuGraph)
    assert len(graph.captured.calls) == len(path.config.layers) + 2


def test_later_sequences_of_the_same_form_take_over_a_tape(path: CompiledPath) -> None:
    path, device = of_kernels(path)
    first = decoded(path, [1, 2, 3], 20)
    blocked = [torch.full((17, 3), torch.nan) for _ in range(100)]  # where the caches were, or some of it
    second = decoded(path, [4, 3], 20)
    assert len(device.graphs) == 1
    again = decoded(path, [1, 2, 3], 20)
    assert len(device.graphs) == 1
    assert all(map(same_bits, first, again))
    assert not any(map(same_bits, first, second))
    assert all(each.isnan().all() for each in blocked), "a replay has written where the first caches were"


def test_caches_of_another_form_have_tapes_of_their_own(path: CompiledPath) -> None:
    """Though it reads as many slots: a kernel is told how large the caches are."""
    path, device = of_kernels(path)
    decoded(path, [1, 2, 3], 5)
    small = decoded(path, [1, 2, 3], 5, room=99)
    assert len(device.graphs) == 2
    assert all(map(same_bits, small, decoded(of_kernels(path)[0], [1, 2, 3], 5, room=99)))


def test_a_tape_serves_one_living_batch(path: CompiledPath) -> None:
    """Two batches in turn have two CPU graphs, and neither sees the other's tokens."""
    alone = [decoded(path, tokens, 6) for tokens in ([1, 2, 3], [2, 3, 4])]
    path, device = of_kernels(path)
    both = [path.open(1, 290) for _ in alone]
    for token in (1, 2, 3):
        found = [[path.extend(each, [torch.tensor([token + more])])] for more, each in enumerate(both)]
    for _ in range(6):
        for each, logits in zip(both, found, strict=True):
            logits.append(path.extend(each, [logits[-1].argmax(-1)]))
    assert len(device.graphs) == 2
    for one, other in zip(alone, found, strict=True):
        assert all(map(same_bits, one, other))


def test_a_tape_keeps_no_caches(path: CompiledPath) -> None:
    path, _ = of_kernels(path)
    sequences = path.open(2, 290)
    path.extend(sequences, [torch.tensor([1])] * 2)
    caches = [weakref.ref(each.untyped_storage()) for cache in sequences.caches for each in cache]
    kept = [weakref.ref(each) for cache in sequences.caches for each in cache]
    sequences.close()
    gc.collect()
    assert caches
    assert all(each() is None for each in kept)


@pytest.mark.parametrize("missed", ["all kernels", "the last call"])
def test_tapes_that_miss_something_are_not_trusted(missed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path then decodes without them, says so, and gives what it gives without any."""
    right = decoded(compiled_path(captured=False), [1, 2, 3], 5)
    if missed == "all kernels":
        monkeypatch.setattr(tape, "_KERNEL", "no_such_prefix")
    else:
        monkeypatch.setattr(CpuGraph, "replay", lambda self: [f(*a) for f, a in self.calls[:-1]])
    said: list[str] = []
    path = compiled_path(report=said.append)
    found = decoded(path, [1, 2, 3], 5)
    assert path._graphs is None
    assert any("decoding without graphs" in each for each in said)
    assert all(map(same_bits, right, found))


@pytest.mark.parametrize("disabled", [False, True])
def test_others_that_compile_with_fresh_caches_do_no_harm(disabled: bool) -> None:
    """Inductor then forgets the modules of our kernels, as it does at each piece where caches are disabled."""
    right = decoded(compiled_path(captured=False), [1, 2, 3], 140)
    path, device = of_kernels(compiled_path())
    with torch._inductor.config.patch(force_disable_caches=disabled):
        path.program(Program.DECODE)
    assert path._graphs is not None
    sequences = path.open(1, 290)
    for token in (1, 2, 3):
        found = [path.extend(sequences, [torch.tensor([token])])]
    for step in range(140):
        if step in (20, 70):
            torch._inductor.utils.clear_caches()
            assert not PyCodeCache.modules
        found.append(path.extend(sequences, [found[-1].argmax(-1)]))
    assert len(device.graphs) > 2
    alive = [len(each.calls) for each in device.graphs if each.calls]
    assert alive[-2:] == [len(path.config.layers) + 2] * 2
    assert [int(each.argmax()) for each in found] == [int(each.argmax()) for each in right]


def test_a_later_tape_that_misses_kernels_is_not_used(path: CompiledPath, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step is done without, and the user is told, once."""
    path, device = of_kernels(path)
    right = decoded(path, [1, 2, 3], 100)
    said: list[str] = []
    path, device = of_kernels(path, said.append)
    sequences = path.open(1, 290)
    for token in (1, 2, 3):
        found = [path.extend(sequences, [torch.tensor([token])])]
    monkeypatch.setattr(tape, "_loaded", [])
    for _ in range(100):
        found.append(path.extend(sequences, [found[-1].argmax(-1)]))
    assert len(device.graphs) == 1 + 103 - 64, "each step past the first 64 slots tries again"
    assert said == ["some steps are decoded without graphs: a capture missed calls; is this torch supported?"]
    assert all(map(same_bits, right, found))


def test_an_operator_that_was_given_a_cache_cannot_be_moved() -> None:
    """Its tape says so, and stays as it was."""
    cache = torch.zeros(8)
    device = CpuGraphs()
    captured, _ = device.capture(lambda: cache.add_(1.0), None)
    assert not device.move(captured, [(cache.data_ptr(), cache.nbytes)], [torch.zeros(8)])
    captured.replay()
    assert cache.tolist() == [2.0] * 8


def test_an_operator_of_other_memory_is_no_hindrance() -> None:
    cache, other = torch.zeros(8), torch.ones(3)
    device = CpuGraphs()
    captured, result = device.capture(lambda: other * 2, None)
    assert device.move(captured, [(cache.data_ptr(), cache.nbytes)], [torch.zeros(8)])
    other.fill_(5.0)
    captured.replay()
    assert result.tolist() == [10.0] * 3


def test_a_whole_call_is_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels, operators and whole calls that it makes in turn are none of the record's, and are made at a replay."""
    kernels: dict[str, Any] = {"cpp_fused_add": lambda x: x.add_(1.0)}
    monkeypatch.setattr(tape, "_loaded", [kernels])
    given = torch.zeros(3)

    def inner() -> None:
        kernels["cpp_fused_add"](given)

    def outer() -> Tensor:
        tape.call_whole(inner)
        return given * 2

    captured, result = CpuGraphs().capture(lambda: tape.call_whole(outer), None)
    assert len(captured.calls) == 1
    captured.replay()
    assert given.tolist() == [2.0] * 3
    assert result.tolist() == [4.0] * 3
    kernels["cpp_fused_add"](given)
    assert len(captured.calls) == 1
