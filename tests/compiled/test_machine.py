"""What compiling needs of a machine: a compiler that works, and a cache folder that nobody else can write to."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from twinfer.compiled import cache_folder, machine
from twinfer.compiled.cache_folder import use_private_cache
from twinfer.compiled.path import CompiledPath
from twinfer.oracle.case import RandomPicker
from twinfer.oracle.models import RandomSource, draw_model_config
from twinfer.spec.errors import MachineError

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


@pytest.fixture(autouse=True)
def unchecked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is known of any folder or compiler; the home is empty."""
    monkeypatch.setattr(cache_folder, "_checked", set())
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    machine._compiler_fault.cache_clear()


def load() -> None:
    CompiledPath(RandomSource(draw_model_config(RandomPicker(3))))


def broken(folder: Path) -> str:
    """A program that succeeds and makes nothing."""
    program = folder / "broken"
    program.write_text("#!/bin/sh\nexit 0\n")
    program.chmod(0o755)
    return str(program)


@pytest.mark.parametrize("command", ["false", " ", '"', "", "'", "g++ -O2", "true", "/", "/etc/passwd"])
def test_a_compiler_that_does_not_work_is_said_in_a_line(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever CXX holds: torch takes it for the name of one program."""
    monkeypatch.setenv("CXX", command)
    with pytest.raises(MachineError, match=r"^[^\n]*C\+\+ compiler[^\n]*variable CXX, or use path=reference$"):
        load()


def test_a_compiler_that_makes_nothing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", broken(tmp_path))
    with pytest.raises(MachineError, match="does not work"):
        load()


@pytest.mark.parametrize("folder", ["/dev/null", "/dev/null/cache", "/proc/cache", "/proc/1/cache"])
def test_a_cache_that_cannot_be_written_is_said_in_a_line(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, folder)
    with pytest.raises(MachineError, match=rf"^compiled programs cannot be kept in {folder} [^\n]*set {VARIABLE} to"):
        load()


def whole_folder_of_another(folder: Path) -> None:
    os.chown(folder, 12345, 12345)


def one_file_of_another(folder: Path) -> None:
    (folder / "ab").mkdir()
    (folder / "ab" / "kernel.so").touch()
    os.chown(folder / "ab" / "kernel.so", 12345, 12345)


def writable_folder(folder: Path) -> None:
    folder.chmod(0o777)


def sticky_folder(folder: Path) -> None:
    folder.chmod(0o1777)


def folder_of_another_group(folder: Path) -> None:
    os.chown(folder, -1, 12345)
    folder.chmod(0o775)


def writable_file(folder: Path) -> None:
    folder.chmod(0o755)
    (folder / "kernel.py").touch()
    (folder / "kernel.py").chmod(0o666)


def writable_parent(folder: Path) -> None:
    folder.parent.chmod(0o777)


def link_within(folder: Path) -> None:
    (folder / "kernel.so").symlink_to("/tmp/elsewhere")


superuser = pytest.mark.skipif(os.geteuid() != 0, reason="only the superuser can give files to another user")
CHANGED_BY_OTHERS = [
    pytest.param(whole_folder_of_another, marks=superuser),
    pytest.param(one_file_of_another, marks=superuser),
    pytest.param(folder_of_another_group, marks=superuser),
    writable_folder,
    sticky_folder,
    writable_file,
    writable_parent,
    link_within,
]


@pytest.mark.parametrize("change", CHANGED_BY_OTHERS)
def test_a_folder_that_others_can_change_is_replaced(
    change: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a private one, said once; and what lies in the first is not executed."""
    folder = tmp_path / "shared" / "cache"
    folder.mkdir(parents=True, mode=0o700)
    change(folder)
    monkeypatch.setenv(VARIABLE, str(folder))
    told: list[str] = []
    use_private_cache(told.append)
    use_private_cache(told.append)
    private = tmp_path / "home" / ".cache" / "twinfer" / "inductor"
    assert os.environ[VARIABLE] == str(private)
    assert len(told) == 1
    assert str(private) in told[0]
    assert private.stat().st_mode & 0o077 == 0


def test_a_private_folder_is_kept(tmp_path: Path) -> None:
    """One that is not there is made for this user only; nothing is said of it."""
    told: list[str] = []
    use_private_cache(told.append)
    assert told == []
    assert os.environ[VARIABLE] == str(tmp_path / "cache")
    assert (tmp_path / "cache").stat().st_mode & 0o077 == 0


def test_a_path_uses_the_private_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is compiled or read from the cache, and its `report` is told."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    told: list[str] = []
    CompiledPath(RandomSource(draw_model_config(RandomPicker(3))), report=told.append)
    assert len(told) == 1
    assert "other users may write to" in told[0]


def test_triton_is_not_given_a_folder_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton").chmod(0o777)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    told: list[str] = []
    use_private_cache(told.append)
    assert "TRITON_CACHE_DIR" not in os.environ
    assert len(told) == 1
