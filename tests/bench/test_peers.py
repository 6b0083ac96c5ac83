"""Peers that are not there, and peers that fail, are named with a reason; nobody else is disturbed."""

import sys
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from twinfer.bench.peers import table
from twinfer.bench.peers.comparison import agreement, equal_for
from twinfer.bench.peers.exported import Exports
from twinfer.bench.peers.table import PEERS, Capacity, Peer, ready_peers


class Mute:
    def answer(self, prompt_T: Tensor, new: int, batch: int = 1) -> Iterator[Sequence[int]]:
        yield [0]


def peer(name: str, package: str) -> Peer:
    def make(exports: Exports, room: Capacity) -> Mute:
        raise AssertionError("it is made by whoever asks")

    return Peer(name=name, package=package, install=f"pip install {package}", precision="float32", make=make)


def test_what_is_not_installed_or_fails_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not installed, or not wanted, is not even tried."""
    some = (peer("good", "math"), peer("gone", "no_such_package_here"), peer("bad", "math"), peer("unwanted", "math"))
    monkeypatch.setattr(table, "PEERS", {each.name: each for each in some})
    made = {"good": Mute(), "unwanted": Mute()}
    tried: list[str] = []
    said: list[str] = []

    def make(name: str) -> Mute:
        tried.append(name)
        if name not in made:
            raise OSError("no\nroom")
        return made[name]

    candidates, absent = ready_peers(["good", "gone", "bad"], make, said.append)
    assert tried == ["good", "bad"]
    assert candidates == {"good": made["good"]}
    assert absent == {"gone": "not installed (pip install no_such_package_here)", "bad": "OSError: no room"}
    assert said == ["preparing good", "preparing bad"]


@pytest.mark.parametrize("package", ["transformers", "llama_cpp", "ctranslate2", "deepspeed"])
def test_every_package_may_be_missing(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    names = [name for name, each in PEERS.items() if each.package == package]
    assert names
    candidates, absent = ready_peers(names, lambda name: Mute(), lambda line: None)
    assert candidates == {}
    assert list(absent) == names
    assert all(why.startswith("not installed (pip install ") for why in absent.values())


def test_tokens_agree_until_the_first_that_does_not() -> None:
    assert equal_for([1, 2, 3], [1, 2, 3]) == 3
    assert equal_for([1, 2, 3], [1, 9, 3]) == 1
    assert equal_for([1, 2, 3], [9, 2, 3]) == 0


class Stubborn:
    """Picks the number of tokens that it has read, but 9 after exactly five."""

    def answer(self, prompt_T: Tensor, new: int, batch: int = 1) -> Iterator[Sequence[int]]:
        for read in range(len(prompt_T), len(prompt_T) + new):
            yield [9 if read == 5 else read] * batch


def test_one_wrong_pick_ends_the_agreement_alone_but_not_where_it_is_led() -> None:
    found = agreement(Stubborn(), torch.zeros(3, dtype=torch.int64), [3, 4, 5, 6, 7])
    assert (found.alone, found.led, found.of) == (2, 4, 5)
