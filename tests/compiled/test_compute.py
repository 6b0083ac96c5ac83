"""Every compute dtype, on the same stored weights: within the budget of the reference in that dtype."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twinfer.compiled.path import CompiledPath
from twinfer.compiled.precision import COMPUTES, accumulation_dtype
from twinfer.compiled.steps import decode_program, eager
from twinfer.compiled.weights import prepare
from twinfer.oracle.baseline import Baseline
from twinfer.oracle.case import RandomPicker
from twinfer.oracle.encodings import assert_encodings_agree, draw_texts
from twinfer.oracle.models import RandomSource, draw_encoder_config, draw_model_config
from twinfer.oracle.paths import assert_paths_agree
from twinfer.oracle.schedule import draw_schedule, generation
from twinfer.oracle.strategies import drawn
from twinfer.spec.config import Storage

from .test_compiled import others

CPU = torch.device("cpu")
OTHERS = [dtype for dtype in COMPUTES if dtype is not torch.float32]

decoder_cases = drawn(
    lambda pick: (
        config := draw_model_config(pick, context=40),
        draw_schedule(pick, config),
        pick.integer(0, 2**20),
        pick.choice(list(Storage)),
    )
)
encoder_cases = drawn(
    lambda pick: (
        config := draw_encoder_config(pick),
        draw_texts(pick, config),
        pick.integer(0, 2**20),
        pick.choice(list(Storage)),
    )
)


@pytest.mark.parametrize("compute", OTHERS, ids=str)
@given(case=decoder_cases)
@settings(max_examples=30)
def test_any_schedule_gives_what_the_reference_gives(compute: torch.dtype, case: tuple[Any, ...]) -> None:
    config, schedule, seed, storage = case
    source = RandomSource(config, seed)
    path = CompiledPath(source, storage=storage, compute=compute, mode="eager")
    assert_paths_agree(Baseline.of(source, storage=storage, compute=compute), path, schedule)


@pytest.mark.parametrize("compute", OTHERS, ids=str)
@given(case=encoder_cases)
@settings(max_examples=15)
def test_any_texts_give_what_the_reference_gives(compute: torch.dtype, case: tuple[Any, ...]) -> None:
    config, (texts, types), seed, storage = case
    source = RandomSource(config, seed)
    path = CompiledPath(source, storage=storage, compute=compute, mode="eager")
    assert_encodings_agree(Baseline.of(source, storage=storage, compute=compute), path, texts, types)


@pytest.mark.parametrize("compute", COMPUTES, ids=str)
@given(seed=st.integers(0, 2**20), storage=st.sampled_from(Storage))
@settings(max_examples=10)
def test_what_is_kept_has_the_compute_dtype_and_what_is_returned_the_accumulations(
    compute: torch.dtype, seed: int, storage: Storage
) -> None:
    """Caches are as wide as the arithmetic, after growing too; logits are float32 or wider."""
    config = draw_model_config(RandomPicker(seed), context=20)
    path = CompiledPath(RandomSource(config, seed), storage=storage, compute=compute, mode="eager")
    sequences = path.open(2, 2)
    for length in (2, 1, 5):
        token_T = torch.arange(length) % config.vocabulary
        logits_BV = path.extend(sequences, [token_T, token_T[:1]])
        every = path.extend(sequences, [token_T[:1], token_T[:2]], every_position=True)
        assert {each.dtype for cache in sequences.caches for each in cache} == {compute}
        assert {each.dtype for each in (logits_BV, *every)} == {accumulation_dtype(compute)}
    assert sequences.capacity > 2
    assert {each.dtype for each in path.encode([torch.arange(2)])} == {compute}


@pytest.mark.parametrize("compute", OTHERS, ids=str)
@torch.no_grad()
def test_no_layer_hands_on_another_dtype(compute: torch.dtype) -> None:
    """Hidden vectors between pieces are as wide as the arithmetic, whatever a layer does."""
    handed: list[torch.dtype] = []

    def watched(function: Any, dynamic: Any) -> Any:
        def piece(*arguments: Any) -> Any:
            handed.extend(arguments[0].dtype for _ in "x" if function.__name__ == "decode")
            return function(*arguments)

        return eager(piece, dynamic)

    for seed in range(12):
        config = draw_model_config(RandomPicker(seed), context=20)
        path = CompiledPath(RandomSource(config, seed), compute=compute, mode="eager")
        model, caches = path.model, path.open(2, 6).caches
        step_3R = torch.tensor([[0, 0], [2, 1], [0, 6]])
        decode_program(config, Storage.FLOAT32, watched, compute=compute)(model, caches, step_3R, torch.arange(4))
    assert set(handed) == {compute}


@pytest.mark.parametrize("compute", OTHERS, ids=str)
def test_compiled_it_gives_what_the_reference_gives_and_nothing_compiles_again(compute: torch.dtype) -> None:
    """Of one sequence, so that only two programs are compiled; captured steps among them, and guards kept."""
    config, storage = replace(others(), layers=others().layers[1:]), Storage.INT8
    source = RandomSource(config, 1)
    path = CompiledPath(source, storage=storage, compute=compute, mode="guarded")
    path.compile(batches=False)
    assert path._graphs is not None, "captured steps gave other bits"
    baseline = Baseline.of(source, storage=storage, compute=compute)
    with torch.compiler.set_stance("fail_on_recompile"):
        for length in (2, 3, 17, 40):
            prompt = tuple(token % config.vocabulary for token in range(5, 5 + length))
            assert_paths_agree(baseline, path, generation((prompt,), 6))


def test_a_model_says_what_it_was_prepared_for() -> None:
    config = draw_model_config(RandomPicker(3))
    for compute in COMPUTES:
        model = prepare(RandomSource(config), Storage.INT8, CPU, compute)
        assert (model.compute, model.storage, model.device) == (compute, Storage.INT8, CPU)
        assert CompiledPath.from_model(model, config, mode="eager").open(1, 2).last_BV.dtype == accumulation_dtype(
            compute
        )
