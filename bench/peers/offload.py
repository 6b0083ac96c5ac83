"""accelerate's disk offload beside ours, cold, one sequence: `python -m twinfer.bench.peers.offload STORES MODEL`.

STORES is a folder with MODEL-float32 and MODEL-int8, which `offload_settings` builds where they are missing. The peer
is the module of transformers with the same weights, in float32 (its int8 is not for disks and CPUs).
Before each of its steps the page cache forgets its files; ours are read past the cache anyway. Steps are taken in turn.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ...offload.path import OffloadPath
from ...spec.config import Storage
from ..offload_settings import MB, Setting, source_of, store_of
from .exported import transformers_llama

PROMPT = (504, 3575, 282, 4649, 314)
STEPS = 5


def forget(folder: Path) -> None:
    """Have the page cache forget all files of a folder."""
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def main(stores: Path, model: str) -> dict[str, Any]:
    """Return the seconds of a step of each, medians, and ratios."""
    source = source_of(model)
    accelerate: Any = import_module("accelerate")
    paths = {}
    for storage in (Storage.FLOAT32, Storage.INT8):
        store, _ = store_of(stores, Setting(model=model, storage=storage, budget=128 * MB, batch=1))
        paths[storage.value] = OffloadPath(store, source.config, budget=128 * MB)
        paths[storage.value].compile(batches=False)
    with tempfile.TemporaryDirectory(dir=stores) as folder, torch.no_grad():
        module = transformers_llama(source)
        accelerate.disk_offload(module, folder, execution_device=torch.device("cpu"))
        ids: dict[str, list[int]] = {"accelerate": [], **{name: [] for name in paths}}
        seconds: dict[str, list[float]] = {name: [] for name in ids}
        states = {name: path.open(1, len(PROMPT) + STEPS + 1) for name, path in paths.items()}
        cache: Any = None

        def peer(given: list[int]) -> int:
            nonlocal cache
            out = module(torch.tensor([given]), past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            return int(out.logits[0, -1].argmax())

        def own(name: str) -> Callable[[list[int]], int]:
            return lambda given: int(paths[name].extend(states[name], [torch.tensor(given)])[0].argmax())

        for _ in range(STEPS + 1):
            for name, step in {"accelerate": peer, **{each: own(each) for each in paths}}.items():
                forget(Path(folder))
                begin_s = time.perf_counter()
                ids[name].append(step(ids[name][-1:] or list(PROMPT)))
                seconds[name].append(time.perf_counter() - begin_s)
    steps = {name: each[1:] for name, each in seconds.items()}  # without the prompt's
    for path in paths.values():
        path.close()
    return {
        "model": model,
        "same_tokens_float32": ids["accelerate"] == ids["float32"],
        "step_s": {name: median(each) for name, each in steps.items()},
        "of_accelerate": {
            name: median(other / mine for other, mine in zip(steps["accelerate"], steps[name], strict=True))
            for name in paths
        },
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2])))
