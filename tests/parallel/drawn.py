"""Models and degrees for real ranks: small, and of every convention."""

from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor

from twinfer.compiled.path import CompiledPath, Mode
from twinfer.oracle.case import Picker, RandomPicker
from twinfer.oracle.models import draw_moe
from twinfer.reference.parallel.path import ParallelReference
from twinfer.spec.config import LayerConfig, ModelConfig, Storage
from twinfer.spec.mlp import MlpConfig
from twinfer.spec.moe import MoeConfig
from twinfer.spec.parallel import ParallelConfig
from twinfer.spec.weights import WeightSource

from ..shards import shareable

Calls = list[list[Tensor]]
Counted = list[tuple[str, tuple[int, ...], int]]


def draw_model(seed: int, *, layers: int = 1, experts: bool = False, wide: bool = False) -> ModelConfig:
    """A decoder of at least so many layers; with `experts`, some layers have them; `wide` fits int4's groups."""
    pick: Picker = RandomPicker(seed)
    config = shareable(pick)
    kv_heads = pick.choice([1, 2, 4, 12])  # that 2 and 4 ranks can share, replicated or not
    each = [pick.choice(config.layers) for _ in range(max(layers, len(config.layers)))]
    each = [replace(layer, attention=replace(layer.attention, kv_heads=kv_heads)) for layer in each]
    if wide:
        each = [
            replace(layer, attention=replace(layer.attention, head_size=64), mlp=replace(layer.mlp, width=256))
            for layer in each
        ]
    if experts:
        each = [
            replace(layer, mlp=draw_moe(pick, layer.mlp))
            if isinstance(layer.mlp, MlpConfig) and (index == 0 or pick.integer(0, 1))
            else layer
            for index, layer in enumerate(each)
        ]
    return replace(config, layers=tuple(each))


def draw_mixture(seed: int, *, wide: bool = False) -> ModelConfig:
    """A model whose experts 2 and 4 ranks can share."""
    config = draw_model(seed, layers=2, experts=True, wide=wide)

    def shareable(layer: LayerConfig) -> LayerConfig:
        if not isinstance(layer.mlp, MoeConfig):
            return layer
        router = replace(layer.mlp.router, experts=4, top_k=min(2, layer.mlp.router.top_k))
        return replace(layer, mlp=replace(layer.mlp, router=router))

    return replace(config, layers=tuple(map(shareable, config.layers)))


def draw_calls(seed: int, vocabulary: int, *, batch: int) -> Calls:
    """Prompts of several lengths, a step of all sequences, and a call that gives some nothing and some more."""
    generator = torch.Generator().manual_seed(seed)

    def some(count: int) -> Tensor:
        return torch.randint(0, vocabulary, (count,), generator=generator)

    lengths = [
        [5 - index for index in range(batch)],
        [1] * batch,
        [(index + 2) % 3 for index in range(batch)],
        [1] * batch,
    ]
    return [[some(count) for count in of_call] for of_call in lengths]


def on_one(source: WeightSource, storage: Storage, calls: Calls) -> list[Tensor]:
    """The logits of the compiled path, not compiled."""
    path = CompiledPath(source, storage=storage, compute=torch.float64, mode=Mode.EAGER)
    sequences = path.open(len(calls[0]), 1)
    return [path.extend(sequences, call) for call in calls]


def counted_by_reference(
    source: WeightSource, parallel: ParallelConfig, storage: Storage, calls: Calls
) -> list[Counted]:
    """What each rank hands in, call by call, by the ledger of the one-process program."""
    path = ParallelReference(source, parallel, storage=storage, compute=torch.float64)
    sequences = path.open(len(calls[0]), 1)
    for call in calls:
        path.extend(sequences, call)
    return [
        [
            (call.kind.value, call.ranks, call.bytes[call.ranks.index(rank)])
            for call in path.job.ledger.calls
            if rank in call.ranks
        ]
        for rank in range(parallel.ranks)
    ]


def bytes_of(counted: Counted) -> Counter[tuple[str, tuple[int, ...]]]:
    """Bytes by kind and group: the reference calls once a sequence, real ranks once for all that gain one token."""
    total: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for kind, ranks, size in counted:
        total[kind, ranks] += size
    return +total
