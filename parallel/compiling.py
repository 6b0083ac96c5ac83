"""Compiling on many ranks: one rank compiles what all need, then the others find it in the cache.

Rank 0 goes first. Then come the first ranks of the other stages, whose ends of the model differ, and of the other
hosts, which have a cache of their own; then everyone else. A rank that waits issues no collective.
"""

from ..compiled.programs import Program
from .groups import PATIENCE
from .member import Member
from .path import RankPath
from .watch import Doing


def compile_in_turn(path: RankPath, member: Member, *, batches: bool) -> None:
    """Compile the programs, each rank in its turn, and wait until all have.

    Without `batches`, those of several sequences are left out.
    """
    member.progress.enter(Doing.COMPILING)
    member.store.set_timeout(PATIENCE)
    turn, ranks = turn_of(member), member.groups.parallel.ranks
    member.store.set(f"turn/{member.rank}", str(turn))
    turns = [int(member.store.get(f"turn/{rank}")) for rank in range(ranks)]
    several = () if batches else (Program.DECODE_ROWS, Program.DECODE_MANY)
    for name in (each for each in path.uncompiled if each not in several):
        before = [f"compiled/{name}/{rank}" for rank in range(ranks) if turns[rank] < turn]
        if before:
            member.store.wait(before, PATIENCE)
        path.compile(name)
        member.store.set(f"compiled/{name}/{member.rank}", "")
    member.store.set(f"ready/{member.rank}", "")
    member.store.wait([f"ready/{rank}" for rank in range(ranks)], PATIENCE)


def turn_of(member: Member) -> int:
    """Return when this rank compiles: 0 is first."""
    place = member.groups.place
    if member.rank == 0:
        return 0
    return 1 if place.tensor == place.data == 0 or member.local_rank == 0 else 2
