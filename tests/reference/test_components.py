"""Each component against an independent implementation of the same formula, in float64.

Both sides round differently, so they may differ by the rounding of a sum of n terms: n * eps * (the same sum of
absolute values), Higham 2002 section 3.1. `rounding` spells that out; nothing else is let through.
"""

import itertools

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from twinfer.reference.attention import attention, visible
from twinfer.reference.cache import KVCache, append
from twinfer.reference.linear import linear
from twinfer.reference.mlp import activation, mlp
from twinfer.reference.norms import layer_norm, rms_norm
from twinfer.reference.positions import rotate
from twinfer.spec.config import Activation, MlpConfig, RotaryLayout
from twinfer.spec.weights import LinearWeights, MlpWeights, NormWeights

seeds = st.integers(0, 2**31)
sizes = st.integers(1, 9)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rounding(terms: int, scale: Tensor | float) -> Tensor:
    """How far two float64 evaluations of a sum of `terms` products may lie apart; `scale` is the sum of |products|."""
    return 2 * (terms + 4) * torch.finfo(torch.float64).eps * torch.as_tensor(scale, dtype=torch.float64)


def assert_within(ours: Tensor, theirs: Tensor, bound: Tensor) -> None:
    assert ours.shape == theirs.shape
    excess = (ours - theirs).abs() - bound
    assert bool((excess <= 0).all()), (
        f"{int((excess > 0).sum())} elements differ by up to {float(excess.max()):.3g} more"
    )


@given(seed=seeds, rows=sizes, inputs=sizes, outputs=sizes, bias=st.booleans())
def test_linear_is_torchs(seed: int, rows: int, inputs: int, outputs: int, bias: bool) -> None:
    x, weight_NI = normal(seed, rows, inputs), normal(seed + 1, outputs, inputs)
    bias_N = normal(seed + 2, outputs) if bias else None
    scale = x.abs() @ weight_NI.abs().T + (0 if bias_N is None else bias_N.abs())
    ours = linear(x, LinearWeights(weight_NI=weight_NI, bias_N=bias_N))
    assert_within(ours, F.linear(x, weight_NI, bias_N), rounding(inputs + 1, scale))


@given(seed=seeds, rows=sizes, hidden=st.integers(2, 40), shift=st.sampled_from([0.0, 100.0]))
def test_norms_are_torchs(seed: int, rows: int, hidden: int, shift: float) -> None:
    x, gain_M, bias_M = normal(seed, rows, hidden) + shift, normal(seed + 1, hidden), normal(seed + 2, hidden)
    theirs = F.layer_norm(x, (hidden,), gain_M, bias_M, 1e-5)
    ours = layer_norm(x, NormWeights(gain_M=gain_M, bias_M=bias_M), 1e-5)
    # Centring cancels the shift: an error of eps * |x| stands against a deviation of sqrt(variance + epsilon).
    deviation = torch.sqrt(x.var(-1, keepdim=True, correction=0) + 1e-5)
    magnified = x.abs().amax(-1, keepdim=True) / deviation
    scale = gain_M.abs() * magnified * (1 + magnified) + bias_M.abs()
    assert_within(ours, theirs, rounding(hidden, scale))
    theirs = F.rms_norm(x, (hidden,), gain_M, 1e-5)
    ours = rms_norm(x, NormWeights(gain_M=gain_M), 1e-5)
    assert_within(ours, theirs, rounding(hidden, theirs.abs()))


@given(seed=seeds)
def test_activations_are_torchs(seed: int) -> None:
    x = 4 * normal(seed, 64)
    for kind, theirs in (
        (Activation.GELU, F.gelu(x)),
        (Activation.GELU_TANH, F.gelu(x, approximate="tanh")),
        (Activation.GELU_SIGMOID, F.silu(1.702 * x) / 1.702),
        (Activation.RELU, F.relu(x)),
        (Activation.SILU, F.silu(x)),
    ):
        assert_within(activation(x, kind), theirs, rounding(1, x.abs()))


@given(seed=seeds, gated=st.booleans(), hidden=sizes, width=sizes)
def test_mlp_is_its_formula(seed: int, gated: bool, hidden: int, width: int) -> None:
    x_BTM = normal(seed, 1, 3, hidden)
    up, gate, down = normal(seed + 1, width, hidden), normal(seed + 2, width, hidden), normal(seed + 3, hidden, width)
    weights = MlpWeights(
        up=LinearWeights(weight_NI=up),
        gate=LinearWeights(weight_NI=gate) if gated else None,
        down=LinearWeights(weight_NI=down),
    )
    ours = mlp(x_BTM, weights, MlpConfig(width=width, activation=Activation.SILU, gated=gated))
    inner = F.silu(x_BTM @ gate.T) * (x_BTM @ up.T) if gated else F.silu(x_BTM @ up.T)
    reach = (x_BTM.abs() @ up.abs().T) * ((x_BTM.abs() @ gate.abs().T) if gated else 1)
    assert_within(ours, inner @ down.T, rounding(3 * hidden + width, reach @ down.abs().T))


@given(
    length=st.integers(0, 7),
    new=st.integers(0, 5),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 12),
    padding=st.none() | st.integers(0, 12),
)
def test_visible_is_the_predicate(length: int, new: int, causal: bool, window: int | None, padding: int | None) -> None:
    query_position_T, key_position_S = torch.arange(length, length + new), torch.arange(length + new)
    seen_TS = visible(query_position_T, key_position_S, causal=causal, window=window, key_length=padding)
    assert seen_TS.shape == (new, length + new)
    for (t, query), (s, key) in itertools.product(enumerate(query_position_T), enumerate(key_position_S)):
        in_window = window is None or key > query - window
        exists = padding is None or key < padding
        assert bool(seen_TS[t, s]) == ((not causal or key <= query) and in_window and exists)


@given(
    seed=seeds,
    batch=st.integers(1, 3),
    queries=st.integers(1, 5),
    keys=st.integers(1, 7),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    head_size=sizes,
)
def test_attention_is_torchs(
    seed: int, batch: int, queries: int, keys: int, kv_heads: int, group: int, head_size: int
) -> None:
    query_BTHD = normal(seed, batch, queries, kv_heads * group, head_size)
    key_BSKD = normal(seed + 1, batch, keys, kv_heads, head_size)
    value_BSKD = normal(seed + 2, batch, keys, kv_heads, head_size)
    seen_TS = normal(seed + 3, queries, keys) > -0.5
    seen_TS[:, 0] = True  # torch gives NaN for an empty row; ours has its own test below
    ours = attention(query_BTHD, key_BSKD, value_BSKD, visible_TS=seen_TS, scale=0.7)
    theirs = F.scaled_dot_product_attention(
        query_BTHD.transpose(1, 2),
        key_BSKD.repeat_interleave(group, dim=2).transpose(1, 2),
        value_BSKD.repeat_interleave(group, dim=2).transpose(1, 2),
        attn_mask=seen_TS,
        scale=0.7,
    ).transpose(1, 2)
    # A score that is off by e scales its weight by 1 + e, so the error of the scores multiplies the values.
    score_reach = 0.7 * query_BTHD.abs().sum(-1).max() * key_BSKD.abs().max()
    assert_within(ours, theirs, rounding(head_size + keys, (1 + score_reach) * value_BSKD.abs().max()))


@given(seed=seeds, key_lengths=st.lists(st.integers(0, 6), min_size=1, max_size=3), queries=st.integers(1, 3))
def test_padded_keys_are_as_good_as_absent(seed: int, key_lengths: list[int], queries: int) -> None:
    """A batch whose masks end at each sequence's own key length is each sequence with its own keys alone."""
    query = normal(seed, len(key_lengths), queries, 2, 4)
    key, value = normal(seed + 1, len(key_lengths), 6, 1, 4), normal(seed + 2, len(key_lengths), 6, 1, 4)
    position_T, position_S = torch.arange(6, 6 + queries), torch.arange(6)
    visible_BTS = torch.stack([visible(position_T, position_S, key_length=length) for length in key_lengths])
    together = attention(query, key, value, visible_TS=visible_BTS, scale=0.5)
    for row, length in enumerate(key_lengths):
        cut_key, cut_value = key[row : row + 1, :length], value[row : row + 1, :length]
        seen_TS = torch.ones(queries, length, dtype=torch.bool)
        if length == 0:
            assert torch.equal(together[row], torch.zeros_like(query[row]))
            continue
        alone = attention(query[row : row + 1], cut_key, cut_value, visible_TS=seen_TS, scale=0.5)
        reach = 1 + query[row].abs().sum(-1).max() * key[row].abs().max()
        assert_within(together[row], alone[0], rounding(4 + length, reach * value[row].abs().max()))


@given(seed=seeds, queries=st.integers(1, 4), keys=st.integers(1, 5), seen=st.integers(0, 5))
def test_unseen_keys_do_not_matter(seed: int, queries: int, keys: int, seen: int) -> None:
    """Replacing every key and value that no query may see, even by NaN, changes no bit; seeing none gives zeros."""
    query, key, value = normal(seed, 1, queries, 2, 3), normal(seed + 1, 1, keys, 1, 3), normal(seed + 2, 1, keys, 1, 3)
    visible_TS = (torch.arange(keys) < seen).expand(queries, keys)
    before = attention(query, key, value, visible_TS=visible_TS, scale=1.0)
    for junk in (torch.nan, torch.inf, 1e300):
        spoiled_key, spoiled_value = key.clone(), value.clone()
        spoiled_key[:, seen:], spoiled_value[:, seen:] = junk, junk
        assert torch.equal(before, attention(query, spoiled_key, spoiled_value, visible_TS=visible_TS, scale=1.0))
    if seen == 0:
        assert torch.equal(before, torch.zeros_like(query))


@given(seed=seeds, start=st.integers(0, 100_000), pairs=st.integers(1, 5), passing=st.integers(0, 3))
def test_rotation_is_complex_multiplication(seed: int, start: int, pairs: int, passing: int) -> None:
    x_BTHD = normal(seed, 2, 3, 2, 2 * pairs + passing)
    frequency_J = normal(seed + 1, pairs).abs()
    position_T = torch.arange(start, start + 3)
    turn_TJ = torch.polar(torch.ones(3, pairs, dtype=torch.float64), torch.outer(position_T.double(), frequency_J))
    for layout in RotaryLayout:
        if layout is RotaryLayout.HALF_SPLIT:
            real, imaginary = x_BTHD[..., :pairs], x_BTHD[..., pairs : 2 * pairs]
        else:
            real, imaginary = x_BTHD[..., 0 : 2 * pairs : 2], x_BTHD[..., 1 : 2 * pairs : 2]
        theirs = torch.complex(real.contiguous(), imaginary.contiguous()) * turn_TJ[:, None]
        ours = rotate(x_BTHD, position_T, frequency_J, layout)
        if layout is RotaryLayout.HALF_SPLIT:
            our_real, our_imaginary = ours[..., :pairs], ours[..., pairs : 2 * pairs]
        else:
            our_real, our_imaginary = ours[..., 0 : 2 * pairs : 2], ours[..., 1 : 2 * pairs : 2]
        assert_within(our_real, theirs.real, rounding(2, theirs.abs()))
        assert_within(our_imaginary, theirs.imag, rounding(2, theirs.abs()))
        assert torch.equal(ours[..., 2 * pairs :], x_BTHD[..., 2 * pairs :])


@given(seed=seeds, dtype=st.sampled_from([torch.bfloat16, torch.float16]))
def test_narrow_results_are_wide_ones_rounded_once(seed: int, dtype: torch.dtype) -> None:
    """A component given 16-bit numbers computes in float32 on exactly those, and rounds only its result."""
    narrow = {name: normal(seed + i, 1, 3, 4, 6).to(dtype) for i, name in enumerate(("query", "key", "value"))}
    wide = {name: tensor.float() for name, tensor in narrow.items()}
    weights = LinearWeights(weight_NI=normal(seed + 3, 5, 6), bias_N=normal(seed + 4, 5))
    gain = NormWeights(gain_M=normal(seed + 5, 6), bias_M=normal(seed + 6, 6))
    seen_TS, frequency_J = torch.ones(3, 3, dtype=torch.bool).tril(), normal(seed + 7, 2)
    position_T = torch.arange(3)

    def all_of(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        return [
            linear(query, weights),
            layer_norm(query, gain, 1e-5),
            rms_norm(query, gain, 1e-5),
            attention(query, key, value, visible_TS=seen_TS, scale=0.5),
            *(activation(query, kind) for kind in Activation),
            *(rotate(query, position_T, frequency_J, layout) for layout in RotaryLayout),
        ]

    for from_narrow, from_wide in zip(all_of(**narrow), all_of(**wide), strict=True):
        assert from_narrow.dtype is dtype
        assert torch.equal(from_narrow, from_wide.to(dtype))


@given(seed=seeds, before=st.integers(0, 4), new=st.integers(0, 4))
def test_appending_leaves_the_old_cache_alone(seed: int, before: int, new: int) -> None:
    key, value = normal(seed, 1, before, 2, 3), normal(seed + 1, 1, before, 2, 3)
    old = KVCache(key.clone(), value.clone())
    key_BTKD, value_BTKD = normal(seed + 2, 1, new, 2, 3), normal(seed + 3, 1, new, 2, 3)
    grown = append(old, key_BTKD, value_BTKD)
    grown.key_BSKD.fill_(7.0)
    assert torch.equal(old.key_BSKD, key)
    assert torch.equal(old.value_BSKD, value)
    assert grown.value_BSKD[0].tolist() == value[0].tolist() + value_BTKD[0].tolist()
    assert (old.length, grown.length) == (before, before + new)
