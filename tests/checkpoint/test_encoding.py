"""How the twinfer form keeps matrices and configs: what is read back is what was written, bit by bit."""

import json
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from twinfer.checkpoint.config_json import from_json, to_json
from twinfer.checkpoint.native.encoding import Quantizers, dequantized, encode, encoded_rows
from twinfer.checkpoint.native.group_encoding import dequantized_groups, encoded_groups
from twinfer.compiled import packing
from twinfer.compiled.packing import pack, quantize
from twinfer.converting import REFERENCE
from twinfer.oracle.case import RandomPicker
from twinfer.oracle.models import draw_model_config
from twinfer.oracle.trial import same_bits
from twinfer.reference.quantize import stored
from twinfer.spec.config import Storage
from twinfer.spec.errors import ConfigError, WeightError

TINY = float(torch.finfo(torch.float32).smallest_normal)
"""Rows of about this size have scales that are denormal, or zero."""

COMPILED = Quantizers(
    rows=lambda weight_NI: packing.quantize_rows(weight_NI)[0],
    groups=lambda weight_NI: packing.quantize_groups(weight_NI)[0],
)
quantizers = pytest.mark.parametrize("quantizers", [REFERENCE, COMPILED], ids=["reference", "compiled"])

seeds = st.integers(0, 2**20)


@quantizers
@given(
    rows=st.lists(
        st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=9), min_size=1
    )
)
@example(rows=[[0.0, -0.0]])
@example(rows=[[200 * 2**-149, 2**-149, -3 * 2**-149], [TINY, TINY / 3, -TINY / 127], [3e38, 1.0, -2e38]])
@settings(max_examples=300)
def test_values_and_absmaxes_quantize_to_themselves(quantizers: Quantizers, rows: list[list[float]]) -> None:
    """On both paths, down to rows whose scale is denormal or zero."""
    weight_NI = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    again_NI = dequantized(*encoded_rows(weight_NI, quantizers.rows))
    assert same_bits(*(encoded_rows(each, quantizers.rows)[0] for each in (weight_NI, again_NI)))
    assert same_bits(*(stored(each, Storage.INT8, torch.float64) for each in (weight_NI, again_NI)))
    one, other = (pack(quantize(each, Storage.INT8)) for each in (weight_NI, again_NI))
    assert same_bits(one.word, other.word)
    assert one.scale_N is not None
    assert other.scale_N is not None
    assert same_bits(one.scale_N, other.scale_N)


def test_codes_times_scales_would_not_do() -> None:
    """What the absmaxes are for: of this row, codes times scale have another scale, and so other codes."""
    weight_NI = torch.tensor([[572 * 2.0**-149, 100 * 2.0**-149]])
    quotient = stored(weight_NI, Storage.INT8, torch.float32)
    assert not same_bits(stored(quotient, Storage.INT8, torch.float32), quotient)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_int8_keeps_finite_numbers_only(value: float) -> None:
    weight_NI = torch.tensor([[1.0], [value]])
    with pytest.raises(WeightError, match=r"mlp\.up\.weight_NI holds (inf|nan) in row 1; int8 keeps finite"):
        encode("mlp.up.weight_NI", weight_NI, Storage.INT8, REFERENCE)


def narrow_rows(seed: int, inputs: int) -> Tensor:
    """Neighboring float32 numbers: groups a few to a few dozen of them wide, denormals and powers of two included."""
    generator = torch.Generator().manual_seed(seed)
    exponent_N1 = torch.randint(-149, 100, (64, 1), generator=generator)
    base_N1 = torch.where(torch.rand(64, 1, generator=generator) < 0.5, 1.0, torch.rand(64, 1, generator=generator))
    bits_N1 = (base_N1.double() * 2.0**exponent_N1).float().view(torch.int32)
    width_N1 = torch.randint(1, 80, (64, 1), generator=generator)
    offset_NI = (torch.rand(64, inputs, generator=generator) * width_N1).int() - width_N1 // 2
    sign_N1 = torch.randint(0, 2, (64, 1), generator=generator) * 2 - 1
    return sign_N1 * (bits_N1 + offset_NI).clamp_min(0).int().view(torch.float32)


def wide_rows(seed: int, inputs: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    power_NI = torch.randint(-140, 110, (64, 1), generator=generator)
    power_NI = power_NI + torch.randint(0, 9, (64, inputs), generator=generator)
    return (torch.randn(64, inputs, generator=generator).double() * 2.0**power_NI).float()


@quantizers
@given(seed=seeds, inputs=st.integers(1, 150), draw=st.sampled_from([narrow_rows, wide_rows]))
@settings(max_examples=200)
def test_groups_quantize_to_themselves(quantizers: Quantizers, seed: int, inputs: int, draw: Any) -> None:
    """On both paths, from a group whose step is zero or denormal, or finer than float32 there, to the widest."""
    weight_NI = draw(seed, inputs)
    assert bool((weight_NI.diff() != 0).any()) or inputs < 3
    again_NI = dequantized_groups(*encoded_groups(weight_NI, quantizers.groups), inputs)
    assert same_bits(*(encoded_groups(each, quantizers.groups)[0] for each in (weight_NI, again_NI)))
    assert same_bits(*(stored(each, Storage.INT4, torch.float64) for each in (weight_NI, again_NI)))
    one, other = (pack(quantize(each, Storage.INT4)) for each in (weight_NI, again_NI))
    assert same_bits(one.word, other.word)
    for name in ("scale_BGU", "min_BGU"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_codes_times_steps_would_not_do() -> None:
    """What the largest weights are for: of some groups, what comes back has another step, and so other weights."""
    weight_NI = torch.cat([wide_rows(seed, 64) for seed in range(20)])
    plain_NI = stored(weight_NI, Storage.INT4, torch.float32)
    again_NI = stored(plain_NI, Storage.INT4, torch.float32)
    assert not same_bits(again_NI, plain_NI)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1.0, torch.inf], "holds weights from 1.0 to inf in row 1; int4 keeps finite"),
        ([-torch.inf, 1.0], "holds weights from -inf to 1.0 in row 1; int4 keeps finite"),
        ([1.0, torch.nan], "holds weights from nan to nan in row 1; int4 keeps finite"),
        ([-3e38, 3e38], r"in row 1; int4 keeps finite numbers only, and no more than 3.4e\+38 apart"),
    ],
)
def test_int4_keeps_finite_ranges_only(row: list[float], message: str) -> None:
    with pytest.raises(WeightError, match=r"mlp\.up\.weight_NI .*" + message):
        encode("mlp.up.weight_NI", torch.tensor([[1.0, 2.0], row]), Storage.INT4, REFERENCE)


def test_the_even_index_lies_in_the_high_four_bits() -> None:
    byte_NW, _, _ = encoded_groups(torch.arange(16.0)[None], REFERENCE.groups)
    assert [f"{byte:02x}" for byte in byte_NW[0].tolist()] == ["01", "23", "45", "67", "89", "ab", "cd", "ef"]


@given(seed=seeds)
def test_configs_survive_json(seed: int) -> None:
    config = draw_model_config(RandomPicker(seed))
    assert from_json(json.loads(json.dumps(to_json(config))), "config") == config


def change(values: Any, path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        values = values[key]
    if value is ...:
        del values[path[-1]]
    else:
        values[path[-1]] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("hidden",), "8", 'config.hidden is "8"; it must be of type int'),
        (("hidden",), True, "config.hidden is true; it must be of type int"),
        (("hidden",), ..., "config.hidden is missing; it must be there"),
        (("hiden",), 8, "config.hiden is not known to this version; it must be one of family, hidden"),
        (("head",), "both", 'config.head is "both"; it must be one of tied, untied, none'),
        (("layers",), {}, "config.layers is {}; it must be a list"),
        (("layers", 0), 7, r"config.layers[0] is 7; it must be an object"),
        (("layers", 0, "attention", "kv_heads"), -1, "AttentionConfig.kv_heads is -1; it must be at least 1"),
        (("layers", 0, "norm", "epsilon"), "small", 'config.layers[0].norm.epsilon is "small"; it must be of type'),
        (("layers", 0, "mlp", "gated"), 1, "config.layers[0].mlp.gated is 1; it must be of type bool"),
        (("embedding_scale",), 10**400, "it must be from -3.4028234663852886e+38 to 3.4028234663852886e+38"),
    ],
)
def test_a_config_that_was_tampered_with_is_refused(path: tuple[Any, ...], value: Any, message: str) -> None:
    values = json.loads(json.dumps(to_json(draw_model_config(RandomPicker(3)))))
    change(values, path, value)
    with pytest.raises(ConfigError) as error:
        from_json(values, "config")
    assert message in str(error.value)
