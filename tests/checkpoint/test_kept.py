"""How the twinfer form keeps matrices and configs: what is read back is what was written, bit by bit."""

import json
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from twinfer.checkpoint.config_json import from_json, to_json
from twinfer.checkpoint.kept import dequantised, kept, quantised
from twinfer.compiled.packing import pack
from twinfer.oracle.case import RandomPicker
from twinfer.oracle.models import draw_model_config
from twinfer.oracle.trial import same_bits
from twinfer.reference.quantise import stored
from twinfer.spec.config import Storage
from twinfer.spec.errors import ConfigError, WeightError

TINY = float(torch.finfo(torch.float32).smallest_normal)
"""Rows of about this size have scales that are denormal, or zero."""

seeds = st.integers(0, 2**20)


@given(
    rows=st.lists(
        st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=9), min_size=1
    )
)
@example(rows=[[0.0, -0.0]])
@example(rows=[[200 * 2**-149, 2**-149, -3 * 2**-149], [TINY, TINY / 3, -TINY / 127], [3e38, 1.0, -2e38]])
@settings(max_examples=300)
def test_codes_and_peaks_quantise_to_themselves(rows: list[list[float]]) -> None:
    """On both paths, down to rows whose scale is denormal or zero."""
    weight_NI = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    again_NI = dequantised(*quantised(weight_NI))
    assert same_bits(quantised(weight_NI)[0], quantised(again_NI)[0])
    assert same_bits(*(stored(each, Storage.INT8, torch.float64) for each in (weight_NI, again_NI)))
    one, other = (pack(each, Storage.INT8) for each in (weight_NI, again_NI))
    assert same_bits(one.word_NJ, other.word_NJ)
    assert one.scale_N is not None
    assert other.scale_N is not None
    assert same_bits(one.scale_N, other.scale_N)


def test_codes_times_scales_would_not_do() -> None:
    """What the peaks are for: of this row, codes times scale have another scale, and so other codes."""
    weight_NI = torch.tensor([[572 * 2.0**-149, 100 * 2.0**-149]])
    quotient = stored(weight_NI, Storage.INT8, torch.float32)
    assert not same_bits(stored(quotient, Storage.INT8, torch.float32), quotient)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_int8_keeps_finite_numbers_alone(value: float) -> None:
    weight_NI = torch.tensor([[1.0], [value]])
    with pytest.raises(WeightError, match=r"mlp\.up\.weight_NI holds (inf|nan) in row 1; int8 keeps finite"):
        kept("mlp.up.weight_NI", weight_NI, Storage.INT8)


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
        (("head",), "both", 'config.head is "both"; it must be one of tied, own, none'),
        (("layers",), {}, "config.layers is {}; it must be a list"),
        (("layers", 0), 7, r"config.layers[0] is 7; it must be an object"),
        (("layers", 0, "attention", "kv_heads"), -1, "AttentionConfig.kv_heads is -1; it must be at least 1"),
        (("layers", 0, "norm", "epsilon"), "small", 'config.layers[0].norm.epsilon is "small"; it must be of type'),
        (("layers", 0, "mlp", "gated"), 1, "config.layers[0].mlp.gated is 1; it must be of type bool"),
        (("embedding_scale",), 10**400, "it must be of type float"),
    ],
)
def test_a_config_that_was_tampered_with_is_refused(path: tuple[Any, ...], value: Any, message: str) -> None:
    values = json.loads(json.dumps(to_json(draw_model_config(RandomPicker(3)))))
    change(values, path, value)
    with pytest.raises(ConfigError) as error:
        from_json(values, "config")
    assert message in str(error.value)
