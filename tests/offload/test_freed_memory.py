"""A streamed run gives memory back to the system when it is freed, whatever lies beside it."""

import subprocess
import sys
from pathlib import Path

import pytest

from twinfer.oracle.models import RandomSource

from .small import built, config

ROOT = str(Path(__file__).parents[2])

GAPS = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from twinfer.bench.memory_limit import resident_bytes
from twinfer.offload.store import open_store
from pathlib import Path
from tests.offload.small import config, offloaded
path = offloaded(open_store(Path(sys.argv[2])), config())
torch.ones(24 << 18)
before = resident_bytes()
pieces = [(torch.ones(2 << 18), torch.ones(1 << 14)) for _ in range(40)]
between = [small for _, small in pieces]
del pieces
print(resident_bytes() - before, sum(each.nbytes for each in between))
path.close()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc on Linux keeps what it freed")
def test_large_pieces_leave_no_gaps_between_small_ones(tmp_path: Path) -> None:
    """Of 40 pieces of 2 MiB, freed while small ones between them stay, not the memory of three is kept."""
    store = built(RandomSource(config(), 1), tmp_path / "s")
    command = [sys.executable, "-c", GAPS, ROOT, str(store.folder)]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    taken, small = map(int, ran.stdout.split())
    assert taken - small < 6 << 20
