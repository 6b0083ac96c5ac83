"""How good the judgment of whole models is: right paths must never alarm, and every fault must.

    python -m twinfer.oracle.model_calibration [PAIRS [MODELS]]

judges PAIRS drawn models and right paths in every compute dtype by turns, then each fault of `model_mutants` on drawn
models until it is caught, on MODELS at most (default 1000 and 20, about 30 minutes). Paths run uncompiled.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from ..compiled.path import CompiledPath
from ..reference.path import ReferencePath
from ..spec.config import Storage
from ..spec.decoder import Decoder
from ..spec.weights import WeightSource
from .baseline import Baseline
from .case import RandomPicker
from .model_mutants import model_mutants
from .models import RandomSource, draw_model_config
from .ops.layer import LAYER
from .paths import PathComparison, compare_paths
from .schedule import Schedule, draw_schedule, generation

COMPUTE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def long_schedule(pick: RandomPicker, vocabulary: int) -> Schedule:
    """Draw four texts of 20 to 30 tokens with three decode steps: enough rows to see how errors lean."""
    texts = tuple(tuple(pick.integer(0, vocabulary - 1) for _ in range(pick.integer(20, 30))) for _ in range(4))
    return generation(texts, 4)


def right_pairs(pairs: int) -> Iterator[tuple[str, PathComparison]]:
    """Judge right paths: the compiled one, uncompiled, and the reference with sums in another order."""
    otherwise: Any = LAYER.variants["summed_otherwise"]
    for seed in range(pairs // 2):
        pick = RandomPicker(seed)
        config = draw_model_config(pick)
        source = RandomSource(config, seed)
        schedule = draw_schedule(pick, config) if seed % 4 else long_schedule(pick, config.vocabulary)
        given: dict[str, Any] = {"storage": pick.choice(list(Storage)), "compute": COMPUTE[seed // 4 % len(COMPUTE)]}
        baseline = Baseline.of(source, **given)
        paths: dict[str, Decoder] = {
            "compiled": CompiledPath(source, mode="eager", **given),
            "summed otherwise": ReferencePath(source, components=otherwise.keywords["components"], **given),
        }
        if given["compute"] is torch.float64:
            del paths["summed otherwise"]  # its parts round to float32
        for name, path in paths.items():
            yield f"seed {seed}, {name}, {given}", compare_paths(baseline, path, schedule)


def caught_after(name: str, compute: torch.dtype, models: int) -> int | None:
    """Return the number of drawn models until a fault is caught, of those that can have it; None if it never is."""
    tried = 0
    for seed in range(100_000, 100_000 + 10 * models):
        pick = RandomPicker(seed)
        source: WeightSource = RandomSource(draw_model_config(pick), seed)
        mutant = dict(model_mutants(source, seed)).get(name)
        if mutant is None:
            continue
        tried += 1
        schedule = long_schedule(pick, source.config.vocabulary)
        path = CompiledPath(mutant, compute=compute, mode="eager")
        if not compare_paths(Baseline.of(source, compute=compute), path, schedule).holds:
            return tried
        if tried == models:
            return None
    return None


def names() -> list[str]:
    """The name of every fault."""
    found: dict[str, None] = {}
    for seed in range(50):
        source = RandomSource(draw_model_config(RandomPicker(seed)), seed)
        found |= dict.fromkeys(name for name, _ in model_mutants(source, seed))
    return list(found)


def main(pairs: int = 1000, models: int = 20) -> int:
    """Print both tables; 1 if anything is alarmed at or missed."""
    alarms: list[str] = []
    total, lean = PathComparison(), 0.0
    for judged, (where, comparison) in enumerate(right_pairs(pairs), 1):
        if not comparison.holds:
            alarms.append(f"{where}: {comparison.failures}")
        if comparison.leaning is not None:
            lean = max(lean, float(comparison.leaning.ratio_P.max()))
        total = replace(total + comparison, leaning=None)
        if judged % 100 == 0:
            largest = f"error / bound {total.largest_ratio:.2f}, lean / allowed {lean:.2f}"
            print(f"{judged} pairs: {len(alarms)} alarms, {total.rows} rows, {largest}", flush=True)
    print("\n".join(alarms))
    missed = False
    print(f"{'fault':36}" + "".join(f"{str(each).removeprefix('torch.'):>10}" for each in COMPUTE))
    for name in names():
        counts = [caught_after(name, compute, models) for compute in COMPUTE]
        missed = missed or None in counts
        print(f"{name:36}" + "".join(f"{each or 'missed':>10}" for each in counts), flush=True)
    return 1 if alarms or missed else 0


if __name__ == "__main__":
    sys.exit(main(*(int(argument) for argument in sys.argv[1:3])))
