"""Which experts to keep, by what real tokens chose: `python -m twinfer.bench.expert_cache MODEL TEXT`.

The tokens of a text file go through a model, whose routers' choices are noted; a dense model is made a mixture first,
its MLPs copied into 8 experts, each perturbed by a tenth of its weights' standard deviation, so that routing depends on
what experts do. The choices are then replayed, token by token as in decoding, through a cache of a quarter of the
experts under each policy, beside the fewest reads of a cache that knows the future (`offload.expert_report.fewest`).
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import open_model
from ..checkpoint.upcycle import Upcycled
from ..compiled.path import CompiledPath
from ..offload.expert_report import fewest
from ..offload.expert_slots import Slots
from ..offload.uses import Expert, Policy, Uses
from ..spec.decoder import Routed
from ..spec.moe import MoeConfig, RouterConfig, Score
from ..spec.shard import Shard
from ..spec.weights import ExpertWeights, LayerWeights, MoeWeights, StackedLinearWeights, WeightSource

TOKENS = 1536
SHARE = 1 / 4
ROUTER = RouterConfig(experts=8, top_k=2, score=Score.SOFTMAX_OF_CHOSEN)
_NOISE = 0.1


class Perturbed(Upcycled):
    """A dense model as a mixture of experts that differ."""

    def layer(self, index: int, shard: Shard | None = None) -> LayerWeights:
        assert shard is None
        layer = super().layer(index)
        assert isinstance(layer.mlp, MoeWeights)
        generator = torch.Generator().manual_seed(1000 + index)

        def noisy(weights: StackedLinearWeights) -> StackedLinearWeights:
            weight_ENI = weights.weight_ENI.to(torch.float32)
            noise_ENI = torch.randn(weight_ENI.shape, generator=generator)
            return replace(weights, weight_ENI=weight_ENI + _NOISE * weight_ENI.std() * noise_ENI)

        experts = layer.mlp.experts
        gate = None if experts.gate is None else noisy(experts.gate)
        perturbed = ExpertWeights(up=noisy(experts.up), down=noisy(experts.down), gate=gate)
        return replace(layer, mlp=replace(layer.mlp, experts=perturbed))


def trace_of(source: WeightSource, ids: Sequence[int]) -> list[list[Expert]]:
    """Return the experts that each layer needs for each token, in a decoder's order."""
    path = CompiledPath(source, mode="eager", routes=True)
    assert isinstance(path, Routed)
    path.extend(path.open(1, len(ids)), [torch.tensor(ids)])
    layers: list[Tensor] = path.routes[0]
    return [
        [(layer, int(expert)) for expert in chosen_TK[token]]
        for token in range(len(ids))
        for layer, chosen_TK in enumerate(layers)
    ]


def fetched(trace: Sequence[Sequence[Expert]], uses: Uses, kept: int) -> int:
    """Return how many experts a cache fetches that keeps so many."""
    slots, count = Slots(uses, kept=kept, spare=max(map(len, trace))), 0
    for wanted in trace:
        for expert in wanted:
            slot = slots.find(expert)
            if slot is None:
                count += 1
                slot = slots.claim(expert)
                assert slot is not None
                slots.filled(slot)
            slots.use(slot)
        slots.settle(set(wanted))
    return count


def table(source: WeightSource, ids: Sequence[int]) -> dict[str, Any]:
    """Return what each policy fetches for a text's tokens, over the fewest."""
    if not any(isinstance(layer.mlp, MoeConfig) for layer in source.config.layers):
        source = Perturbed(source, ROUTER, seed=3)
    routers = [layer.mlp.router for layer in source.config.layers if isinstance(layer.mlp, MoeConfig)]
    experts, top_k = [each.experts for each in routers], [each.top_k for each in routers]
    trace, kept = trace_of(source, ids), int(sum(experts) * SHARE)
    needed = [expert for wanted in trace for expert in wanted]
    best = len(fewest(needed, kept))
    rows = {}
    for policy in Policy:
        count = fetched(trace, Uses(experts, top_k, policy), kept)
        rows[policy.value] = {"hit_rate": 1 - count / len(needed), "over_best": count / best}
    about = {"tokens": len(ids), "experts": sum(experts), "kept": kept, "needed": len(needed)}
    return {**about, "best_hit_rate": 1 - best / len(needed), "policies": rows}


def main(model: str, text: Path) -> None:
    """Print the table of one model as JSON."""
    checkpoint = open_model(model)
    assert checkpoint.tokenizer is not None
    ids = checkpoint.tokenizer.encode(text.read_text(encoding="utf-8"))[: min(TOKENS, checkpoint.config.context)]
    print(json.dumps({"model": model, **table(checkpoint.source, ids)}, indent=1))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
