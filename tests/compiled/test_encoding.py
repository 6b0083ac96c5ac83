"""Encoding on the compiled path: its program run eagerly over many drawn models, and compiled for one."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from twinfer.compiled import attention
from twinfer.compiled import path as path_module
from twinfer.compiled.path import CompiledPath
from twinfer.compiled.programs import Program
from twinfer.oracle.baseline import Baseline
from twinfer.oracle.case import Picker, RandomPicker
from twinfer.oracle.encodings import assert_encodings_agree, compare_encodings, draw_texts
from twinfer.oracle.models import RandomSource, draw_encoder_config, draw_model_config
from twinfer.oracle.strategies import drawn
from twinfer.spec.config import (
    Activation,
    AttentionConfig,
    Head,
    LayerConfig,
    MlpConfig,
    ModelConfig,
    NormConfig,
    NormKind,
    NormPlacement,
    RotaryConfig,
    RotaryLayout,
    Storage,
)
from twinfer.spec.errors import RequestError

seeds = st.integers(0, 2**20)
THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors here are tiny: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draw_config(pick: Picker) -> ModelConfig:
    """Encoders that see later tokens, encoders that do not (CLIP), and decoders."""
    match pick.choice(["encoder", "causal", "decoder"]):
        case "encoder":
            return draw_encoder_config(pick)
        case "causal":
            return replace(draw_model_config(pick), head=Head.NONE, head_bias=False)
    return draw_model_config(pick)


cases = drawn(
    lambda pick: (
        config := draw_config(pick),
        draw_texts(pick, config),
        pick.integer(0, 2**20),
        pick.choice(list(Storage)),
        pick.choice([512, 4, 1]),
        pick.choice([128, 1, 2, 5]),
        pick.choice([1, 4, 256]),
    )
)


@given(case=cases)
def test_any_texts_give_what_the_reference_gives(case: tuple[Any, ...]) -> None:
    """On the same stored weights, within the budget; many texts at once and few, in large blocks and small."""
    config, (texts, types), seed, storage, together, block, product_rows = case
    source = RandomSource(config, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(path_module, "_ENCODE_TOKENS", together)
        patch.setattr(attention, "_BLOCK", block)
        patch.setattr(attention, "_PRODUCT_ROWS", product_rows)
        path = CompiledPath(source, storage=storage, mode="eager")
        assert_encodings_agree(Baseline.of(source, storage=storage), path, texts, types)


@given(seed=seeds)
def test_what_stands_in_other_texts_does_not_matter(seed: int) -> None:
    """Bit by bit, as long as their lengths stay; and the tokens handed over are untouched."""
    config = draw_encoder_config(RandomPicker(seed))
    path = CompiledPath(RandomSource(config, seed), mode="eager")
    generator = torch.Generator().manual_seed(seed)
    first, second, third = (torch.randint(config.vocabulary, (n,), generator=generator) for n in (4, 3, 3))
    copy = first.clone()
    one, other = path.encode([first, second])[0], path.encode([first, third])[0]
    assert torch.equal(one, other)
    assert torch.equal(first, copy)


def test_hidden_vectors_belong_to_the_caller() -> None:
    path = CompiledPath(RandomSource(bert()), mode="eager")
    token_T = torch.arange(5)
    first = path.encode([token_T, token_T[:1]])
    copies = [each.clone() for each in first]
    for each in path.encode([token_T, token_T[:1]]):
        each.fill_(7.0)
    assert all(torch.equal(each, copy) for each, copy in zip(first, copies, strict=True))
    assert all(torch.equal(each, copy) for each, copy in zip(path.encode([token_T, token_T[:1]]), copies, strict=True))


def test_no_texts_are_no_vectors() -> None:
    assert CompiledPath(RandomSource(bert()), mode="eager").encode([]) == []


def test_what_an_encoder_cannot_do_is_refused() -> None:
    path, one = CompiledPath(RandomSource(bert()), mode="eager"), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(RequestError, match="encode whole texts instead"):
        path.open(1, 4)
    with pytest.raises(RequestError, match="give it at least one"):
        path.encode([one[:0]])
    with pytest.raises(RequestError, match="the model's context is 64"):
        path.encode([one.expand(65)])
    with pytest.raises(RequestError, match="2 token types"):
        path.encode([one], [one + 2])


@pytest.mark.parametrize("causal", [True, False])
def test_memory_grows_with_the_texts_not_with_their_square(causal: bool) -> None:
    """No tensor of attention is larger than a block of queries over one text, nor than what all tokens have."""
    heads, size, tokens = 2, 4, 3000
    shapes, largest = ((heads, tokens, 1, size), (heads, tokens, size), (heads, tokens, size)), 0

    class Watching(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    for cu_seqlens, longest in ((torch.tensor([0, tokens]), tokens), (torch.arange(0, tokens + 1, 3), 3)):
        with Watching():
            attention._attend_varlen._init_fn(*map(torch.zeros, shapes), cu_seqlens, causal, None, 1.0, 2.0, None, None)
        assert largest <= max(tokens * heads * size, heads * attention._BLOCK * longest)
        largest = 0


Arguments = tuple[Any, Tensor, Tensor | None, Tensor, Tensor]


def seeing_each_other(given: Arguments) -> Arguments:
    *others, cu_seqlens = given
    return *others, cu_seqlens[[0, -1]]  # type: ignore[return-value]


def bounds_one_late(given: Arguments) -> Arguments:
    *others, cu_seqlens = given
    late_N = torch.cat([cu_seqlens[:1], (cu_seqlens[1:-1] + 1).clamp_max(cu_seqlens[-1]), cu_seqlens[-1:]])
    return *others, late_N  # type: ignore[return-value]


def positions_going_on(given: Arguments) -> Arguments:
    model, token_T, type_T, position_T, cu_seqlens = given
    return model, token_T, type_T, torch.arange(len(position_T)), cu_seqlens


def types_ignored(given: Arguments) -> Arguments:
    model, token_T, type_T, position_T, cu_seqlens = given
    return model, token_T, None if type_T is None else torch.zeros_like(type_T), position_T, cu_seqlens


FAULTS = (seeing_each_other, bounds_one_late, positions_going_on, types_ignored)


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.__name__ for fault in FAULTS])
def test_no_fault_of_the_path_is_missed(fault: Callable[[Arguments], Arguments]) -> None:
    """Within 30 drawn models and texts."""
    for seed in range(30):
        pick = RandomPicker(seed)
        config = draw_encoder_config(pick)
        source, (texts, types) = RandomSource(config, seed), draw_texts(pick, config)
        path = CompiledPath(source, mode="eager")
        correct = path._programs[Program.ENCODE]
        path._programs[Program.ENCODE] = lambda *given, correct=correct: correct(*fault(given))
        if not compare_encodings(Baseline.of(source), path, texts, types).holds:
            return
    pytest.fail(f"{fault.__name__}: passed 30 draws")


def bert() -> ModelConfig:
    """And more than BERT has: shared keys, a window, capped scores, rotation."""
    norm = NormConfig(kind=NormKind.LAYER, epsilon=1e-5)
    attention = AttentionConfig(
        heads=4,
        kv_heads=2,
        head_size=10,
        scale=0.3,
        causal=False,
        window=9,
        softcap=2.0,
        rotary=RotaryConfig(layout=RotaryLayout.HALF_SPLIT, size=4),
        qkv_bias=True,
        output_bias=True,
    )
    mlp = MlpConfig(width=37, activation=Activation.GELU, gated=False, bias=True)
    layer = LayerConfig(norm=norm, attention=attention, mlp=mlp, norm_placement=NormPlacement.POST_NORM)
    return ModelConfig(
        family="bert",
        hidden=30,
        vocabulary=53,
        context=64,
        layers=(layer, layer),
        final_norm=None,
        learned_positions=True,
        head=Head.NONE,
        embedding_norm=norm,
        token_types=2,
    )


def parallel(source: RandomSource, **options: Any) -> CompiledPath:
    """A path that keeps to all threads, whoever calls it."""
    torch.set_num_threads(THREADS)
    path = CompiledPath(source, storage=Storage.BFLOAT16, **options)
    path.compile()
    torch.set_num_threads(1)
    return path


@cache
def compiled() -> tuple[CompiledPath, Baseline]:
    source = RandomSource(bert())
    path = parallel(source, mode="guarded")
    return path, Baseline.of(source, storage=Storage.BFLOAT16)


def test_any_texts_run_without_compiling_again() -> None:
    """Any number and lengths, and it agrees with the reference; torch's guards are kept, so that it would show."""
    path, baseline = compiled()
    texts = [draw_texts(RandomPicker(seed), path.config, longest=30) for seed in range(10)]
    few = [((1,),), ((1, 2),), ((1,), (2,))]
    more_than_one_run_takes = (*[tuple(range(50))] * 10, *[(token,) for token in range(20)])
    assert sum(map(len, more_than_one_run_takes)) > path_module._ENCODE_TOKENS
    with torch.compiler.set_stance("fail_on_recompile"):
        for each, types in [*texts, *((each, None) for each in (*few, more_than_one_run_takes))]:
            assert_encodings_agree(baseline, path, each, types)


def test_a_later_start_finds_the_program() -> None:
    """A second path like the first compiles nothing, and without guards gives the same bits as with them."""
    guarded, _ = compiled()
    told: list[str] = []
    for _ in range(2):
        told.clear()
        later = parallel(RandomSource(bert()), report=told.append)
    assert told == []
    for lengths in ((1,), (2,), (64,), (1, 1), (5, 1, 40)):
        tokens = [torch.arange(length) % 53 for length in lengths]
        types = [each % 2 for each in tokens]
        for one, other in zip(later.encode(tokens, types), guarded.encode(tokens, types), strict=True):
            assert torch.equal(one, other)
