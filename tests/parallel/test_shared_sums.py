"""Sums through shared memory, among threads that stand for ranks."""

import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from twinfer.parallel.shared_sums import SharedSums, memory_bytes


def parts_of(rank: int, sizes: list[int], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed * 8 + rank)
    return [torch.randn(size, generator=generator) for size in sizes]


@settings(deadline=None, max_examples=25)
@given(
    ranks=st.integers(2, 4),
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=30),
    held=st.integers(0, 9),
    seed=st.integers(0, 2**16),
)
def test_sums_are_those_of_all_parts(ranks: int, sizes: list[int], held: int, seed: int) -> None:
    """Each sum is that of the ranks' parts in their order, to the bit, whatever is in flight and whoever is late."""
    memory = bytearray(memory_bytes(ranks))
    processes = [os.pidfd_open(os.getpid())] * ranks
    expected = [list(each) for each in zip(*(parts_of(rank, sizes, seed) for rank in range(ranks)), strict=True)]

    def rank_adds_up(rank: int) -> list[Tensor]:
        sums, lateness = SharedSums(memory, rank, ranks, processes), random.Random(seed + rank)
        choice = random.Random(seed)  # the same on all ranks
        parts, flying = parts_of(rank, sizes, seed), []
        for part in parts:
            time.sleep(lateness.choice((0, 0, 0, 1e-4, 3e-3)))
            flying.append(sums.start(part))
            while len(flying) > held:
                flying.pop(choice.randrange(len(flying))).wait()
        for each in flying:
            each.wait()
        return parts

    with ThreadPoolExecutor(ranks) as pool:
        found = list(pool.map(rank_adds_up, range(ranks)))
    os.close(processes[0])
    for call, parts in enumerate(expected):
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        for rank in range(ranks):
            assert torch.equal(found[rank][call], total), (rank, call)


def test_a_wait_for_a_process_that_has_ended_fails() -> None:
    """A rank that waits for the part of a process that ends raises an error soon, which says so."""
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.2)"])
    own, process = os.pidfd_open(os.getpid()), os.pidfd_open(other.pid)
    begun = SharedSums(bytearray(memory_bytes(2)), 0, 2, [own, process]).start(torch.ones(3))
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match="connection is lost to place 1 of the group"):
        begun.wait()
    assert time.monotonic() - begin < 5
    other.wait()
    os.close(own)
    os.close(process)
