"""Prompts in batches whose results are kept: whenever a run is killed, nothing is lost and nothing is there twice."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from twinfer.batches import run_batches
from twinfer.generation import Output, Stop
from twinfer.spec.errors import RequestError

PROMPTS = [[1, 2], [3], [4, 5, 6], [7], [8, 9]]


class Killed(BaseException):
    """What a kill is within a process."""


class Model:
    """Yields a prompt backwards; counts what it ran and may be killed before a batch."""

    def __init__(self, killed_before: int = 100) -> None:
        self.ran: list[int] = []
        self._left = killed_before

    def __call__(self, numbers: Sequence[int]) -> list[Output]:
        if self._left == 0:
            raise Killed
        self._left -= 1
        self.ran += numbers
        return [
            Output(prompt_ids=tuple(PROMPTS[n]), ids=tuple(PROMPTS[n][::-1]), text=None, stop=Stop.END) for n in numbers
        ]


def run(file: Path, model: Model, batch: int = 2, request: object = 0, prompts: list[list[int]] = PROMPTS) -> int:
    return run_batches(file, prompts, request, batch, model, lambda line: None)


def results(file: Path) -> list[list[int]]:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [each["ids"] for each in sorted(lines, key=lambda each: each["prompt"])]


@pytest.mark.parametrize("batches", [0, 1, 2])
def test_a_killed_run_is_gone_on_with(batches: int, tmp_path: Path) -> None:
    """Cut anywhere within its last line, too: every prompt is there once, and none that was whole is run again."""
    file = tmp_path / "out.jsonl"
    with pytest.raises(Killed):
        run(file, Model(killed_before=batches))
    whole = file.read_bytes()
    begin = whole[:-1].rfind(b"\n") + 1
    for cut in {len(whole), begin, begin + 1, (begin + len(whole)) // 2, max(begin, len(whole) - 1)}:
        file.write_bytes(whole[:cut])
        kept = whole[:cut].count(b"\n")
        model = Model()
        assert run(file, model, batch=3) == len(PROMPTS) - kept
        assert model.ran == list(range(kept, len(PROMPTS)))
        assert results(file) == [prompt[::-1] for prompt in PROMPTS]
    again = Model()
    assert run(file, again) == 0
    assert again.ran == []


def test_results_of_other_prompts_or_options_are_refused(tmp_path: Path) -> None:
    """Before anything is run or written."""
    file = tmp_path / "out.jsonl"
    run(file, Model())
    before = file.read_bytes()
    for given in ({"request": 1}, {"prompts": [[1, 2], [3], [4, 5, 7], [7], [8, 9]]}, {"prompts": PROMPTS[:3]}):
        model = Model()
        with pytest.raises(RequestError, match=r"line \d is no result of these prompts"):
            run(file, model, **given)  # type: ignore[arg-type]
        assert model.ran == []
        assert file.read_bytes() == before
