"""Rotary frequencies against transformers' own initializers, which compute in float32, and against their definition."""

import math
import re
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from twinfer.checkpoint import rotary
from twinfer.checkpoint.fields import Fields
from twinfer.checkpoint.rotary_fields import Head, Rotation, rotation
from twinfer.spec.errors import ConfigError

from ..families.conftest import AGREEMENT, furthest, widened

bases = st.sampled_from([100.0, 10000.0, 100000.0, 500000.0, 1e6])
sizes = st.integers(1, 64).map(lambda pairs: 2 * pairs)
factors = st.sampled_from([1.0, 2.0, 4.0, 8.0, 32.0, 2.5])


@st.composite
def llama3_scalings(draw: st.DrawFn) -> dict[str, Any]:
    low = draw(st.sampled_from([0.5, 1.0, 2.0]))
    return {
        "rope_type": "llama3",
        "factor": draw(factors),
        "low_freq_factor": low,
        "high_freq_factor": low + draw(st.sampled_from([0.5, 3.0])),
        "original_max_position_embeddings": draw(st.sampled_from([16, 512, 8192])),
    }


scalings = st.one_of(
    st.just({"rope_type": "default"}),
    st.builds(lambda factor: {"rope_type": "linear", "factor": factor}, factors),
    st.builds(lambda factor: {"rope_type": "dynamic", "factor": factor}, factors),
    llama3_scalings(),
)
"""Those that do not lengthen what rotates; YaRN and LongRoPE are held against transformers in float64, by
tests/families."""
CONTEXT = 2 * 8192
CONTEXTS = {"max_position_embeddings": CONTEXT}


def read(config: dict[str, Any], size: int, most_tokens: int | None = None, **head: Any) -> Rotation:
    fields = Fields(config, "config.json: ", most_tokens=most_tokens)
    found = rotation(fields, Head(size=size, context=CONTEXT, **head))
    fields.finish()
    return found


def ours(config: dict[str, Any], size: int) -> Tensor:
    found = read(config, size)
    assert found.config.attention_factor == 1.0
    assert found.config.size == size
    return found.frequency_J


def theirs(base: float, size: int, scaling: dict[str, Any]) -> Tensor:
    config = LlamaConfig(
        hidden_size=4 * size,
        num_attention_heads=4,
        rope_parameters={"rope_theta": base, **scaling},
        max_position_embeddings=CONTEXT,
    )
    module = LlamaRotaryEmbedding(config)
    assert module.attention_scaling == 1.0
    return module.inv_freq


@given(base=bases, size=sizes.filter(lambda size: size > 2), scaling=scalings)
def test_frequencies_are_transformers(base: float, size: int, scaling: dict[str, Any]) -> None:
    """To the float32 error of theirs, which has no dynamic scaling of heads of two elements.

    Theirs rounds the exponent 2j/size (off by u = eps/2 of it), which base ** x makes ln(base) * u relative; the
    power itself, good to 2 u; one u for the reciprocal, and one for each of at most seven operations of scaling.
    Blending subtracts (turns - low) before it divides by (high - low), with |d kept| <= 2 u turns / (high - low) more.
    """
    unit = torch.finfo(torch.float32).eps / 2
    expected_J = theirs(base, size, scaling).double()
    relative = unit * (math.log(base) + 2 + 1 + 7)
    if scaling["rope_type"] == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        blended = (relative + 4 * unit) * high / (high - low)  # of `kept`, where turns <= high
        relative += blended * scaling["factor"]  # relative to a frequency at least 1 / factor of the plain one
    found_J = ours({"rope_parameters": {"rope_theta": base, **scaling}}, size)
    assert found_J.dtype == torch.float64
    assert bool(((found_J - expected_J).abs() <= relative * expected_J).all()), (found_J / expected_J - 1) / unit


@given(data=st.data(), size=sizes, whole=st.booleans())
def test_yarn_is_transformers_in_float64(data: st.DataObject, size: int, whole: bool) -> None:
    """With bounds of the blend before the first pair, behind the last, and on the wrong side of each other, too."""
    scaling = {
        "rope_type": "yarn",
        "rope_theta": data.draw(st.sampled_from([2.0, 77.0, 10000.0, 1e6])),
        "factor": data.draw(factors),
        "original_max_position_embeddings": data.draw(st.sampled_from([4, 13, 512, 8192, 100_000])),
        "beta_fast": data.draw(st.sampled_from([4.0, 32.0, 500.0])),
        "beta_slow": data.draw(st.sampled_from([0.01, 1.0, 3.0])),
        "truncate": whole,
    }
    with widened():
        module = LlamaRotaryEmbedding(
            LlamaConfig(hidden_size=size, num_attention_heads=1, rope_parameters=dict(scaling), **CONTEXTS)
        )
    found = read({"rope_parameters": scaling}, size)
    assert furthest([found.frequency_J[:, None]], [module.inv_freq[:, None]]) <= AGREEMENT
    assert found.config.attention_factor == module.attention_scaling


@given(base=bases, size=sizes)
def test_frequencies_keep_their_law(base: float, size: int) -> None:
    """frequency[j] ** size * base ** 2j = 1, checked in exact arithmetic to a few float64 roundings a factor."""
    frequency_J = rotary.frequencies(base, size)
    unit = Fraction(torch.finfo(torch.float64).eps) / 2
    # a relative error e of the frequency counts size times; e <= (ln(base) + 4) u, as above but in float64
    allowed = size * unit * (math.ceil(math.log(base)) + 4) * 2
    for pair, frequency in enumerate(frequency_J.tolist()):
        assert abs(Fraction(frequency) ** size * Fraction(base) ** (2 * pair) - 1) <= allowed


@given(base=bases, size=sizes, scaling=scalings)
def test_older_and_newer_config_styles_mean_the_same(base: float, size: int, scaling: dict[str, Any]) -> None:
    newer = ours({"rope_parameters": {"rope_theta": base, **scaling}}, size)
    older = ours({"rope_theta": base, "rope_scaling": scaling}, size)
    renamed = {"type" if name == "rope_type" else name: value for name, value in scaling.items()}
    oldest = ours({"rope_theta": base, "rope_scaling": renamed}, size)
    assert torch.equal(newer, older)
    assert torch.equal(newer, oldest)


@given(base=bases, size=sizes, scaling=llama3_scalings())
def test_banded_scaling_keeps_fast_pairs_and_divides_slow_ones(base: float, size: int, scaling: dict[str, Any]) -> None:
    plain_J = rotary.frequencies(base, size)
    scaled_J = ours({"rope_parameters": {"rope_theta": base, **scaling}}, size)
    turns_J = plain_J * scaling["original_max_position_embeddings"] / (2 * math.pi)
    fast_J, slow_J = turns_J >= scaling["high_freq_factor"], turns_J <= scaling["low_freq_factor"]
    assert torch.equal(scaled_J[fast_J], plain_J[fast_J])
    assert torch.equal(scaled_J[slow_J], plain_J[slow_J] * (1 / scaling["factor"]))
    between_J = ~(fast_J | slow_J)
    assert bool((scaled_J[between_J] <= plain_J[between_J]).all())
    assert bool((scaled_J[between_J] >= plain_J[between_J] / scaling["factor"]).all())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"rope_scaling": {"rope_type": "proportional", "factor": 2.0}},
            'rope_type is "proportional"; it must be one of default, linear, dynamic, llama3, yarn, longrope',
        ),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
        (
            {"rope_scaling": {"type": "linear", "factor": 0}},
            "rope_scaling.factor is 0; it must be a finite number above 0",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2, "mscale": 1}},
            "rope_scaling.mscale is 1; this version does not",
        ),
        ({"rope_scaling": {}, "rope_parameters": {}}, "rope_scaling and rope_parameters are both given"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5; it must be 1"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1, 1], "long_factor": [1]}},
            "short_factor is [1, 1]; it must be a list of 4 numbers above 0",
        ),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [0], "long_factor": [1]}},
            "short_factor is [0]; it must be a list of finite numbers above 0",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": -1}}, "beta_fast is -1; it must be a finite"),
        ({"rope_theta": "10000"}, 'rope_theta is "10000"; it must be a finite number'),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8,
                    "low_freq_factor": 4,
                    "high_freq_factor": 4,
                    "original_max_position_embeddings": 8192,
                }
            },
            "high_freq_factor is 4.0; it must be above low_freq_factor, 4.0",
        ),
    ],
)
def test_scalings_that_are_not_understood_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        read(config, 8)


LONG = {"type": "longrope", "short_factor": [1, 2], "long_factor": [4, 8], "original_max_position_embeddings": 4096}


@pytest.mark.parametrize(("most_tokens", "divisor"), [(None, 4), (4097, 4), (4096, 1), (1, 1)])
def test_longrope_goes_by_what_the_model_is_opened_for(most_tokens: int | None, divisor: int) -> None:
    """Longer than the first context, the long divisors; magnitude sqrt(1 + ln 4 / ln 4096) either way."""
    found = read({"rope_scaling": LONG}, 4, most_tokens)
    assert torch.equal(found.frequency_J, rotary.frequencies(10000.0, 4) / torch.tensor([divisor, 2 * divisor]))
    assert found.config.attention_factor == math.sqrt(1 + math.log(4) / math.log(4096))


def test_an_odd_part_of_a_head_rotates_with_one_more_element() -> None:
    found = read({"partial_rotary_factor": 0.5}, 6, part=1.0)
    assert found.config.size == 4
    assert torch.equal(found.frequency_J, rotary.frequencies(10000.0, 3))
