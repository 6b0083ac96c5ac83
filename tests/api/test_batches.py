"""Prompts in batches whose results are kept: whenever a run is killed, nothing is lost and nothing is there twice."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from twinfer.batches import run_batches
from twinfer.generation import Output, Stop
from twinfer.spec.errors import RequestError

PROMPTS = [[1, 2], [3], [4, 5, 6], [7], [8, 9]]


class Killed(BaseException):
    """What a kill is within a process."""


class Model:
    """Yields prompts backwards, the last of a batch first; counts what it ran and may be killed before a prompt."""

    def __init__(self, killed_before: int = 100) -> None:
        self.ran: list[int] = []
        self._left = killed_before

    def __call__(self, numbers: Sequence[int]) -> Iterator[tuple[int, Output]]:
        for place, number in reversed(list(enumerate(numbers))):
            if self._left == 0:
                raise Killed
            self._left -= 1
            self.ran.append(number)
            prompt = tuple(PROMPTS[number])
            yield place, Output(prompt_ids=prompt, ids=prompt[::-1], text=None, stop=Stop.END)


def run(file: Path, model: Model, batch: int = 2, request: object = 0, prompts: list[list[int]] = PROMPTS) -> int:
    return run_batches(file, prompts, request, batch, model, lambda line: None)


def results(file: Path) -> list[list[int]]:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [each["ids"] for each in sorted(lines, key=lambda each: each["prompt"])]


@pytest.mark.parametrize("finished", range(5))
def test_a_killed_run_is_gone_on_with(finished: int, tmp_path: Path) -> None:
    """Within a batch too, and cut anywhere in its last line: each prompt is there once, and whole ones do not rerun.

    Where it ends before a result there is no file; one that was there before stays.
    """
    file = tmp_path / "out.jsonl"
    with pytest.raises(Killed):
        run(file, Model(killed_before=finished))
    assert file.exists() == (finished > 0)
    file.touch()
    with pytest.raises(Killed):
        run(file, Model(killed_before=0))
    whole = file.read_bytes()
    assert whole.count(b"\n") == finished
    begin = whole[:-1].rfind(b"\n") + 1
    for cut in {len(whole), begin, begin + 1, (begin + len(whole)) // 2, max(begin, len(whole) - 1)}:
        file.write_bytes(whole[:cut])
        kept = {json.loads(line)["prompt"] for line in whole[:cut].splitlines(keepends=True) if line.endswith(b"\n")}
        model = Model()
        assert run(file, model, batch=3) == len(PROMPTS) - len(kept)
        assert sorted(model.ran) == sorted(set(range(len(PROMPTS))) - kept)
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
