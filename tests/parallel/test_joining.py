"""Ranks that are not about the same thing end before weights are read, and say what differs."""

import os
import sys
from pathlib import Path

import pytest
import torch

from twinfer.checkpoint import open_model
from twinfer.parallel.launch import Ended, Job
from twinfer.ranks import digest

from .tiny_files import write_folder

JOINING = Path(__file__).with_name("joining.py")


def ended(ranks: int, *what: str) -> Ended | None:
    with Job([sys.executable, str(JOINING), *what], ranks) as job:
        return job.wait()


@pytest.mark.skipif(os.environ.get("HYPOTHESIS_PROFILE") != "exhaustive", reason="takes half a minute")
@pytest.mark.parametrize(
    ("ranks", "what", "says"),
    [
        (3, "none", "the job has 3 ranks, but data * pipeline * tensor is 2; start 2"),
        (2, "torch", "rank 1 has torch 9.9, rank 0 has"),
        (2, "twinfer", "rank 1 has twinfer 9.9, rank 0 has 1.0; all ranks of a job must have the same"),
        (2, "heads", "tensor is 2, but layer 0 has 9 query heads, which do not divide by it"),
    ],
)
def test_a_job_of_unlike_ranks_is_refused(ranks: int, what: str, says: str) -> None:
    how = ended(ranks, what)
    assert how is not None
    assert how.status == 2
    assert says in how.message, how.message


def test_ranks_with_unlike_files_are_refused(tmp_path: Path) -> None:
    """Tensors of one rank have another dtype, as wide as that of the other's."""
    dtypes = torch.float16, torch.bfloat16
    models = [write_folder(tmp_path / str(rank), dtype=dtype) for rank, dtype in enumerate(dtypes)]
    how = ended(2, "files", *models)
    assert how is not None
    assert how.status == 2
    first, other = (digest(open_model(each)) for each in models)
    assert f"rank 1 has a model with the digest {other}, rank 0 has {first}" in how.message, how.message
