"""A model of mixtures that generates, compiled beside the reference."""

import shlex

from ..checkpoint import Checkpoint
from ..compiled.path import CompiledPath
from ..reference.path import ReferencePath
from ..spec.config import Storage
from .candidates import PathCandidate
from .moe import Timed
from .ops import COMPILED, Run
from .rows import Kind, Row
from .side_by_side import Key, Workload, measure_in_turn, prompt, sample
from .targets import Target, own
from .timing import paired_ratios, quantile

REFERENCE = "reference"
WORKLOAD = Workload(prompt=32, steps=24)


def generation(checkpoint: Checkpoint, model: str, run: Run) -> Timed:
    """Time greedy tokens of one sequence in float32, after a prompt; `model` is what the command line named."""
    path = CompiledPath(checkpoint.source)
    path.compile(batches=False)
    candidates = {own(Storage.FLOAT32): PathCandidate(path), REFERENCE: PathCandidate(ReferencePath(checkpoint.source))}
    what = f"{checkpoint.name} generation"
    prompt_T = prompt(checkpoint.config.vocabulary, WORKLOAD.prompt)
    samples = {Key(who, what): sample(each, prompt_T, WORKLOAD) for who, each in candidates.items()}
    measured = measure_in_turn(samples, run.rounds)
    base = measured[Key(REFERENCE, what)].timing
    timed = Timed(measured=measured)
    for each, implementation in zip(measured.values(), (COMPILED, REFERENCE), strict=True):
        ratios = paired_ratios(base, each.timing)
        median = quantile(each.timing.seconds, 0.5)
        words = ["twinfer", "bench", "moe", "--part", "generation", "--model", model, "--rounds", str(run.rounds)]
        timed.rows.append(
            Row(
                kind=Kind.MODEL,
                name=checkpoint.name,
                shape=WORKLOAD.shape,
                storage=Storage.FLOAT32,
                implementation=implementation,
                rows=WORKLOAD.tokens,
                p20_s=quantile(each.timing.seconds, 0.2),
                p50_s=median,
                p80_s=quantile(each.timing.seconds, 0.8),
                repeats=len(each.timing.seconds),
                calls=WORKLOAD.steps,
                tokens_per_s=WORKLOAD.tokens / median,
                baseline=REFERENCE,
                speed_up=quantile(ratios, 0.5),
                speed_up_p20=quantile(ratios, 0.2),
                speed_up_p80=quantile(ratios, 0.8),
                seed=0,
                machine=run.machine,
                repro=shlex.join(words),
            )
        )
    name = f"{checkpoint.name} generation, compiled over reference"
    mine, theirs = Key(own(Storage.FLOAT32), what), Key(REFERENCE, what)
    timed.targets.append(Target(name=name, own=mine, over=(theirs,), bound=10.0))
    return timed
