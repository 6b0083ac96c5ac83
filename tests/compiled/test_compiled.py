"""What compiling adds: the graphs give what the programs give, for any sizes, and nothing compiles twice.

One model keeps torch's guards, so that a graph that is special to a size would have to recompile; under
`fail_on_recompile` that is an error. The other is compiled as it is used, without guards. No more of them, since each
takes many seconds to compile.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twinfer.compiled.path import CompiledPath
from twinfer.oracle.baseline import Baseline
from twinfer.oracle.case import RandomPicker
from twinfer.oracle.models import RandomSource
from twinfer.oracle.paths import assert_paths_agree
from twinfer.oracle.schedule import draw_schedule
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
    Residual,
    RotaryConfig,
    RotaryLayout,
    Storage,
)

DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.cuda)] if torch.cuda.is_available() else [])]


def gpt2() -> ModelConfig:
    """Its layers differ in numbers alone, as with GPT-Neo's windows and GPT-2's scales by layer."""
    norm = NormConfig(kind=NormKind.LAYER, epsilon=1e-5)
    attention = AttentionConfig(heads=3, kv_heads=3, head_size=8, scale=8**-0.5, qkv_bias=True, output_bias=True)
    mlp = MlpConfig(width=40, activation=Activation.GELU_TANH, gated=False, bias=True)
    return ModelConfig(
        family="gpt2",
        hidden=24,
        vocabulary=50,
        context=64,
        layers=tuple(
            LayerConfig(norm=norm, attention=replace(attention, window=window, scale=scale), mlp=mlp)
            for window, scale in ((5, 0.5), (None, 0.5), (5, 0.5), (None, 0.25))
        ),
        final_norm=norm,
        learned_positions=True,
        head=Head.TIED,
    )


def others() -> ModelConfig:
    """Layers of two kinds, so two pieces, with conventions that GPT-2 has not; sizes that no packing divides."""
    norm = NormConfig(kind=NormKind.LAYER, epsilon=1e-5, bias=False, gain_from_one=True)
    head_norm = NormConfig(kind=NormKind.RMS, epsilon=1e-6)
    interleaved = RotaryConfig(layout=RotaryLayout.INTERLEAVED, size=4, attention_factor=1.25)
    plain = AttentionConfig(heads=4, kv_heads=2, head_size=10, scale=0.3)
    mlp = MlpConfig(width=37, activation=Activation.SILU, gated=True)
    layers = (
        (replace(plain, alibi=True, qkv_clip=1.0), NormPlacement.PRE_NORM, Residual.PARALLEL_SHARED_NORM),
        (
            replace(plain, softcap=2.0, window=5, rotary=interleaved, qk_norm=head_norm, qkv_bias=True),
            NormPlacement.SANDWICH_NORM,
            Residual.SEQUENTIAL,
        ),
    )
    return ModelConfig(
        family="others",
        hidden=30,
        vocabulary=53,
        context=64,
        layers=tuple(
            LayerConfig(norm=norm, attention=attention, mlp=mlp, norm_placement=placement, residual=residual)
            for attention, placement, residual in layers
        ),
        final_norm=norm,
        learned_positions=False,
        head=Head.TIED,
        embedding_size=10,
        embedding_scale=3.0,
        embedding_norm=norm,
        token_types=2,
        head_bias=True,
        logit_scale=0.5,
        logit_softcap=4.0,
    )


POOL = [(others(), Storage.INT8), (gpt2(), Storage.BFLOAT16)]
GUARDED = 0


@cache
def twins(which: int, device: str) -> tuple[CompiledPath, Baseline]:
    config, storage = POOL[which]
    source = RandomSource(config, seed=which)
    path = CompiledPath(source, storage=storage, device=device, mode="guarded" if which == GUARDED else "compiled")
    path.compile()
    return path, Baseline.of(source, storage=storage, device=device)


@pytest.fixture(autouse=True)
def surroundings() -> Iterator[None]:
    """The caller's settings, put back."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("which", range(len(POOL)))
def test_any_schedule_runs_without_compiling_again(which: int, device: str) -> None:
    """Any batch, length, capacity and growth; and it agrees with the reference."""
    path, baseline = twins(which, device)

    @settings(max_examples=20)
    @given(seed=st.integers(0, 2**31))
    def run(seed: int) -> None:
        schedule = draw_schedule(RandomPicker(seed), path.config, max_piece=20)
        with torch.compiler.set_stance("fail_on_recompile"):
            assert_paths_agree(baseline, path, schedule)

    run()


def test_the_callers_settings_neither_matter_nor_change() -> None:
    """Threads, default dtype, gradients, inference mode, autocast: whatever they are, same bits and no recompile."""
    path, _ = twins(0, "cpu")
    token_T = torch.arange(9)

    def logits() -> list[float]:
        sequences = path.open(2, 3)
        path.extend(sequences, [token_T, token_T[:1]])
        values: list[float] = path.extend(sequences, [token_T[:1], token_T[:1]]).flatten().tolist()
        return values

    with torch.compiler.set_stance("fail_on_recompile"):
        plain = logits()
        torch.set_num_threads(torch.get_num_threads() + 1)
        torch.set_default_dtype(torch.float64)
        threads = torch.get_num_threads()
        assert logits() == plain
        assert torch.get_num_threads() == threads
        assert torch.get_default_dtype() is torch.float64
        with torch.inference_mode():
            assert logits() == plain
        with torch.no_grad():
            assert logits() == plain
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert logits() == plain
            assert torch.is_autocast_enabled("cpu")
        assert torch.is_grad_enabled()


def test_tokens_may_be_int32() -> None:
    """The graphs read 64-bit ones, so that what they are given must be converted."""
    path, _ = twins(0, "cpu")
    with torch.compiler.set_stance("fail_on_recompile"):
        for length in (1, 4):
            token_T = torch.arange(length)
            wide, narrow = (path.extend(path.open(1, 8), [each]) for each in (token_T, token_T.int()))
            assert torch.equal(wide, narrow)


def test_a_later_start_finds_the_programs() -> None:
    """A second path like the first compiles nothing and gives the same bits."""
    config, storage = POOL[1]
    compiled, _ = twins(1, "cpu")
    told: list[str] = []
    later = CompiledPath(RandomSource(config, seed=1), storage=storage, report=told.append)
    later.compile()
    assert told == []
    one, token_T = torch.arange(1), torch.arange(12)
    for batch, length in ((1, 2), (3, 5), (2, 12), (4, 1)):
        held = [path.open(batch, 4) for path in (compiled, later)]
        for new in ([token_T[:length]] * batch, [one] * batch, [one] + [one[:0]] * (batch - 1)):
            right, got = (path.extend(sequences, new) for path, sequences in zip((compiled, later), held, strict=True))
            assert torch.equal(got, right)


def test_what_is_compiled_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_or_compile(program: Callable[..., Any], *_: object) -> Callable[..., Any]:
        on_compile = _[-1]
        assert callable(on_compile)
        on_compile("why")
        return program

    monkeypatch.setattr("twinfer.compiled.programs.load_or_compile", load_or_compile)
    told: list[str] = []
    path = CompiledPath(RandomSource(gpt2(), seed=1), report=told.append)
    with torch.compiler.set_stance("force_eager"):  # what is compiled does not matter here
        path.compile(batches=False)
        path.compile(batches=False)
        assert told == ["compiling prefill (why)", "compiling decode (why)"]
        path.compile()
    assert told[2:] == ["compiling decode rows (why)", "compiling decode many (why)"]
