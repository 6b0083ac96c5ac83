"""A rank of a job of two: `python joining.py WHAT`, where rank 1 differs in that, or the model cannot be cut."""

import os
import sys
from typing import Any

import torch

from twinfer.compiled.path import Mode
from twinfer.oracle.case import RandomPicker
from twinfer.oracle.models import RandomSource, draw_model_config
from twinfer.parallel.member import joined
from twinfer.parallel.path import RankPath
from twinfer.spec.parallel import ParallelConfig


class Unread(RandomSource):
    """Weights that nobody may ask for."""

    def _tensor(self, *given: Any) -> Any:
        raise AssertionError("weights are read")


what, rank = sys.argv[1], int(os.environ["RANK"])
if what == "torch" and rank == 1:
    torch.__version__ = "9.9"  # type: ignore[assignment]
with joined(ParallelConfig(tensor=2), {"a model with the digest": str(rank) if what == "digest" else "0"}) as member:
    config = draw_model_config(RandomPicker(40))  # of 9 heads
    RankPath(Unread(config), member.wire, device=torch.device("cpu"), mode=Mode.EAGER)
