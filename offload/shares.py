"""A store for many ranks: a folder with a store for each share of the model that a rank can hold.

    shares.json     the degrees that it was built for, and what else there is to know of the model
    rank-0, ...     stores as of a whole model (`store`), each with the records of one rank: its heads, its part of the
                    MLPs and experts, its piece of the vocabulary
    tokenizer.json  where the model has a tokenizer

Ranks of different stages of a pipeline read different layers of the same share, and ranks that hold the same read the
same one, so a share is made for each place in the tensor, expert and slice groups: with --tensor 2 two, whatever the
pipeline and the number of data groups. Layers are cut as those of a whole model are (`cutting`), by the share's own
sizes. A store of a whole model serves jobs of stages and data groups as it is.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..spec.config import Storage
from ..spec.counts import total
from ..spec.errors import CheckpointError, RequestError
from ..spec.parallel import ParallelConfig, Place, check_parallel, stage_layers
from ..spec.weights import WeightSource
from .building import build, check_place, check_room, sync_folder, without_remains
from .locked import locked
from .rank_source import RankSource, WholeRows
from .store import WEIGHTS, Store, differing_layout, is_store, layout, open_store

SHARES = "shares.json"
_BEGUN = "begun"
_DEGREES = ("data", "tensor", "expert", "expert_slices")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """A store for many ranks that is open: the shares' records are known, none is read yet."""

    folder: Path
    parallel: ParallelConfig
    """The degrees that it was built for, as a job of one stage."""
    storage: Storage
    model: dict[str, Any]
    """What the builder said of the model; nothing here reads more of it than its name."""
    stores: dict[int, Store]
    """By the first rank that holds the share."""

    @property
    def nbytes(self) -> int:
        """Bytes of all records."""
        return sum(store.nbytes for store in self.stores.values())

    def of_rank(self, parallel: ParallelConfig, rank: int) -> Store:
        """Return what a rank of a job reads: the layers of its stage, and the head on the last one.

        Raises `RequestError` as `check_degrees`.
        """
        check_degrees(self, parallel)
        place = parallel.place(rank)
        store = self.stores[_holders(self.parallel)[_key(place)]]
        layers = stage_layers(len(store.layers), parallel.pipeline)[place.stage]
        return replace(
            store,
            layers=store.layers[layers.start : layers.stop],
            mlp=store.mlp[layers.start : layers.stop],
            experts=store.experts[layers.start : layers.stop],
            head=store.head if place.stage == parallel.pipeline - 1 else (),
        )


def check_degrees(shares: Shares, parallel: ParallelConfig) -> None:
    """Raise `RequestError`, which has the command that makes another store, unless a job of these degrees can run it.

    Any number of stages can, and of data groups where these do not share experts.
    """
    built, holders = shares.parallel, _holders(shares.parallel)
    same = all(getattr(built, name) == getattr(parallel, name) for name in ("tensor", "expert", "expert_slices"))
    if same and all(_key(parallel.place(rank)) in holders for rank in range(parallel.ranks)):
        return
    was, asked = (options_of(each) or "whole layers on each rank" for each in (built, parallel))
    raise RequestError(
        f"{shares.folder} was built for {was}, and {asked} is asked for; run it as it was built, or make another "
        f"store: {build_command(shares.model, shares.storage, parallel)}"
    )


def build_command(model: dict[str, Any], storage: Storage, parallel: ParallelConfig) -> str:
    """Return the command that makes a store for jobs of these degrees."""
    name = model.get("name", "MODEL")
    return f"twinfer offload build {name} OTHER-STORE --storage {storage} {options_of(parallel)}".rstrip()


def options_of(parallel: ParallelConfig) -> str:
    """Return degrees as options of the command line.

    >>> options_of(ParallelConfig(tensor=2, expert=2)), options_of(ParallelConfig())
    ('--tensor 2 --expert 2', '')
    """
    named = {"pipeline": parallel.pipeline, **_degrees(parallel)}
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in named.items() if value > 1)


def whole_as_shares(store: Store) -> Shares:
    """Return a store of a whole model as that of jobs whose ranks hold whole layers."""
    one = ParallelConfig()
    return Shares(folder=store.folder, parallel=one, storage=store.storage, model=store.model, stores={0: store})


def build_shares(
    source: WeightSource,
    folder: Path,
    storage: Storage,
    parallel: ParallelConfig,
    *,
    model: dict[str, Any],
    files: Mapping[str, str],
    identity: object,
    report: Callable[[str], None],
) -> int:
    """Write a model's store for many ranks; returns the bytes of its weights.

    The arguments are those of `building.build`, which writes each share, in a hidden folder until all are there; a run
    that was killed is gone on with in the same way. Raises `RequestError` as that does, and for degrees that do not fit
    the model.
    """
    check_parallel(source.config, parallel, storage)
    parallel = replace(parallel, pipeline=1)
    check_place(folder)
    partial = folder.absolute().parent / f".{folder.name}.ranks.partial"
    described = {"layout": layout(), "storage": storage.value, "model": model, "degrees": _degrees(parallel)}
    try:
        partial.mkdir(exist_ok=True)
        with (
            locked(partial, f"{folder} is being built by another process; wait for it"),
            without_remains(partial, _has_shares),
        ):
            _begin(partial, json.dumps({**described, "identity": identity}, sort_keys=True))
            whole_rows: WholeRows = {}
            shares = {
                rank: RankSource(source, parallel, rank, storage, whole_rows) for rank in _holders(parallel).values()
            }
            needed = sum(total(share.config).bytes(storage) for share in shares.values())
            there = sum(file.stat().st_size for file in partial.glob(f"*/{WEIGHTS}"))  # also of hidden folders
            check_room(partial, needed - there, storage)
            for rank, share in shares.items():
                place = partial / _name(rank)
                if not is_store(place):
                    of_rank = {**model, "rank": rank, "degrees": _degrees(parallel)}
                    build(
                        share,
                        place,
                        storage,
                        model=of_rank,
                        files={},
                        identity=identity,
                        report=lambda line, rank=rank: report(f"rank {rank}: {line}"),  # type: ignore[misc]
                    )
            for name, content in {**files, SHARES: json.dumps(described, indent=1, allow_nan=False)}.items():
                with (partial / name).open("w", encoding="utf-8") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            (partial / _BEGUN).unlink()
            os.rename(partial, folder)
            sync_folder(folder)
            sync_folder(folder.absolute().parent)
    except OSError as error:
        raise RequestError(f"{folder} cannot be written: {error.strerror or error}") from None
    return open_shares(folder).nbytes


def is_shares(folder: Path) -> bool:
    """Return whether a path is the folder of a store for many ranks."""
    return (folder / SHARES).is_file()


def open_shares(folder: Path) -> Shares:
    """Open a store for many ranks, reading only what it says of itself.

    Raises `CheckpointError` as `store.open_store` does, and where a share is that of another rank.
    """
    path = folder / SHARES
    try:
        parts = json.loads(path.read_bytes())
        parallel = ParallelConfig(**{name: parts["degrees"][name] for name in _DEGREES})
        storage, model, built_for = Storage(parts["storage"]), {**parts["model"]}, {**parts["layout"]}
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}; is {folder} a store?") from None
    except (ValueError, KeyError, TypeError, RecursionError, RequestError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); build the store again") from None
    if wrong := differing_layout(built_for):
        raise CheckpointError(f"{folder} was {wrong}: run {build_command(model, storage, parallel)}")
    stores = {rank: open_store(folder / _name(rank)) for rank in _holders(parallel).values()}
    for rank, store in stores.items():
        if store.model != {**model, "rank": rank, "degrees": _degrees(parallel)} or store.storage is not storage:
            found = f"rank {store.model.get('rank')} of {store.model.get('name')}, {store.model.get('degrees')}"
            raise CheckpointError(
                f"{store.folder} holds {found} in {store.storage}; {path} says rank {rank} of {model.get('name')}, "
                f"{_degrees(parallel)} in {storage}: build the store again"
            )
    return Shares(folder=folder, parallel=parallel, storage=storage, model=model, stores=stores)


def _key(place: Place) -> tuple[int, int, int]:
    """Return what decides which share a rank holds of its stage's layers."""
    return place.tensor, place.expert, place.expert_slice


def _holders(parallel: ParallelConfig) -> dict[tuple[int, int, int], int]:
    """Return the first rank that holds each share."""
    holders: dict[tuple[int, int, int], int] = {}
    for rank in range(parallel.stage_ranks):
        holders.setdefault(_key(parallel.place(rank)), rank)
    return holders


def _degrees(parallel: ParallelConfig) -> dict[str, int]:
    return {name: getattr(parallel, name) for name in _DEGREES}


def _name(rank: int) -> str:
    return f"rank-{rank}"


def _has_shares(partial: Path) -> bool:
    """Return whether a share is there, or a part of one."""
    return any(each.is_dir() for each in partial.glob("*"))


def _begin(partial: Path, begun: str) -> None:
    """Empty the folder, unless a run of the same build has begun there."""
    path = partial / _BEGUN
    if path.is_file() and path.read_text(encoding="utf-8") == begun:
        return
    path.unlink(missing_ok=True)  # first: a folder that is half emptied is nobody's
    for each in partial.iterdir():
        shutil.rmtree(each) if each.is_dir() else each.unlink()
    path.write_text(begun, encoding="utf-8")
