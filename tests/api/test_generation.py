"""The generation loop, against a loop that recomputes everything for each token."""

import pytest
import tokenizers
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

import twinfer
from twinfer import Sampling, Stop, TwinferError
from twinfer.checkpoint import Tokenizer
from twinfer.reference.sampling import generator_for, next_token
from twinfer.text import StopWatch

same_fixture = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
ids = st.lists(st.integers(0, 257), min_size=1, max_size=8)
samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
    top_k=st.sampled_from([None, 20]),
    top_p=st.sampled_from([None, 0.9]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
)


def one_by_one(decoder, prompt, index, seed, sampling, limit, end_tokens):
    """The ids that a prompt must yield: each token from a fresh computation of all before it."""
    generator, new = generator_for(seed, index), []
    while len(new) < limit and not set(new) & set(end_tokens):
        sequences = decoder.open(1, len(prompt) + limit)
        logits_V = decoder.extend(sequences, [torch.tensor([*prompt, *new])])[0]
        new.append(next_token(logits_V, torch.tensor([*prompt, *new]), sampling, generator))
    return tuple(new)


@same_fixture
@given(
    prompts=st.lists(ids, min_size=1, max_size=3),
    sampling=samplings,
    seed=st.integers(0, 2**63 - 1),
    limit=st.integers(1, 6),
    ends=st.sets(st.integers(0, 257), max_size=120),
)
def test_a_prompt_yields_what_it_yields_alone(witness, prompts, sampling, seed, limit, ends):
    """Ids and stops do not depend on the batch, the cache, or when other rows end: only on prompt, index and seed."""
    how = {"max_new_tokens": limit, "sampling": sampling, "seed": seed, "end_tokens": ends}
    outputs = twinfer.generate(witness, prompts, **how).outputs()
    for index, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        assert output.ids == one_by_one(witness.inner, prompt, index, seed, sampling, limit, ends)
        assert output.prompt_ids == tuple(prompt)
        assert output.stop is (Stop.END if output.ids[-1] in ends else Stop.LENGTH)
        assert output.text is None


@same_fixture
@given(prompts=st.lists(ids, min_size=1, max_size=3), seed=st.integers(0, 99), limit=st.integers(1, 8))
def test_events_add_up_to_the_outputs(witness, tiny, prompts, seed, limit):
    """Streamed events, joined prompt by prompt, are the decoded whole; only the last of each carries its stop."""
    generation = twinfer.generate(
        witness,
        prompts,
        max_new_tokens=limit,
        sampling=Sampling(temperature=1.0),
        seed=seed,
        tokenizer=tiny.tokenizer,
        end_tokens=range(200, 256),
    )
    events = list(generation)
    for index, output in enumerate(generation.outputs()):
        mine = [event for event in events if event.prompt == index]
        assert tuple(event.token for event in mine) == output.ids
        assert [event.stop for event in mine] == [None] * (len(mine) - 1) + [output.stop]
        spoken = output.ids[: -1 if output.stop is Stop.END else None]
        assert "".join(event.text for event in mine) == output.text == tiny.tokenizer.decode(spoken)


@same_fixture
@given(prompts=st.lists(ids, min_size=2, max_size=3), seed=st.integers(0, 99))
def test_rows_that_stopped_are_given_nothing(witness, prompts, seed):
    """After its last event a row is extended by zero tokens, and no step runs once all rows have stopped."""
    witness.given.clear()
    outputs = twinfer.generate(
        witness,
        prompts,
        max_new_tokens=6,
        sampling=Sampling(temperature=1.0),
        seed=seed,
        end_tokens=range(0, 256, 2),
    ).outputs()
    assert len(witness.given) == max(len(output.ids) for output in outputs)
    for index, output in enumerate(outputs):
        fed = [step[index] for step in witness.given]
        newest = [[token] for token in output.ids[:-1]]
        assert fed == [list(output.prompt_ids), *newest] + [[]] * (len(fed) - len(output.ids))


def test_sequences_are_closed_at_the_end_and_when_abandoned(witness):
    """Nothing is opened before the first event is asked for; what was opened is closed exactly once."""
    generation = twinfer.generate(witness, [[1, 2]], max_new_tokens=3)
    assert witness.opened == 0
    next(generation)
    assert (witness.opened, witness.closed) == (1, 0)
    generation.close()
    assert witness.closed == 1
    with pytest.raises(TwinferError, match="abandoned"):
        generation.outputs()
    twinfer.generate(witness, [[1, 2]], max_new_tokens=3).outputs()
    assert (witness.opened, witness.closed) == (2, 2)


@pytest.mark.parametrize(
    ("prompts", "how", "says"),
    [
        ([], {}, "0 prompts"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1], [2, 258]], {}, "prompt 1 holds token id 258; ids run from 0 to 257"),
        ([[-1]], {}, "prompt 0 holds token id -1; ids run from 0 to 257"),
        (
            [[1] * 33],
            {"max_new_tokens": 8},
            "33 tokens, and 8 new ones would make 41; the model's context is 40: ask",
        ),
        ([[1] * 40], {"max_new_tokens": 1}, "the model's context is 40: shorten the prompt"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ([[1]] * 4, {}, "at most 3"),
        ("Hi!", {}, "prompts is the string 'Hi!'; it must be a sequence of prompts, such as [prompt]"),
        (b"Hi!", {}, "prompts is the string b'Hi!'; it must be a sequence of prompts"),
        (["Hi!"], {}, "prompt 0 is 'Hi!'; it must be token ids, a sequence of integers"),
        ([[1], b"Hi!"], {}, "prompt 1 is b'Hi!'; it must be token ids"),
        ([1, 2], {}, "prompt 0 is 1; it must be token ids"),
        ([[1, 2.5]], {}, "prompt 0 is [1, 2.5]; it must be token ids"),
        ([["1"]], {}, "prompt 0 is ['1']; it must be token ids"),
        ([[1]], {"stop": [1]}, "stop holds 1; it must hold strings"),
        ([[1]], {"stop": ["x"]}, "without a tokenizer"),
        ([[1]], {"stop": "x"}, "must be a sequence"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_opened(witness, prompts, how, says):
    with pytest.raises(TwinferError) as caught:
        twinfer.generate(witness, prompts, **{"max_new_tokens": 4, **how})
    assert says in str(caught.value)
    assert witness.opened == 0


def test_an_empty_stop_string_is_refused(witness, tiny):
    with pytest.raises(TwinferError, match="empty string"):
        twinfer.generate(witness, [[1]], max_new_tokens=4, stop=["a", ""], tokenizer=tiny.tokenizer)


def test_the_context_can_be_filled_to_the_last_token(witness):
    """A prompt and its new tokens may together hold exactly the context."""
    (output,) = twinfer.generate(witness, [[7] * 30], max_new_tokens=10).outputs()
    assert len(output.prompt_ids) + len(output.ids) == witness.config.context


class Pieces:
    """A stream whose token n is the n-th of some pieces of text."""

    def __init__(self, pieces):
        self.pieces = pieces

    def add(self, token):
        return self.pieces[token]

    def pending(self):
        return ""

    def finish(self):
        return ""


@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
)
@example(pieces=["abc", "d"], stops=["abcd", "bc"])
@example(pieces=["abcd"], stops=["abcd", "bc"])
def test_a_stop_string_cuts_the_text_wherever_tokens_end(pieces, stops):
    """The text ends before the stop string that is complete first, whatever pieces it comes in; else it is whole."""
    whole = "".join(pieces)
    ends = [end for end in range(len(whole) + 1) if any(whole[:end].endswith(stop) for stop in stops)]
    longest = max((len(stop) for stop in stops if ends and whole[: ends[0]].endswith(stop)), default=0)
    watch, seen, shown, stopped = StopWatch(Pieces(pieces), stops), "", "", False
    for token, piece in enumerate(pieces):
        text, stopped = watch.add(token)
        seen, shown = seen + piece, shown + text
        assert stopped == any(end <= len(seen) for end in ends)
        if stopped:
            break
        held = seen[len(shown) :]
        assert held == max((s[:n] for s in stops for n in range(len(s)) if seen.endswith(s[:n])), key=len, default="")
    assert shown + ("" if stopped else watch.rest()) == (whole[: ends[0] - longest] if ends else whole)


def test_a_stop_string_in_bytes_ends_the_text_at_its_own_token():
    """Byte-fallback tokens are held back from the text, as later ones may change them, but not from the watch."""
    inner = tokenizers.Tokenizer(models.WordLevel({"<0x0A>": 0, "<0x0B>": 1, "a": 2}, unk_token="a"))
    inner.decoder = decoders.ByteFallback()
    watch = StopWatch(Tokenizer(inner).stream(), ["\n\n"])
    assert [watch.add(token) for token in (2, 0, 1, 0)] == [("a", False), ("", False), ("", False), ("", False)]
    assert watch.add(0) == ("\n\x0b", True)


@same_fixture
@given(seed=st.integers(0, 10_000), where=st.integers(0, 8), size=st.integers(1, 3))
def test_stop_strings_end_a_row(witness, tiny, seed, where, size):
    """A row stopped at any piece of its own text holds the ids that spell it, and the text before it."""
    how = {"max_new_tokens": 12, "sampling": Sampling(temperature=1.0), "seed": seed, "tokenizer": tiny.tokenizer}
    (free,) = twinfer.generate(witness, [[5, 6]], **how).outputs()
    stop = free.text[where : where + size]
    assume(stop and "\N{REPLACEMENT CHARACTER}" not in stop)
    (cut,) = twinfer.generate(witness, [[5, 6]], stop=["never to be seen", stop], **how).outputs()
    spelled = next(n for n in range(len(free.ids) + 1) if stop in tiny.tokenizer.decode(free.ids[:n]))
    assert cut.ids == free.ids[:spelled]
    assert cut.stop is Stop.STOP
    assert cut.text == free.text.split(stop)[0]


@same_fixture
@given(prompts=st.lists(ids, min_size=1, max_size=3), seed=st.integers(0, 99))
def test_timings_count_tokens_of_the_whole_batch(witness, prompts, seed):
    """Prefill counts prompt tokens; decode counts new tokens without the first of each row, whenever rows end."""
    how = {"max_new_tokens": 5, "sampling": Sampling(temperature=1.0), "seed": seed, "end_tokens": range(0, 256, 3)}
    timings = (generation := twinfer.generate(witness, prompts, **how)).timings
    assert timings.prefill_tokens_per_s is timings.decode_tokens_per_s is None
    outputs = generation.outputs()
    assert timings.prefill_tokens == sum(map(len, prompts))
    assert timings.decode_tokens == sum(len(output.ids) - 1 for output in outputs)
    assert timings.decode_tokens_per_s == (timings.decode_tokens / timings.decode_s if timings.decode_tokens else None)
