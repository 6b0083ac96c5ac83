"""Collectives compute what their names say, and the ledger counts what the closed formulas give."""

from collections import Counter
from itertools import chain

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from twinfer.oracle.trial import same_bits
from twinfer.reference.parallel.collectives import all_gather, all_reduce, all_to_all, reduce_scatter, send
from twinfer.reference.parallel.ledger import Collective, Ledger

degrees = st.integers(1, 6)
sizes = st.integers(0, 9)
seeds = st.integers(0, 2**31)


def integers(seed: int, ranks: int, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(-9, 10, (ranks, *shape), generator=generator).to(torch.float32))


def ring(ranks: list[int]) -> set[tuple[int, int]]:
    return set(zip(ranks, [*ranks[1:], ranks[0]], strict=True)) if len(ranks) > 1 else set()


@given(seed=seeds, count=degrees, pieces=st.integers(1, 3))
@settings(max_examples=30)
def test_sums(seed: int, count: int, pieces: int) -> None:
    """All-reduce gives all ranks the sum, reduce-scatter its pieces; a ring sends 2 (R - 1) n and (R - 1) n bytes."""
    ranks, n = [10 + rank for rank in range(count)], 4 * pieces * count
    values = integers(seed, count, pieces * count)
    total = torch.stack(values).sum(0)
    whole, scattered = Ledger(), Ledger()
    assert all(same_bits(got, total) for got in all_reduce(values, ranks, whole))
    assert same_bits(torch.cat(reduce_scatter(values, ranks, scattered)), total)
    assert whole.bytes == dict.fromkeys(ring(ranks), 2 * (count - 1) * n // count)
    assert whole.messages == dict.fromkeys(ring(ranks), 2 * (count - 1))
    assert scattered.bytes == dict.fromkeys(ring(ranks), (count - 1) * n // count)
    assert scattered.messages == dict.fromkeys(ring(ranks), count - 1)
    assert [call.bytes for call in whole.calls] == ([(n,) * count] if count > 1 else [])


@given(seed=seeds, count=degrees, size=sizes)
@settings(max_examples=30)
def test_sums_that_do_not_divide(seed: int, count: int, size: int) -> None:
    """Bytes are the same closed formula, all together, whatever the size."""
    values, ledger = integers(seed, count, size), Ledger()
    assert all(same_bits(got, torch.stack(values).sum(0)) for got in all_reduce(values, range(count), ledger))
    assert sum(ledger.bytes.values()) == 2 * (count - 1) * 4 * size
    assert sum(ledger.messages.values()) == 2 * (count - 1) * min(count, size)


@given(seed=seeds, lengths=st.lists(sizes, min_size=1, max_size=5))
@settings(max_examples=30)
def test_gather(seed: int, lengths: list[int]) -> None:
    """Unequal pieces arrive in the order of the ranks, each after R - 1 hops."""
    values = [integers(seed + rank, 1, 2, size)[0] for rank, size in enumerate(lengths)]
    ledger, count = Ledger(), len(lengths)
    for got in all_gather(values, range(count), ledger, dim=1):
        assert got.tolist() == [list(chain(*(value[row].tolist() for value in values))) for row in range(2)]
    assert sum(ledger.bytes.values()) == (count - 1) * sum(8 * size for size in lengths)
    assert set(ledger.bytes) <= ring(list(range(count)))


@given(
    table=st.integers(1, 5).flatmap(lambda n: st.lists(st.lists(sizes, min_size=n, max_size=n), min_size=n, max_size=n))
)
@settings(max_examples=30)
def test_exchange(table: list[list[int]]) -> None:
    """What rank j has for rank i arrives at i in place j; each pair has a message where there is anything to send."""
    count, ledger = len(table), Ledger()
    values = [[torch.full((size,), 10.0 * j + i) for i, size in enumerate(row)] for j, row in enumerate(table)]
    got = all_to_all(values, range(count), ledger)
    for i in range(count):
        assert [each.tolist() for each in got[i]] == [[10.0 * j + i] * table[j][i] for j in range(count)]
    sent = {(j, i): 4 * table[j][i] for j in range(count) for i in range(count) if i != j and table[j][i]}
    assert ledger.bytes == sent
    assert ledger.messages == dict.fromkeys(sent, 1)
    assert same(all_to_all(got, range(count), Ledger()), values)


def same(one: list[list[Tensor]], other: list[list[Tensor]]) -> bool:
    pairs = zip(chain(*one), chain(*other), strict=True)
    return all(same_bits(a, b) for a, b in pairs)


def walked(pieces: list[int], holder: list[int]) -> dict[tuple[int, int], int]:
    """Bytes by pair where piece p walks around the ring from its holder, a hop at a time, to the rank before it."""
    count, sent = len(pieces), Counter[tuple[int, int]]()
    for piece, size in enumerate(pieces):
        for hop in range(count - 1):
            source = (holder[piece] + hop) % count
            sent[source, (source + 1) % count] += size
    return {pair: size for pair, size in sent.items() if size}


@given(count=st.integers(2, 5), size=sizes, seed=seeds)
@settings(max_examples=20)
def test_every_piece_walks_the_ring(count: int, size: int, seed: int) -> None:
    """Of a gather from its rank; of a sum to the rank whose it is, and of an all-reduce on from there.

    Pair by pair, where pieces differ in size, so that it matters which of them a rank does not send on.
    """
    values, ranks = integers(seed, count, size), range(count)
    pieces = [4 * (size // count + (rank < size % count)) for rank in ranks]
    gathered, scattered, reduced = Ledger(), Ledger(), Ledger()
    all_gather([torch.zeros(each // 4) for each in pieces], ranks, gathered)
    assert gathered.bytes == walked(pieces, list(ranks))
    reduce_scatter(values, ranks, scattered)
    assert scattered.bytes == walked(pieces, [(rank + 1) % count for rank in ranks])  # and end at rank p
    all_reduce(values, ranks, reduced)
    summed, known = walked(pieces, list(ranks)), walked(pieces, [(rank - 1) % count for rank in ranks])
    assert reduced.bytes == Counter(summed) + Counter(known)


def test_send() -> None:
    ledger, value = Ledger(), torch.ones(3, dtype=torch.int64)
    assert send(value, 4, 7, ledger) is value
    assert (ledger.bytes, ledger.messages) == ({(4, 7): 24}, {(4, 7): 1})
    assert ledger.calls[0].kind is Collective.SEND
    assert ledger.between([[4], [7]]) == (1, 24)
    assert ledger.between([[4, 7]]) == (0, 0)
    assert (ledger.peers(4), ledger.peers(7)) == (1, 0)


def test_sums_are_rounded_once() -> None:
    """In bfloat16, 256 + 1 + 1 is 258; added in bfloat16, both ones would be lost."""
    values = [torch.tensor([each], dtype=torch.bfloat16) for each in (256.0, 1.0, 1.0)]
    assert all_reduce(values, range(3), Ledger())[0].item() == 258
