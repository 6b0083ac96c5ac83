"""Logits processing against transformers' processors, and the draw against the distribution it claims."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from twinfer.reference.logits import keep_min_p, keep_top_k, keep_top_p, penalize_repetition, scale_temperature
from twinfer.reference.sampling import Sampling, draw, generator_for, next_token
from twinfer.spec.errors import NumericsError, RequestError


def logits_of(seed: int, vocabulary: int) -> Tensor:
    """Distinct logits: where some tie, transformers keeps an arbitrary one and we the lowest id."""
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(vocabulary, generator=generator, dtype=torch.float64)


def theirs(processor: LogitsProcessor, logits_V: Tensor, previous: list[int] | None = None) -> Tensor:
    return processor(torch.tensor([previous or [0]]), logits_V[None].clone())[0]


@given(
    seed=st.integers(0, 2**31),
    vocabulary=st.integers(2, 40) | st.just(1000),
    k=st.integers(1, 50),
    p=st.floats(0.01, 0.99),
    temperature=st.floats(0.1, 4),
    penalty=st.floats(0.5, 3),
    previous=st.lists(st.integers(0, 1), min_size=1, max_size=5),
)
def test_processors_are_transformers(
    seed: int, vocabulary: int, k: int, p: float, temperature: float, penalty: float, previous: list[int]
) -> None:
    logits_V = logits_of(seed, vocabulary)
    before = logits_V.clone()
    assert torch.equal(keep_top_k(logits_V, k), theirs(TopKLogitsWarper(k), logits_V))
    assert torch.equal(keep_top_p(logits_V, p), theirs(TopPLogitsWarper(p), logits_V))
    assert torch.equal(keep_min_p(logits_V, p), theirs(MinPLogitsWarper(p), logits_V))
    assert torch.equal(scale_temperature(logits_V, temperature), theirs(TemperatureLogitsWarper(temperature), logits_V))
    penalized_V = penalize_repetition(logits_V, torch.tensor(previous), penalty)
    assert torch.equal(penalized_V, theirs(RepetitionPenaltyLogitsProcessor(penalty), logits_V, previous))
    assert torch.equal(logits_V, before)


@given(values=st.lists(st.integers(0, 2), min_size=1, max_size=8), k=st.integers(1, 8), p=st.floats(0.05, 1))
def test_ties_go_to_the_lower_id(values: list[int], k: int, p: float) -> None:
    """Of equal logits, no filter keeps a higher id and drops a lower one."""
    logits_V = torch.tensor(values, dtype=torch.float64)
    for kept_V in (keep_top_k(logits_V, k).isfinite(), keep_top_p(logits_V, p).isfinite()):
        for value in set(values):
            kept_of_value = kept_V[logits_V == value].tolist()
            assert kept_of_value == sorted(kept_of_value, reverse=True)
    assert int(keep_top_k(logits_V, k).isfinite().sum()) == min(k, len(values))


def test_greedy_takes_the_lowest_of_equals() -> None:
    logits_V = torch.tensor([0.0, 2.0, 1.0, 2.0])
    assert next_token(logits_V, torch.tensor([1]), Sampling(), generator_for(0, 0)) == 1
    assert next_token(logits_V, torch.tensor([1]), Sampling(repetition_penalty=1.5), generator_for(0, 0)) == 3


def test_draws_follow_the_distribution() -> None:
    """Pearson's chi-square over 20 000 seeded draws, 5 degrees of freedom; 1 in a million fair samples exceeds 35.9."""
    probability_V = torch.tensor([0.4, 0.3, 0.0, 0.15, 0.1, 0.04, 0.01])
    generator = generator_for(seed=1, prompt_index=0)
    draws = torch.tensor([draw(probability_V, generator) for _ in range(20_000)])
    observed, expected = draws.bincount(minlength=7), 20_000 * probability_V
    assert observed[2] == 0
    possible = expected > 0
    assert float(((observed - expected)[possible] ** 2 / expected[possible]).sum()) < 35.9


def test_next_token_samples_what_the_filters_leave() -> None:
    logits_V = logits_of(3, 20)
    allowed = set(logits_V.topk(4).indices.tolist())
    generator = generator_for(7, 0)
    sampling = Sampling(temperature=3.0, top_k=4)
    drawn = {next_token(logits_V, torch.tensor([0]), sampling, generator) for _ in range(300)}
    assert drawn == allowed


def test_streams_differ_between_neighboring_seeds_and_prompts() -> None:
    streams = {
        tuple(torch.rand(4, generator=generator_for(seed, index)).tolist()) for seed in range(20) for index in range(20)
    }
    assert len(streams) == 400
    again = torch.rand(4, generator=generator_for(3, 5)).tolist()
    assert again == torch.rand(4, generator=generator_for(3, 5)).tolist()


@pytest.mark.parametrize(
    "field",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"temperature": 10**400},
        {"top_k": 2.5},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 1e-308},
        {"repetition_penalty": 1e308},
        {"repetition_penalty": 10**400},
        {"repetition_penalty": float("nan")},
    ],
)
def test_impossible_settings_are_refused(field: dict[str, float]) -> None:
    with pytest.raises(RequestError, match=f"^{next(iter(field))} is "):
        Sampling(**field)  # type: ignore[arg-type]


@pytest.mark.parametrize("logits", [[0.0, torch.nan], [torch.inf, 0.0], [-torch.inf, -torch.inf]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_no_model_means_are_refused(logits: list[float], temperature: float) -> None:
    with pytest.raises(NumericsError, match="it must be finite"):
        next_token(torch.tensor(logits), torch.tensor([0]), Sampling(temperature=temperature), generator_for(0, 0))


@given(
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    temperature=st.sampled_from([5e-324, 1e-320, 1e-39, 1e-300]),
    penalty=st.sampled_from([1.0, 0.01, 100.0]),
    scale=st.sampled_from([1.0, 1e4, 1e30]),
)
def test_no_temperature_is_too_small(
    seed: int, dtype: torch.dtype, temperature: float, penalty: float, scale: float
) -> None:
    """As the temperature goes to 0 the likeliest token is drawn, whatever the size of the logits and the penalty."""
    logits_V = (scale * logits_of(seed, 30)).clamp(-6e4 * scale, 6e4 * scale).to(dtype)
    assume(bool(logits_V.isfinite().all()))
    previous_T = torch.tensor([0, 1, 29])
    shaped_V = penalize_repetition(logits_V.double(), previous_T, penalty)
    likeliest = (shaped_V == shaped_V.max()).nonzero().flatten().tolist()
    cold = Sampling(temperature=temperature, repetition_penalty=penalty)
    assert next_token(logits_V, previous_T, cold, generator_for(seed, 0)) in likeliest
    greedy = Sampling(repetition_penalty=penalty)
    assert next_token(logits_V, previous_T, greedy, generator_for(seed, 0)) == likeliest[0]


@given(temperature=st.floats(0, exclude_min=True, allow_infinity=False), seed=st.integers(0, 2**31))
def test_every_token_drawn_exists(temperature: float, seed: int) -> None:
    """Whatever is accepted draws an id of the vocabulary, and none that was ruled out."""
    logits_V = logits_of(seed, 8).index_fill(0, torch.tensor([0, 7]), -torch.inf)
    sampling = Sampling(temperature=temperature, top_k=2**70)
    assert next_token(logits_V, torch.tensor([1]), sampling, generator_for(seed, 0)) in range(1, 7)


class _Highest:
    """A stand-in for torch.rand whose number rounds up to 1."""

    def __call__(self, *_size: object, **_how: object) -> Tensor:
        return torch.tensor(1.0, dtype=torch.float64)


def test_the_last_possible_token_is_the_last_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rounding lifts the threshold to the whole sum, the last token with a probability is drawn, never id V."""
    monkeypatch.setattr(torch, "rand", _Highest())
    assert draw(torch.tensor([0.5, 0.5, 0.0]), generator_for(0, 0)) == 1
    assert draw(torch.tensor([0.5, 0.5]), generator_for(0, 0)) == 1


@pytest.mark.parametrize("probabilities", [[0.5, torch.nan], [torch.inf, 0.0], [0.0, 0.0], [-1.0, 0.5]])
def test_what_is_no_distribution_is_not_drawn_from(probabilities: list[float]) -> None:
    with pytest.raises(NumericsError, match="their sum must be positive and finite"):
        draw(torch.tensor(probabilities), generator_for(0, 0))


def test_shaping_that_overflows_is_refused() -> None:
    """Logits are looked at after shaping too: float64 ones can leave its range."""
    with pytest.raises(NumericsError, match="the largest logit after shaping is inf"):
        next_token(
            torch.tensor([1e308, 0.0], dtype=torch.float64),
            torch.tensor([0]),
            Sampling(repetition_penalty=0.01),
            generator_for(0, 0),
        )


def test_a_ruled_out_token_is_no_error() -> None:
    assert next_token(
        torch.tensor([-torch.inf, 0.0]), torch.tensor([0]), Sampling(temperature=1.0), generator_for(0, 0)
    )


@given(seed=st.integers(0, 2**31))
def test_top_p_of_one_keeps_everything(seed: int) -> None:
    """Bit for bit, also in a vocabulary so large that its probabilities add up to more than 1 by rounding."""
    logits_V = logits_of(seed, 49152).float()
    assert torch.equal(keep_top_p(logits_V, 1.0), logits_V)
