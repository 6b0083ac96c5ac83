"""A mixture of experts many times larger than memory: `python -m twinfer.bench.experts_beyond_memory FOLDER`.

A model of 8 GB, nearly all of it experts with random weights, is written as a store into FOLDER. A process of its own
is limited to 256 MB beyond the interpreter, page cache counted, and generates; of the experts it reads those that its
tokens choose. Its tokens and logits must be those of the compiled path with all weights in memory, which takes 8 GB.
Both run uncompiled: a compiler takes more memory than the model is given.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..compiled.path import CompiledPath
from ..offload.building import build
from ..offload.direct import DirectFile
from ..offload.measuring import measure
from ..offload.path import OffloadPath
from ..offload.store import open_store
from ..oracle.models import RandomSource
from ..spec.config import (
    Activation,
    AttentionConfig,
    Head,
    LayerConfig,
    MlpConfig,
    ModelConfig,
    NormConfig,
    NormKind,
    Storage,
)
from ..spec.moe import MoeConfig, RouterConfig, Score
from ..spec.shapes import layer_shapes
from ..spec.shard import sliced_shapes, slices_of_expert, slices_without_experts
from ..spec.weights import ExpertWeights, LayerWeights, assemble, experts_of
from .beyond_memory import NEW_TOKENS, generated, group_of, own_group, resident_bytes

LIMIT = 256 << 20
"""Bytes beyond the interpreter."""

SLACK = 64 << 20
"""Bytes of the limit that the budget leaves: torch's code that is first run then, threads, what the allocator holds."""

LAYERS, EXPERTS, TOP_K = 40, 16, 2
HIDDEN, WIDTH = 1024, 2048


def config() -> ModelConfig:
    """Return 40 equal layers of 16 experts with 6.3 million weights each."""
    norm = NormConfig(kind=NormKind.RMS, epsilon=1e-5)
    router = RouterConfig(experts=EXPERTS, top_k=TOP_K, score=Score.SOFTMAX_OF_CHOSEN)
    layer = LayerConfig(
        norm=norm,
        attention=AttentionConfig(heads=8, kv_heads=2, head_size=64, scale=0.125),
        mlp=MoeConfig(router=router, expert=MlpConfig(width=WIDTH, activation=Activation.SILU, gated=True)),
    )
    return ModelConfig(
        family="random",
        hidden=HIDDEN,
        vocabulary=8192,
        context=64,
        layers=(layer,) * LAYERS,
        final_norm=norm,
        learned_positions=True,
        head=Head.UNTIED,
    )


class Expertwise(RandomSource):
    """Random weights whose experts are drawn one by one, uniformly, which is faster."""

    def layer(self, index: int, shard: object = None) -> LayerWeights:
        assert shard is None
        experts = [dict(self._named(index, expert)) for expert in range(EXPERTS)]
        stacked = {name: torch.cat([each[name] for each in experts]) for name in experts[0]}
        return assemble(LayerWeights, self._without(index) | stacked)

    def layer_without_experts(self, index: int) -> LayerWeights:
        return assemble(LayerWeights, self._without(index))

    def expert(self, index: int, expert: int) -> ExpertWeights:
        return experts_of(self._named(index, expert))

    def _without(self, index: int) -> dict[str, Tensor]:
        shapes = layer_shapes(self.config.layers[index], self.config.hidden)
        return self._drawn(f"layer {index}", sliced_shapes(shapes, slices_without_experts(self.config, index)))

    def _named(self, index: int, expert: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed((index * EXPERTS + expert) * 8)
        shapes = layer_shapes(self.config.layers[index], self.config.hidden)
        held = sliced_shapes(shapes, slices_of_expert(self.config, index, expert))
        return {
            name: torch.empty(shape).uniform_(-1, 1, generator=generator) * (3 / shape[-1]) ** 0.5
            for name, shape in held.items()
        }


def limited(folder: Path) -> dict[str, Any]:
    """Generate under the limit, which counts what is taken after the process joins its group."""
    store = open_store(folder)
    torch.ones(64, 64) @ torch.ones(64, 64)
    base = resident_bytes()
    group = own_group()
    if group is not None:
        (group / "memory.limit_in_bytes").write_text(str(LIMIT))
    decoder = OffloadPath(store, config(), budget=LIMIT - SLACK, mode="eager")
    ids, steps, bits = generated(decoder)
    plan, experts = decoder.plan, decoder.experts
    assert plan is not None
    assert experts is not None
    used = group / "memory.max_usage_in_bytes" if group is not None else None
    peak = int(used.read_text()) if used is not None else resident_bytes("VmHWM") - base
    decoder.close()
    return {
        "ids": ids,
        "bits": bits,
        "step_s": steps,
        "store_bytes": store.nbytes,
        "interpreter_bytes": base,
        "limit_beyond_bytes": LIMIT,
        "limited_by": "memory control group, page cache counted" if group is not None else "nothing: none can be made",
        "peak_beyond_bytes": peak,
        "plan": plan.as_json(),
        "experts": experts.as_json(),
        "dense_bytes": sum(record.nbytes for record in store.schedule),
    }


def main(folder: Path) -> dict[str, Any]:
    """Build, run both, compare; returns the report."""
    source = Expertwise(config(), 5)
    begin_s = time.perf_counter()
    if not folder.exists():
        build(source, folder, Storage.BFLOAT16, model={}, files={}, identity=5, report=lambda line: None)
    built_s = time.perf_counter() - begin_s
    store = open_store(folder)
    assert DirectFile(store.weights).direct, "the folder's file system knows no direct reads"
    ran = subprocess.run(
        [sys.executable, "-m", "twinfer.bench.experts_beyond_memory", str(folder), "limited"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)},  # else glibc keeps gaps between large pieces
        check=False,
    )
    with contextlib.suppress(OSError):
        group_of(os.getpid()).rmdir()
    if ran.returncode != 0:
        raise SystemExit(f"the limited process ended with status {ran.returncode}")
    report: dict[str, Any] = json.loads(ran.stdout)
    speeds = measure(store)
    ids, _, bits = generated(CompiledPath(source, storage=Storage.BFLOAT16, mode="eager"))
    median_s = sorted(report["step_s"][1:])[(NEW_TOKENS - 1) // 2]
    return report | {
        "same_tokens": ids == report["ids"],
        "same_bits": bits == report.pop("bits"),
        "built_s": built_s,
        "disk_gb_s": speeds.disk / 1e9,
        "token_s": median_s,
    }


if __name__ == "__main__":
    if sys.argv[2:] == ["limited"]:
        torch.set_num_threads(1)
        print(json.dumps(limited(Path(sys.argv[1]))))
    else:
        print(json.dumps(main(Path(sys.argv[1])), indent=1))
