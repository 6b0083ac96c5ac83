"""What both paths over a store do when they are opened."""

from typing import cast

import torch

from ..spec.config import ModelConfig
from ..spec.errors import CheckpointError, RequestError
from .direct import DirectFile, aligned_buffer
from .form import Resident, faulty, in_buffer
from .store import Store
from .streamer import damaged

COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""A store's norms and biases are float32, so it does not serve float64."""


def check_opening(store: Store, config: ModelConfig, compute: torch.dtype, dram_budget: int) -> None:
    """Raise `RequestError` for a compute dtype or a budget that cannot be, `CheckpointError` for another model's store.

    The store is that of all layers.
    """
    if compute not in COMPUTE_DTYPES:
        raise RequestError(f"compute is {compute}; of a store it must be one of {', '.join(map(str, COMPUTE_DTYPES))}")
    if len(store.layers) != len(config.layers):
        raise CheckpointError(f"{store.folder} holds {len(store.layers)} layers; its config has {len(config.layers)}")
    if dram_budget < 0:
        raise RequestError(f"the DRAM budget is {dram_budget} bytes; it must be 0 or more")


def read_resident(file: DirectFile, store: Store) -> Resident:
    """Read what stays in memory; raises `CheckpointError` where it is damaged."""
    record = store.resident
    buffer = aligned_buffer(record.nbytes)
    file.read_into(buffer, record.offset, record.name)
    if fault := faulty(record, buffer):
        raise damaged(file, record, fault)
    return cast(Resident, in_buffer(record, buffer))
