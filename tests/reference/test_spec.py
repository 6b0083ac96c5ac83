"""Configs that no model can have are refused; weights fit the shapes that the config asks for, or are named."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from twinfer.oracle.case import RandomPicker
from twinfer.oracle.models import RandomSource, draw_encoder_config, draw_model_config
from twinfer.spec.config import (
    AttentionConfig,
    Head,
    ModelConfig,
    NormConfig,
    NormKind,
    NormPlacement,
    Residual,
    RotaryConfig,
    RotaryLayout,
)
from twinfer.spec.errors import ConfigError, WeightError
from twinfer.spec.shapes import embedding_shapes, head_shapes, is_buffer, layer_shapes
from twinfer.spec.weights import NormWeights, assemble, tensors, validate_embedding, validate_head, validate_layer

CONFIG = draw_model_config(RandomPicker(0))
LAYER = replace(CONFIG.layers[0], norm_placement=NormPlacement.PRE_NORM, residual=Residual.SEQUENTIAL)
seeds = st.integers(0, 2**31)
Check = Callable[[Any], None]


def source_of(seed: int) -> RandomSource:
    draw = draw_encoder_config if seed % 4 == 0 else draw_model_config
    return RandomSource(draw(RandomPicker(seed)), seed)


def parts(source: RandomSource) -> list[tuple[Any, Check, dict[str, tuple[int, ...]]]]:
    """Each part of a model, what checks it, and the shapes it must have."""
    config = source.config
    return [
        (source.embedding(), lambda part: validate_embedding(part, config), embedding_shapes(config)),
        (source.layer(0), lambda part: validate_layer(part, config, 0), layer_shapes(config.layers[0], config.hidden)),
        (source.head(), lambda part: validate_head(part, config), head_shapes(config)),
    ]


def changed(part: Any, name: str, tensor: Tensor) -> Any:
    return assemble(type(part), {**dict(tensors(part)), name: tensor})


@given(seed=seeds)
def test_parts_taken_apart_assemble_again(seed: int) -> None:
    """The very tensors, and all that the config asks for: no more, no fewer."""
    for part, check, shapes in parts(source_of(seed)):
        found = dict(tensors(part))
        again = dict(tensors(assemble(type(part), found)))
        assert again.keys() == found.keys() == shapes.keys()
        assert all(again[name] is tensor for name, tensor in found.items())
        check(part)


@given(seed=seeds, index=st.integers(0, 99))
def test_what_does_not_fit_is_named(seed: int, index: int) -> None:
    """A tensor of another shape, of integers, or one that should not be there."""
    for part, check, shapes in parts(source_of(seed)):
        if not shapes:
            continue
        name = sorted(shapes)[index % len(shapes)]
        tensor = dict(tensors(part))[name]
        with pytest.raises(WeightError, match=f"{name} has shape"):
            check(changed(part, name, torch.cat([tensor, tensor])))
        with pytest.raises(WeightError, match=f"{name} has dtype torch.int64"):
            check(changed(part, name, tensor.long()))


def test_what_is_missing_or_surplus_is_named() -> None:
    config = replace(CONFIG, head=Head.TIED, head_bias=False, embedding_size=None)
    head = RandomSource(config).head()
    with pytest.raises(WeightError, match="head bias_V is present; by the config it must be absent"):
        validate_head(replace(head, bias_V=torch.zeros(config.vocabulary)), config)
    with pytest.raises(WeightError, match=r"head projection.weight_NI is absent; by the config it must be present"):
        validate_head(head, replace(config, head=Head.UNTIED))
    with pytest.raises(WeightError, match="gain_M is missing; NormWeights holds gain_M, bias_M"):
        assemble(NormWeights, {"bias_M": torch.zeros(3)})
    with pytest.raises(WeightError, match="gain has no place in NormWeights"):
        assemble(NormWeights, {"gain_M": torch.zeros(3), "gain": torch.zeros(3)})


@given(seed=seeds)
def test_what_is_made_is_float64(seed: int) -> None:
    source = source_of(seed)
    made = {name: tensor for name, tensor in tensors(source.layer(0)) if is_buffer(name)}
    assert all(tensor.dtype is torch.float64 for tensor in made.values())
    attention = source.config.layers[0].attention
    assert len(made) == (attention.rotary is not None) + attention.alibi
    for name, tensor in made.items():
        with pytest.raises(WeightError, match=f"{name} has dtype torch.float32; it must be torch.float64"):
            validate_layer(changed(source.layer(0), name, tensor.float()), source.config, 0)


def model(**fields: Any) -> ModelConfig:
    return replace(CONFIG, **fields)


def attention(**fields: Any) -> AttentionConfig:
    return AttentionConfig(**{"heads": 2, "kv_heads": 1, "head_size": 4, "scale": 0.5, **fields})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NormConfig(kind=NormKind.RMS, epsilon=0.0), "NormConfig.epsilon is 0.0; it must be a positive"),
        (lambda: attention(kv_heads=3), "kv_heads is 3; it must be a divisor of heads, which is 2"),
        (lambda: attention(softcap=0.0), "AttentionConfig.softcap is 0.0; it must be a positive number, or None"),
        (lambda: attention(qkv_clip=-1.0), "AttentionConfig.qkv_clip is -1.0"),
        (lambda: attention(alibi=True, causal=False), "alibi is True; it must be false where attention is not causal"),
        (
            lambda: RotaryConfig(layout=RotaryLayout.HALF_SPLIT, size=2, attention_factor=0.0),
            "RotaryConfig.attention_factor is 0.0; it must be a positive number",
        ),
        (
            lambda: replace(LAYER, norm_placement=NormPlacement.OUTPUT_NORM, residual=Residual.PARALLEL),
            "norm_placement is 'output_norm'; it must be pre_norm, where the residual is parallel",
        ),
        (lambda: replace(LAYER, residual_scale=0.0), "LayerConfig.residual_scale is 0.0"),
        (lambda: model(head=Head.NONE, head_bias=True), "head_bias is True; it must be false without a head"),
        (lambda: model(embedding_size=0), "table_width is 0; it must be at least 1"),
        (lambda: model(logit_softcap=-1.0), "ModelConfig.logit_softcap is -1.0"),
        (lambda: model(logit_scale=0.0), "ModelConfig.logit_scale is 0.0"),
        (lambda: model(embedding_scale=-2.0), "ModelConfig.embedding_scale is -2.0"),
        (lambda: model(token_types=-1), "ModelConfig.token_types is -1; it must be at least 0"),
    ],
)
def test_configs_that_no_model_can_have_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_equal_norms_are_equal() -> None:
    """Models are compared by their configs, and an RMS norm has no bias whatever a file says of it."""
    with_word, without = (NormConfig(kind=NormKind.RMS, epsilon=1e-5, bias=bias) for bias in (True, False))
    assert with_word == without
    assert hash(with_word) == hash(without)
    assert not with_word.bias
    assert NormConfig(kind=NormKind.LAYER, epsilon=1e-5).bias
