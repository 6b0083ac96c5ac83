"""Stored weights on many ranks are those of one rank, bit for bit, in every storage; what mixes them up is seen."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from twinfer.oracle.case import RandomPicker
from twinfer.oracle.models import RandomSource
from twinfer.oracle.trial import same_bits
from twinfer.reference.parallel import path as paths
from twinfer.reference.parallel.path import ParallelReference
from twinfer.reference.parallel.ranks import RankWeights, cut
from twinfer.reference.path import ReferencePath
from twinfer.reference.quantize import stored
from twinfer.spec import shard as sharding
from twinfer.spec.config import INT4_GROUP, MlpConfig, ModelConfig, Storage
from twinfer.spec.moe import MoeConfig, router
from twinfer.spec.parallel import ParallelConfig, stage_layers
from twinfer.spec.shapes import is_matrix
from twinfer.spec.shard import Shard
from twinfer.spec.weights import assemble, tensors

from ...shards import expected, shareable

FULL = ParallelConfig(data=3, pipeline=2, tensor=4, expert=2, expert_slices=6)
"""Degrees that differ from one another; tensor exceeds the key/value heads."""


def config() -> ModelConfig:
    """A dense layer, a mixture beside a shared MLP and a dense layer; 2 key/value heads, 37 tokens."""
    drawn = shareable(RandomPicker(3))
    one = drawn.layers[0]
    attention = replace(one.attention, heads=8, kv_heads=2, head_size=INT4_GROUP, qkv_bias=True, output_bias=True)
    mlp = MlpConfig(width=4 * INT4_GROUP, activation=one.dense_mlp.activation, gated=True, bias=True)
    mixture = MoeConfig(
        router=router("mixtral", experts=4, top_k=2), expert=replace(mlp, width=6 * INT4_GROUP), shared=mlp
    )
    layers = tuple(replace(one, attention=attention, mlp=each) for each in (mlp, mixture, mlp))
    return replace(drawn, layers=layers, vocabulary=37)


def differing(path: ParallelReference, one: ReferencePath) -> list[str]:
    """Tensors of a rank that are not its elements of the whole model's, picked one by one; or that it must not have."""
    parallel, found = path.job.parallel, []
    for rank in range(parallel.ranks):
        place, shard = parallel.place(rank), parallel.shard(rank)
        held = path.job.weights[place.stage][rank % parallel.stage_ranks]
        numbers = stage_layers(len(path.config.layers), parallel.pipeline)[place.stage]
        pairs: list[tuple[int | str, Any, Any]] = [
            (number, layer, one.weights.layers[number]) for number, layer in zip(numbers, held.layers, strict=True)
        ]
        pairs += [("embedding", held.ends.embedding, one.weights.embedding), ("head", held.ends.head, one.weights.head)]
        for part, mine, whole in pairs:
            wanted, got = expected(part, whole, path.config, shard), dict(tensors(mine))
            differ = {name for name in got.keys() & wanted.keys() if not same_bits(got[name], wanted[name])}
            found += [f"{part} {name}" for name in sorted(differ | got.keys() ^ wanted.keys())]
    return found


def both(storage: Storage) -> tuple[ParallelReference, ReferencePath]:
    source = RandomSource(config())
    how: dict[str, Any] = {"storage": storage, "compute": torch.float64}
    return ParallelReference(source, FULL, **how), ReferencePath(source, **how)


@pytest.mark.parametrize("storage", Storage)
def test_ranks_hold_the_stored_model(storage: Storage) -> None:
    assert not differing(*both(storage))


def _scales_of_the_slice(patch: pytest.MonkeyPatch) -> None:
    """Each rank quantizes what it read."""

    def wrong(weights: Any, model: ModelConfig, parallel: ParallelConfig) -> list[list[RankWeights]]:
        floats = cut(ReferencePath(RandomSource(model), compute=torch.float64).weights, model, parallel)
        return [
            [replace(held, layers=tuple(_quantized(each) for each in held.layers)) for held in stage]
            for stage in floats
        ]

    patch.setattr(paths, "cut", wrong)


def _quantized(part: Any) -> Any:
    def of(name: str, tensor: Tensor) -> Tensor:
        if not is_matrix(name):
            return tensor
        return stored(tensor.flatten(0, -2), Storage.INT8, torch.float64).view(tensor.shape)

    return assemble(type(part), {name: of(name, tensor) for name, tensor in tensors(part)})


def _heads_cut_by_turns(patch: pytest.MonkeyPatch) -> None:
    """Rows of rank r are r, r + R, r + 2 R and so on."""
    piece = sharding._piece
    patch.setattr(
        sharding,
        "_piece",
        lambda size, shard: slice(shard.rank, size, shard.ranks) if size % 64 == 0 else piece(size, shard),
    )


def _replicated_heads_cut(patch: pytest.MonkeyPatch) -> None:
    """Two ranks that share a key/value head hold half of it each."""
    patch.setattr(sharding, "_among", lambda shard, kv_heads: shard)


def _slices_instead_of_experts(patch: pytest.MonkeyPatch) -> None:
    """The place among experts and that among slices are swapped."""
    made = sharding._expert_slices

    def wrong(shapes: Any, shard: Any) -> Any:
        return made(shapes, replace(shard, rank=(shard.rank + shard.slice_rank) % shard.ranks))

    patch.setattr(sharding, "_expert_slices", wrong)


def _bias_on_every_rank(patch: pytest.MonkeyPatch) -> None:
    made = sharding._slices

    def wrong(shapes: Any, shard: Shard, *rest: Any) -> Any:
        first = made(shapes, replace(shard, rank=0), *rest)
        return {**made(shapes, shard, *rest), **{name: first[name] for name in first if name.endswith("bias_N")}}

    patch.setattr(sharding, "_slices", wrong)


MUTANTS: dict[Callable[[pytest.MonkeyPatch], None], str] = {
    _scales_of_the_slice: "down.weight",
    _heads_cut_by_turns: "query.weight",
    _replicated_heads_cut: "key.weight",
    _slices_instead_of_experts: "experts.up.weight",
    _bias_on_every_rank: "output.bias",
}


@pytest.mark.parametrize(("mutant", "moved"), MUTANTS.items(), ids=lambda each: getattr(each, "__name__", ""))
def test_mutants_are_caught(mutant: Callable[[pytest.MonkeyPatch], None], moved: str, monkeypatch: Any) -> None:
    """A rank holds another tensor than its own."""
    mutant(monkeypatch)
    found = differing(*both(Storage.INT8))
    assert any(moved in name for name in found), found


def test_scales_of_the_slice_move_what_is_cut_by_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing else: rows, and what is whole, have the scales that they have anyway."""
    _scales_of_the_slice(monkeypatch)
    moved = {name.partition(" ")[2] for name in differing(*both(Storage.INT8)) if name[0].isdigit()}
    downs = {"mlp.down.weight_NI", "mlp.experts.down.weight_ENI", "mlp.shared.down.weight_NI"}
    assert moved == {"attention.output.weight_NI"} | downs
