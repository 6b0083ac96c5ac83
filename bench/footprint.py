"""Compile time and peak memory of one storage of the compiled path, each in a subprocess.

The first subprocess finds an empty cache folder and compiles; the second finds what the first has left there, and
decodes.
"""

import tempfile
import time
from dataclasses import dataclass, replace

import torch

from .machine import peak_resident_bytes
from .subprocesses import run_in_subprocess

ALLOWED_TIMES, ALLOWED_MORE = 1.5, 150 * 2**20
"""Peak memory beyond an interpreter that has imported torch may be so many times the prepared weights, and so many
bytes more."""
COMPILE_ALLOWED_S = 30.0
"""For all graphs of a storage, caches empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    model: str
    storage: str
    prompt: int
    """Tokens that are read before steps are timed."""
    steps: int
    start_compiler: bool
    """Whether the compiler is started before, so that what it does once a process is no program's compile time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    compile_s: float
    """Of all graphs of a decoder: a prompt, one sequence, several."""
    weight_bytes: int
    step_s: float
    """A token of one sequence on average, with the choice of the next."""
    outside_s: float
    """Of this, what the path spent outside of the kernels that Inductor made."""
    loops_a_layer: float | None
    """Parallel loops in a layer of that step, of the generated C++; None for a model of one layer."""
    bare_bytes: int | None
    """Peak of an interpreter that has imported torch."""
    peak_bytes: int | None
    """Peak of the whole process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Measurements of one storage, by its two subprocesses."""

    storage: str
    compile_cold_s: float
    compile_warm_s: float
    weight_bytes: int
    step_s: float
    outside_kernels: float
    """Share of a token's time that the path spent outside of the kernels that Inductor made; one sequence."""
    loops_a_layer: float | None
    peak_bytes: int | None
    beyond_torch_bytes: int | None
    """Peak less that of an interpreter that has imported torch."""

    @property
    def allowed_bytes(self) -> int:
        return int(ALLOWED_TIMES * self.weight_bytes) + ALLOWED_MORE


def measure_footprint(model: str, storage: str, prompt: int, steps: int) -> Footprint:
    """Run both subprocesses; their errors are raised here."""
    task = Task(model=model, storage=storage, prompt=prompt, steps=steps, start_compiler=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        cold = _run(task, cache)
        warm = _run(replace(task, start_compiler=False), cache)
    beyond = None
    if warm.peak_bytes is not None and warm.bare_bytes is not None:
        beyond = warm.peak_bytes - warm.bare_bytes
    return Footprint(
        storage=storage,
        compile_cold_s=cold.compile_s,
        compile_warm_s=warm.compile_s,
        weight_bytes=warm.weight_bytes,
        step_s=warm.step_s,
        outside_kernels=warm.outside_s / warm.step_s,
        loops_a_layer=warm.loops_a_layer,
        peak_bytes=warm.peak_bytes,
        beyond_torch_bytes=beyond,
    )


def _run(task: Task, cache: str) -> Outcome:
    environment = {"TORCHINDUCTOR_CACHE_DIR": cache, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return run_in_subprocess(measure, task, what=task.storage, environment=environment)


def measure(task: Task) -> Outcome:
    """Compile, read a prompt and decode; to be called in a subprocess that has done nothing yet."""
    bare_bytes = peak_resident_bytes()
    from ..checkpoint import open_model
    from ..compiled.path import CompiledPath
    from ..spec.config import Storage
    from .kernels import watched
    from .side_by_side import prompt

    if task.start_compiler:
        torch.compile(lambda x: x + 1)(torch.ones(64))
    with watched() as kernels:
        path = CompiledPath(open_model(task.model).source, storage=Storage(task.storage))
        compile_s = path.compile()
        prompt_T = prompt(path.config.vocabulary, task.prompt)
        for _ in range(3):  # in the first, CPU graphs are recorded, in the second first moved: only the third counts
            sequences = path.open(1, task.prompt + task.steps)
            logits_BV = path.extend(sequences, [prompt_T])
            kernels.forget()
            start, extending_s = time.perf_counter(), 0.0
            for _ in range(task.steps):
                chosen = [logits_BV.argmax(-1)]
                before = time.perf_counter()
                logits_BV = path.extend(sequences, chosen)
                extending_s += time.perf_counter() - before
            seconds = time.perf_counter() - start
            sequences.close()
    return Outcome(
        compile_s=compile_s,
        weight_bytes=path.weight_bytes,
        step_s=seconds / task.steps,
        outside_s=(extending_s - kernels.seconds) / task.steps,
        loops_a_layer=kernels.loops_a_layer(task.steps, len(path.config.layers)),
        bare_bytes=bare_bytes,
        peak_bytes=peak_resident_bytes(),
    )
