"""A random LLaMA of about a billion parameters on a GPU, in bfloat16: how near decode and prefill come to the card.

`python -m twinfer.bench.peers.gpu` times, in turn, the compiled path with two storages beside transformers in eager
mode and with a static cache, all on the same weights, and prints a table. A decode step is held against reading the
stored weights once at the card's copy bandwidth, a prompt against its products at the card's GEMM rate; both are
measured in the same run. Launches are the kernels of one decode step outside of a graph, divided by the layers.

Shapes: T prompt tokens.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ...compiled.path import CompiledPath
from ...oracle.models import RandomSource
from ...spec.config import (
    Activation,
    AttentionConfig,
    Head,
    LayerConfig,
    MlpConfig,
    ModelConfig,
    NormConfig,
    NormKind,
    RotaryConfig,
    RotaryLayout,
    Storage,
)
from ...spec.counts import total
from ..candidates import Candidate, PathCandidate
from ..side_by_side import Key, Measured, Workload, measure_in_turn, prompt, sample
from .exported import transformers_llama
from .libraries import StaticCacheCandidate, TransformersCandidate

COMPUTE = torch.bfloat16
STORAGES = (Storage.BFLOAT16, Storage.INT8)
WORKLOADS = (Workload(prompt=512), Workload(prompt=32, steps=32), Workload(prompt=32, steps=32, batch=8))


def llama(hidden: int, layers: int, heads: int, kv_heads: int, width: int, vocabulary: int) -> ModelConfig:
    """Return a LLaMA of these sizes, untied, with rotary positions of base 10000."""
    head_size = hidden // heads
    norm = NormConfig(kind=NormKind.RMS, epsilon=1e-5)
    attention = AttentionConfig(
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        scale=head_size**-0.5,
        rotary=RotaryConfig(layout=RotaryLayout.HALF_SPLIT, size=head_size),
    )
    layer = LayerConfig(
        norm=norm, attention=attention, mlp=MlpConfig(width=width, activation=Activation.SILU, gated=True)
    )
    return ModelConfig(
        family="llama",
        hidden=hidden,
        vocabulary=vocabulary,
        context=2048,
        layers=(layer,) * layers,
        final_norm=norm,
        learned_positions=False,
        head=Head.UNTIED,
    )


BILLION = llama(hidden=2048, layers=16, heads=32, kv_heads=8, width=8192, vocabulary=32000)
TINY = llama(hidden=64, layers=2, heads=4, kv_heads=2, width=96, vocabulary=128)


def copy_bandwidth(device: torch.device, elements: int) -> float:
    """Return bytes a second, those read and those written, of a large copy on the device."""
    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _median_seconds(lambda: target.copy_(source), device)


def gemm_rate(device: torch.device, size: int) -> float:
    """Return multiplications and additions a second of a square product in bfloat16."""
    square = torch.randn(size, size, device=device, dtype=COMPUTE)
    return 2 * size**3 / _median_seconds(lambda: square @ square, device)


def _median_seconds(call: Callable[[], object], device: torch.device) -> float:
    def taken() -> float:
        _synchronize(device)
        start = time.perf_counter()
        call()
        _synchronize(device)
        return time.perf_counter() - start

    return statistics.median([taken() for _ in range(12)][2:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def launches_of_a_step(path: CompiledPath, device: torch.device) -> int | None:
    """Return the kernels that one decode step without a graph launches; None where there are no launches to count."""
    if device.type != "cuda":
        return None
    sequences = path.open(1, 64)
    token_1 = torch.zeros(1, dtype=torch.int64, device=device)
    path.extend(sequences, [token_1.repeat(8)])
    path.extend(sequences, [token_1])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        path.extend(sequences, [token_1])
        _synchronize(device)
    sequences.close()
    counts: list[int] = [each.count for each in profile.key_averages() if each.device_type.name == "CUDA"]
    return sum(counts)


def candidates(source: RandomSource, device: torch.device) -> Iterator[tuple[str, Candidate]]:
    """Make every implementation, one after the other, on the same weights."""
    for storage in STORAGES:
        yield (
            f"compiled, {storage}",
            PathCandidate(CompiledPath(source, storage=storage, compute=COMPUTE, device=device)),
        )
    module: Any = transformers_llama(source).to(device, COMPUTE)
    yield "transformers eager", TransformersCandidate(module)
    if device.type == "cuda":
        yield "transformers static cache", StaticCacheCandidate(module, 64)


def main(arguments: list[str] | None = None) -> int:
    """Time everything and print the table; returns 0."""
    parser = argparse.ArgumentParser(prog="python -m twinfer.bench.peers.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", help="where to run; cuda unless given")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each; the table has medians (default 5)")
    parser.add_argument("--tiny", action="store_true", help="a model of a few thousand parameters, to try the script")
    args = parser.parse_args(arguments)
    device, config = torch.device(args.device), TINY if args.tiny else BILLION
    source = RandomSource(config, 0, COMPUTE)
    bandwidth = copy_bandwidth(device, 2**16 if args.tiny else 2**28)
    gemm = gemm_rate(device, 256 if args.tiny else 8192)
    made = dict(candidates(source, device))
    samples = {
        Key(who, workload.title): sample(candidate, prompt(config.vocabulary, workload.prompt).to(device), workload)
        for who, candidate in made.items()
        for workload in WORKLOADS
        if workload.batch == 1 or not isinstance(candidate, StaticCacheCandidate)
    }
    measured = measure_in_turn(samples, args.rounds, report=lambda line: print(line, file=sys.stderr))
    path = CompiledPath(source, storage=Storage.BFLOAT16, compute=COMPUTE, device=device, captured=False)
    launches = launches_of_a_step(path, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    console = Console(width=120)
    console.print(
        f"{name}, torch {torch.__version__}, transformers {import_module('transformers').__version__}: "
        f"copies {bandwidth / 1e9:.0f} GB/s, GEMM {gemm / 1e12:.1f} TFLOP/s in bfloat16, "
        f"{total(config).parameters / 1e9:.2f} B parameters"
    )
    if launches is not None:
        console.print(f"launches of a decode step without a graph: {launches / len(config.layers):.1f} a layer")
    console.print(_table(config, measured, bandwidth, gemm))
    return 0


def _table(config: ModelConfig, measured: dict[Key, Measured], bandwidth: float, gemm: float) -> Table:
    table = Table("who", "what", "tokens/s", "share of the limit", box=None)
    for key, each in measured.items():
        if each.timing.error is not None:
            table.add_row(key.who, key.what, "-", each.timing.error)
            continue
        rate = statistics.median(each.rates)
        workload = next(one for one in WORKLOADS if one.title == key.what)
        table.add_row(key.who, key.what, f"{rate:.0f}", f"{_share(config, key, workload, rate, bandwidth, gemm):.2f}")
    return table


def _share(config: ModelConfig, key: Key, workload: Workload, rate: float, bandwidth: float, gemm: float) -> float:
    """Return the share of the tokens a second that the nearer limit of the card allows: stored bytes, or products."""
    table = config.vocabulary * config.table_width
    read = total(config).bytes(Storage.INT8 if Storage.INT8 in key.who else Storage.BFLOAT16)
    read -= table * (1 if Storage.INT8 in key.who else 2)  # of the token table a step reads a row
    products = 2 * (total(config).matrix - table)
    tokens = workload.tokens
    least = max(read / bandwidth, tokens * products / gemm)
    return least * rate / tokens


if __name__ == "__main__":
    sys.exit(main())
