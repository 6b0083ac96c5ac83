"""A rank of a job of two: `python joining.py WHAT [MODEL ...]`, where rank 1 differs in that, or heads cannot be cut.

Each rank opens the model that is named for it.
"""

import os
import sys
from typing import Any

import torch

from twinfer.checkpoint import open_model
from twinfer.compiled.path import Mode
from twinfer.oracle.case import RandomPicker
from twinfer.oracle.models import RandomSource, draw_model_config
from twinfer.parallel.member import joined
from twinfer.parallel.path import RankPath
from twinfer.ranks import digest
from twinfer.spec.parallel import ParallelConfig


class Unread(RandomSource):
    """Weights that nobody may ask for."""

    def _tensor(self, *given: Any) -> Any:
        raise AssertionError("weights are read")


what, models = sys.argv[1], sys.argv[2:]
rank = int(os.environ["RANK"])
if what == "torch" and rank == 1:
    torch.__version__ = "9.9"  # type: ignore[assignment]
facts = {"twinfer": "9.9" if what == "twinfer" and rank == 1 else "1.0"}
if models:
    facts["a model with the digest"] = digest(open_model(models[rank]))
with joined(ParallelConfig(tensor=2), facts) as member:
    config = draw_model_config(RandomPicker(40))  # of 9 heads
    RankPath(Unread(config), member.wire, device=torch.device("cpu"), mode=Mode.EAGER)
