"""Every family's conventions on many ranks: published configs with small sizes, in their own form otherwise."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from twinfer.checkpoint.families import FAMILIES
from twinfer.checkpoint.family import find, parse_config
from twinfer.checkpoint.fields import Fields
from twinfer.oracle.models import RandomSource
from twinfer.reference.parallel.path import ParallelReference
from twinfer.reference.path import ReferencePath
from twinfer.spec.config import Head, LayerConfig, ModelConfig
from twinfer.spec.mlp import MlpConfig
from twinfer.spec.moe import MoeConfig
from twinfer.spec.parallel import Exchange, ParallelConfig

from ...families.conftest import AGREEMENT
from ...families.examples import EXHAUSTIVE
from ...families.published_config import PUBLISHED, published
from .test_path import disagreement

DENSE = ParallelConfig(data=2, pipeline=3, tensor=4)
MIXTURE = ParallelConfig(
    data=4, pipeline=3, tensor=2, expert=4, expert_slices=2, exchange=Exchange.COORDINATED
)  # degrees of one model differ from one another, but for data and experts


@cache
def shrunk(name: str) -> ModelConfig:
    """The config with small sizes; of its layers, one of each kind, three at least."""
    fields = Fields(published(name), f"{name}: ")
    config = parse_config(find(FAMILIES, fields), fields).config
    kinds = [small(each) for each in dict.fromkeys(config.layers)][:4]
    return replace(
        config,
        hidden=12,
        vocabulary=37,
        context=64,
        embedding_size=None if config.embedding_size is None else 8,
        layers=tuple((kinds * 3)[: max(3, len(kinds))]),
    )


def small(layer: LayerConfig) -> LayerConfig:
    attention = layer.attention
    kv_heads = {1: 1, attention.heads: 12}.get(attention.kv_heads, 2)
    rotary = attention.rotary
    if rotary is not None:
        rotary = replace(rotary, size=8 if rotary.size == attention.head_size else 4)
    window = None if attention.window is None else 3
    attention = replace(attention, heads=12, kv_heads=kv_heads, head_size=8, rotary=rotary, window=window)
    return replace(layer, attention=attention, mlp=small_mlp(layer.mlp))


def small_mlp(mlp: MlpConfig | MoeConfig) -> MlpConfig | MoeConfig:
    if isinstance(mlp, MlpConfig):
        return replace(mlp, width=24)
    groups = min(2, mlp.router.groups)
    router = replace(mlp.router, experts=8, top_k=min(3, mlp.router.top_k), groups=groups, kept_groups=1)
    beside = {
        name: replace(each, width=24)
        for name, each in (("shared", mlp.shared), ("residual", mlp.residual))
        if each is not None
    }
    return replace(mlp, router=router, expert=replace(mlp.expert, width=24), **beside)


NAMES = sorted(path.stem for path in PUBLISHED.iterdir())
DECODERS = [name for name in NAMES if shrunk(name).head is not Head.NONE]
FIRST = list({shrunk(name).family: name for name in reversed(DECODERS)}.values())


@pytest.mark.parametrize("name", DECODERS if EXHAUSTIVE else FIRST)
def test_a_family_on_many_ranks(name: str) -> None:
    """In float64, to a rounding, what one rank computes; sequences are fewer than groups hold in the last round."""
    config = shrunk(name)
    mixed = any(isinstance(layer.mlp, MoeConfig) for layer in config.layers)
    source, parallel = RandomSource(config, 1), MIXTURE if mixed else DENSE
    one = ReferencePath(source, compute=torch.float64)
    assert disagreement(one, ParallelReference(source, parallel, compute=torch.float64), 1, batch=3) <= AGREEMENT


def test_every_family_is_there() -> None:
    """But encoders, which no pipeline of tokens serves, and two of which there is no published config here."""
    tried = {published(name)["model_type"] for name in DECODERS}
    encoders = {published(name)["model_type"] for name in NAMES} - tried
    assert tried | encoders | {"megatron_gpt", "granitemoeshared"} == {family.model_type for family in FAMILIES}
    assert all(shrunk(name).head is Head.NONE for name in NAMES if published(name)["model_type"] in encoders)
    assert {shrunk(name).family for name in FIRST} == {shrunk(name).family for name in DECODERS}
