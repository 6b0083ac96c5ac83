"""The reference path keeps the protocol's promises on small random models."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from twinfer.oracle.baseline import Baseline, worst_of
from twinfer.oracle.case import RandomPicker
from twinfer.oracle.models import RandomSource, draw_encoder_config, draw_model_config
from twinfer.oracle.scale import linear_scale
from twinfer.reference.components import DEFAULT
from twinfer.reference.path import COMPUTE_DTYPES, ReferencePath
from twinfer.spec.config import Storage
from twinfer.spec.errors import RequestError

seeds = st.integers(0, 2**31)
lengths = st.lists(st.integers(0, 6), min_size=1, max_size=3)


def path_of(seed: int, compute: torch.dtype = torch.float64, storage: Storage = Storage.FLOAT32) -> ReferencePath:
    config = draw_model_config(RandomPicker(seed))
    return ReferencePath(RandomSource(config, seed), compute=compute, storage=storage)


def tokens(path: ReferencePath, seed: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(path.config.vocabulary, (length,), generator=generator)


def logits_at_once(path: ReferencePath, token_T: Tensor) -> Tensor:
    return path.extend(path.open(1, len(token_T)), [token_T], every_position=True)[0]


@given(
    seed=seeds,
    prompts=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    storage=st.sampled_from(Storage),
    compute=st.sampled_from(COMPUTE_DTYPES),
)
def test_a_row_of_a_batch_is_the_row_alone(
    seed: int, prompts: list[int], storage: Storage, compute: torch.dtype
) -> None:
    """Bitwise, in every arithmetic: a batch is a loop. Logits are never narrower than float32."""
    path = path_of(seed, compute, storage)
    new_tokens = [tokens(path, seed + row, length) for row, length in enumerate(prompts)]
    together = path.extend(path.open(len(prompts), 9), new_tokens, every_position=True)
    for row_TV, token_T in zip(together, new_tokens, strict=True):
        assert row_TV.dtype is torch.promote_types(compute, torch.float32)
        assert torch.equal(row_TV, logits_at_once(path, token_T))


@given(seed=seeds, pieces=st.lists(st.integers(1, 5), min_size=2, max_size=4))
def test_pieces_are_the_whole(seed: int, pieces: list[int]) -> None:
    """Extending in pieces is as near to the float64 truth as extending at once, in float32."""
    path = path_of(seed, torch.float32)
    baseline = Baseline.of(RandomSource(path.config, seed))
    token_T = tokens(path, seed, sum(pieces))
    hidden_TM = baseline.truth.extend_hidden(baseline.truth.open(1, len(token_T)), [token_T])[0]
    expected_TV = baseline.truth.logits(hidden_TM)
    scale_T = path.config.logit_scale * linear_scale(hidden_TM.abs(), baseline.truth.weights.projection).amax(-1)

    at_once_TV = worst_of([logits_at_once(eager, token_T) for eager in baseline.eager], expected_TV)
    sequences = path.open(1, len(token_T))
    in_pieces_TV = torch.cat(
        [path.extend(sequences, [piece], every_position=True)[0] for piece in token_T.split(pieces)]
    )
    allowed_T = 2 * (at_once_TV - expected_TV).abs().amax(-1) + 2 * torch.finfo(torch.float32).eps * scale_T
    assert bool(((in_pieces_TV - expected_TV).abs().amax(-1) <= allowed_T).all())


@given(seed=seeds, first=lengths, second=lengths)
def test_extension_returns_what_follows_the_last_token(seed: int, first: list[int], second: list[int]) -> None:
    """A sequence given nothing repeats its row, bit for bit; others get the last row of every_position."""
    path = path_of(seed)
    first = [length + 1 for length in first]
    second = (second * 3)[: len(first)]
    sequences, twins = path.open(len(first), 20), path.open(len(first), 20)
    prompts = [tokens(path, seed + row, length) for row, length in enumerate(first)]
    more = [tokens(path, seed - row, length) for row, length in enumerate(second)]
    before_BV = path.extend(sequences, prompts)
    kept_BV = before_BV.clone()
    after_BV = path.extend(sequences, more)
    path.extend(twins, prompts)
    hidden = path.extend_hidden(twins, more)
    for row, length in enumerate(second):
        assert torch.equal(after_BV[row], path.logits(hidden[row][-1]) if length else before_BV[row])
    assert torch.equal(before_BV, kept_BV)
    assert sequences.lengths == tuple(a + b for a, b in zip(first, second, strict=True))


@given(seed=seeds, cut=st.integers(1, 7))
def test_later_tokens_do_not_reach_back(seed: int, cut: int) -> None:
    """Logits up to a token depend on nothing after it, bit for bit."""
    path = path_of(seed)
    token_T = tokens(path, seed, 8)
    other_T = torch.cat([token_T[:cut], tokens(path, seed + 1, 8 - cut)])
    ours, others = logits_at_once(path, token_T)[:cut], logits_at_once(path, other_T)[:cut]
    assert torch.equal(ours, others)


@pytest.mark.parametrize(
    ("new_tokens", "message"),
    [
        ([torch.tensor([1])], "holds 1 tensors; it must hold one for each of the 2"),
        ([torch.tensor([1]), torch.tensor([], dtype=torch.long)], "sequence 1 holds no token"),
        ([torch.tensor([1]), torch.tensor([-1])], "sequence 1 is given token id -1"),
        ([torch.tensor([1]), torch.tensor([10**6])], "sequence 1 is given token id 1000000"),
        (
            [torch.tensor([1]), torch.zeros(65, dtype=torch.long)],
            r"would hold 0 \+ 65 tokens; the model's context is 64",
        ),
        ([torch.tensor([1]), torch.tensor([[1]])], r"new_tokens\[1\] is 2-D of torch.int64"),
        ([torch.tensor([1]), torch.tensor([1.0])], r"new_tokens\[1\] is 1-D of torch.float32"),
    ],
)
def test_impossible_extensions_change_nothing(new_tokens: list[Tensor], message: str) -> None:
    path = path_of(0)
    sequences = path.open(2, 8)
    with pytest.raises(RequestError, match=message):
        path.extend(sequences, new_tokens)
    assert sequences.lengths == (0, 0)


def test_impossible_requests_are_refused() -> None:
    path = path_of(0)
    with pytest.raises(RequestError, match="batch is 0"):
        path.open(0, 8)
    with pytest.raises(RequestError, match="reserve is 65 tokens"):
        path.open(1, 65)
    with pytest.raises(RequestError, match=r"compute is torch.int8"):
        path_of(0, torch.int8)
    with pytest.raises(RequestError, match="storage is 'int3'"):
        path_of(0, storage="int3")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="opened by another path"):
        path.extend(path_of(0).open(1, 8), [torch.tensor([0])])
    sequences = path.open(1, 8)
    sequences.close()
    sequences.close()
    with pytest.raises(RequestError, match="closed"):
        path.extend(sequences, [torch.tensor([0])])


@given(seed=seeds, storage=st.sampled_from(Storage))
def test_arithmetic_gets_better_as_it_gets_wider(seed: int, storage: Storage) -> None:
    """On the same stored weights, each wider arithmetic lies nearer to float64, by half of the digits it adds at least.

    Errors go with eps, so float32 should be nearer than bfloat16 by 2 ** 16 and float16 by 2 ** 3; half of these powers
    leave room for luck.
    """
    truth = path_of(seed, torch.float64, storage)
    if truth.config.vocabulary * truth.config.hidden < 50:
        return  # one logit of two numbers may be exact in any arithmetic
    token_T = tokens(truth, seed, 8)
    expected_TV = logits_at_once(truth, token_T)
    error = {
        compute: float((logits_at_once(path_of(seed, compute, storage), token_T) - expected_TV).square().mean().sqrt())
        for compute in (torch.float32, torch.bfloat16, torch.float16)
    }
    assert 0 < error[torch.float32] < error[torch.bfloat16] / 2**8
    assert 0 < error[torch.float16] < error[torch.bfloat16] / 2**1.5


def test_a_swapped_linear_map_reaches_the_head() -> None:
    """A researcher who quantizes every linear map means the head's too."""
    config = draw_model_config(RandomPicker(0))
    silent = replace(DEFAULT, linear=lambda x, weights: torch.zeros(*x.shape[:-1], len(weights.weight_NI)))
    path = ReferencePath(RandomSource(config), components=silent)
    assert not path.extend(path.open(1, 4), [torch.tensor([0, 1])]).any()


def encoder_of(seed: int, compute: torch.dtype = torch.float64) -> ReferencePath:
    return ReferencePath(RandomSource(draw_encoder_config(RandomPicker(seed)), seed), compute=compute)


@given(seed=seeds, texts=st.lists(st.integers(1, 7), min_size=1, max_size=3))
def test_a_text_is_encoded_as_if_alone(seed: int, texts: list[int]) -> None:
    """Bitwise; and in float32 as near to the truth as the output dtype allows, one vector for each token."""
    path = encoder_of(seed, torch.float32)
    given_tokens = [tokens(path, seed + row, length) for row, length in enumerate(texts)]
    together = path.encode(given_tokens)
    for row_TM, token_T in zip(together, given_tokens, strict=True):
        assert row_TM.shape == (len(token_T), path.config.hidden)
        assert torch.equal(row_TM, path.encode([token_T])[0])


@given(seed=seeds)
def test_decoders_encode_what_they_would_score(seed: int) -> None:
    """Bitwise what `extend_hidden` gives for a first extension."""
    path = path_of(seed)
    token_T = tokens(path, seed, 5)
    assert torch.equal(path.encode([token_T])[0], path.extend_hidden(path.open(1, 5), [token_T])[0])


def test_an_encoder_sees_later_tokens_and_token_types() -> None:
    """In most of the drawn models the first vector changes with the last token, and with its own type."""
    by_token = by_type = 0
    for seed in range(40):
        config = replace(draw_encoder_config(RandomPicker(seed)), token_types=2)
        path = ReferencePath(RandomSource(config, seed), compute=torch.float64)
        token_T = tokens(path, seed, 4)
        other_T = torch.cat([token_T[:3], (token_T[3:] + 1) % config.vocabulary])
        first_M, other_M = (path.encode([each])[0][0] for each in (token_T, other_T))
        by_token += not torch.equal(first_M, other_M)
        nought_T = torch.zeros_like(token_T)
        assert torch.equal(path.encode([token_T], [nought_T])[0][0], first_M)
        by_type += not torch.equal(path.encode([token_T], [nought_T + 1])[0][0], first_M)
    assert by_token > 30
    assert by_type > 30


def test_what_an_encoder_cannot_do_is_refused() -> None:
    path = encoder_of(0)
    with pytest.raises(RequestError, match="encode whole texts instead"):
        path.open(1, 4)
    with pytest.raises(RequestError, match="sequence 0 holds no token"):
        path.encode([torch.tensor([], dtype=torch.long)])
    typed = ReferencePath(RandomSource(replace(path.config, token_types=2)))
    with pytest.raises(RequestError, match="as many integers as the text has tokens"):
        typed.encode([torch.tensor([0, 1])], [torch.tensor([0])])
    with pytest.raises(RequestError, match="from 0 to 2; this model has 2 token types"):
        typed.encode([torch.tensor([0, 1])], [torch.tensor([0, 2])])
