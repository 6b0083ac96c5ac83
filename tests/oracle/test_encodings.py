"""Encoders compared: right ones pass, whatever they are asked; seeded faults are caught."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from twinfer.oracle.baseline import Baseline
from twinfer.oracle.case import RandomPicker
from twinfer.oracle.encodings import Texts, assert_encodings_agree, compare_encodings, draw_texts
from twinfer.oracle.models import RandomSource, draw_encoder_config
from twinfer.oracle.ops.layer import LAYER
from twinfer.oracle.paths import PathMismatch
from twinfer.reference.path import ReferencePath
from twinfer.spec.config import ModelConfig

Tensors = list[Tensor]
Types = list[Tensor] | None


def drawn(seed: int) -> tuple[RandomSource, Texts, Texts | None]:
    pick = RandomPicker(seed)
    config = draw_encoder_config(pick)
    return RandomSource(config, seed), *draw_texts(pick, config)


def test_texts_are_what_they_promise() -> None:
    """Ids and types within the model's; ragged, alone, of one token, typed and not."""
    seen: dict[str, int] = {}
    for seed in range(200):
        source, texts, types = drawn(seed)
        assert all(0 <= token < source.config.vocabulary for text in texts for token in text)
        if types is not None:
            assert [len(each) for each in types] == [len(each) for each in texts]
            assert all(0 <= kind < source.config.token_types for text in types for kind in text)
        features = {
            "ragged": len({len(text) for text in texts}) > 1,
            "alone": len(texts) == 1,
            "one token": any(len(text) == 1 for text in texts),
            "typed": types is not None,
            "types left out": types is None and source.config.token_types > 0,
        }
        for feature, here in features.items():
            seen[feature] = seen.get(feature, 0) + here
    assert min(seen.values()) >= 15, seen


@given(seed=st.integers(0, 2**20))
@settings(max_examples=20)
def test_an_encoder_that_sums_in_another_order_agrees(seed: int) -> None:
    source, texts, types = drawn(seed)
    components: Any = LAYER.variants["summed_otherwise"]
    path = ReferencePath(source, components=components.keywords["components"])
    comparison = assert_encodings_agree(Baseline.of(source), path, texts, types)
    assert comparison.rows == sum(map(len, texts))
    assert 0 < comparison.largest_ratio <= 1


class Faulty(ReferencePath):
    """A reference with one mistake, of the kind that encoding many texts at once brings."""

    fault: Callable[[Callable[[Tensors, Types], Tensors], Tensors, Types], Tensors]

    def encode(self, tokens: Sequence[Tensor], types: Sequence[Tensor] | None = None) -> list[Tensor]:
        return type(self).fault(super().encode, list(tokens), None if types is None else list(types))


def see_each_other(encode: Callable[..., Tensors], tokens: Tensors, types: Types) -> Tensors:
    """As one text; so positions go on from text to text, too."""
    (hidden_TW,) = encode([torch.cat(tokens)], None if types is None else [torch.cat(types)])
    return list(hidden_TW.split([len(each) for each in tokens]))


def padded(encode: Callable[..., Tensors], tokens: Tensors, types: Types) -> Tensors:
    """To the longest, with token 0, which is seen."""
    longest = max(map(len, tokens))

    def wide(each: Tensor) -> Tensor:
        return torch.cat([each, each.new_zeros(longest - len(each))])

    hidden = encode([wide(each) for each in tokens], None if types is None else [wide(each) for each in types])
    return [each[: len(text)] for each, text in zip(hidden, tokens, strict=True)]


def types_ignored(encode: Callable[..., Tensors], tokens: Tensors, types: Types) -> Tensors:
    return encode(tokens, None)


def types_of_the_first_text(encode: Callable[..., Tensors], tokens: Tensors, types: Types) -> Tensors:
    if types is None:
        return encode(tokens, None)
    first = types[0].repeat(max(map(len, tokens)))
    return encode(tokens, [first[: len(each)] for each in tokens])


def in_another_order(encode: Callable[..., Tensors], tokens: Tensors, types: Types) -> Tensors:
    return encode(tokens, types)[::-1]


def one_is_lost(encode: Callable[..., Tensors], tokens: Tensors, types: Types) -> Tensors:
    return encode(tokens, types)[1:]


def halved(encode: Callable[..., Tensors], tokens: Tensors, types: Types) -> Tensors:
    return [each.bfloat16().to(each.dtype) for each in encode(tokens, types)]


def in_float64(encode: Callable[..., Tensors], tokens: Tensors, types: Types) -> Tensors:
    return [each.double() for each in encode(tokens, types)]


FAULTS = (
    see_each_other,
    padded,
    types_ignored,
    types_of_the_first_text,
    in_another_order,
    one_is_lost,
    halved,
    in_float64,
)


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.__name__ for fault in FAULTS])
def test_no_fault_of_an_encoder_is_missed(fault: Callable[..., Tensors]) -> None:
    """Within 30 drawn models and texts."""
    kind = type("Kind", (Faulty,), {"fault": staticmethod(fault)})
    for seed in range(30):
        source, texts, types = drawn(seed)
        baseline = Baseline.of(source)
        if not compare_encodings(baseline, kind(source), texts, types).holds:
            with pytest.raises(PathMismatch, match="texts = "):
                assert_encodings_agree(baseline, kind(source), texts, types)
            return
    pytest.fail(f"{fault.__name__}: passed 30 draws")


def causal(config: ModelConfig) -> ModelConfig:
    layers = [replace(layer, attention=replace(layer.attention, causal=True)) for layer in config.layers]
    return replace(config, layers=tuple(layers))


def windowless(config: ModelConfig) -> ModelConfig:
    layers = [replace(layer, attention=replace(layer.attention, window=None)) for layer in config.layers]
    return replace(config, layers=tuple(layers))


def unscaled(config: ModelConfig) -> ModelConfig:
    layers = [replace(layer, attention=replace(layer.attention, scale=1.0)) for layer in config.layers]
    return replace(config, layers=tuple(layers))


@pytest.mark.parametrize("wrong", [causal, windowless, unscaled])
def test_no_wrong_convention_is_missed(wrong: Callable[[ModelConfig], ModelConfig]) -> None:
    """Encoders that do not see later tokens, or see too many earlier ones."""
    for seed in range(30):
        source, texts, types = drawn(seed)
        candidate = ReferencePath(RandomSource(wrong(source.config), seed))
        if not compare_encodings(Baseline.of(source), candidate, texts, types).holds:
            return
    pytest.fail(f"{wrong.__name__}: passed 30 draws")
