"""Stores of prepared layers: made from any model, and opened like one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twinfer.checkpoint import Checkpoint
from twinfer.checkpoint.config_json import from_json, to_json
from twinfer.checkpoint.fields import Fields
from twinfer.checkpoint.model import described_checkpoint
from twinfer.checkpoint.native.convert import about_model
from twinfer.checkpoint.source import limited
from twinfer.checkpoint.tokenizer import read_tokenizer
from twinfer.offload.building import build
from twinfer.offload.plan import plan
from twinfer.offload.rank_measuring import Job
from twinfer.offload.shares import (
    SHARES,
    Shares,
    build_shares,
    check_degrees,
    is_shares,
    open_shares,
    whole_as_shares,
)
from twinfer.offload.store import DESCRIPTION, Store, open_store
from twinfer.spec.config import Storage
from twinfer.spec.errors import CheckpointError, RequestError
from twinfer.spec.parallel import ParallelConfig

from .paths import Compute
from .store_source import StoreSource

_TOKENIZER = "tokenizer.json"
_DEVICES = ("cpu", "cuda")
"""The types of device that stores are for."""

_REMEDY = "build the store again"

ONE = ParallelConfig()
"""The degrees of a job of one rank."""


def shares_in(source: StoreSource) -> Shares:
    """Return what ranks read of a store; one of a whole model is read by stages and data groups."""
    store = source.store
    return store if isinstance(store, Shares) else whole_as_shares(store)


def check_ranks_of_store(source: StoreSource, parallel: ParallelConfig) -> None:
    """Raise `RequestError`, which has the command that makes another store, for one that was built for other ranks."""
    check_degrees(shares_in(source), parallel)


def build_store(
    checkpoint: Checkpoint,
    folder: Path,
    storage: Storage,
    report: Callable[[str], None],
    parallel: ParallelConfig = ONE,
    device: str = "cpu",
) -> int:
    """Write a model as a store for cpu or cuda; returns its weights' bytes. Raises as `offload.building.build` does.

    With degrees it is one for many ranks (`offload.shares`). Weights that are kept in a storage already are built in
    that one.
    """
    if device not in _DEVICES:
        raise RequestError(f"device is {device!r}; a store is built for {' or '.join(_DEVICES)}")
    if parallel.ranks > 1 and device != "cpu":
        raise RequestError(f"device is {device!r}; a store for many ranks is built for cpu only")
    if checkpoint.storage not in (None, storage):
        raise RequestError(
            f"{checkpoint.name} is kept in {checkpoint.storage} already; build from the model that it came from, or "
            f"use storage={checkpoint.storage}"
        )
    tokenizer = checkpoint.tokenizer
    model = {**about_model(checkpoint), "config": to_json(checkpoint.config), "tokenizer": tokenizer is not None}
    files = {} if tokenizer is None else {_TOKENIZER: tokenizer.inner.to_str()}
    given: dict[str, Any] = {"model": model, "files": files, "identity": [checkpoint.name, files], "report": report}
    if parallel.ranks > 1:
        return build_shares(checkpoint.source, folder, storage, parallel, **given)
    return build(checkpoint.source, folder, storage, **given, device=device)


def open_store_model(folder: Path, context: int | None = None) -> Checkpoint:
    """Open a store as a model, its `source` a `StoreSource`; raises `TwinferError` where it is damaged or foreign."""
    store: Store | Shares = open_shares(folder) if is_shares(folder) else open_store(folder)
    description = folder / (SHARES if is_shares(folder) else DESCRIPTION)
    about = Fields(json.loads(json.dumps(store.model)), f"{description}: model.")
    section = about.section("config")
    config = from_json(section.values if section else None, f"{description}: config")
    config = limited(config, context)
    tokenizer = None
    if about.flag("tokenizer"):
        path = folder / _TOKENIZER
        if not path.is_file():
            raise CheckpointError(f"{folder} lacks {_TOKENIZER}; {_REMEDY}")
        tokenizer = read_tokenizer(path, _REMEDY)
    return described_checkpoint(about, StoreSource(store, config), tokenizer, store.storage, str(folder))


def check_budget_of_ranks(
    source: StoreSource, parallel: ParallelConfig, budgets: tuple[int, int], batch: int, reserve: int, compute: Compute
) -> None:
    """Do the same for each rank of a job; `budgets` are the memory's and DRAM's."""
    Job(shares_in(source), source.config, parallel, *budgets, compute.dtype, False).plans(
        batch, min(reserve, source.config.context)
    )


def check_budget(source: StoreSource, budget: int, batch: int, reserve: int, compute: Compute) -> None:
    """Raise `RequestError`, which names the smallest budget that works, before anything is allocated or compiled.

    Also for a store that was built for many ranks, and cannot be run by one.
    """
    plan(
        shares_in(source).of_rank(ONE, 0),
        source.config,
        budget=budget,
        batch=batch,
        reserve=min(reserve, source.config.context),
        compute=compute.dtype,
        expands=False,
    )
