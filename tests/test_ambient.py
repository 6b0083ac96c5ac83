"""What torch is set to where a path is called changes no bit of what it computes, and is as it was afterwards."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import twinfer
from twinfer.compiled.path import CompiledPath
from twinfer.oracle.case import RandomPicker
from twinfer.oracle.models import RandomSource, draw_encoder_config, draw_model_config
from twinfer.reference.path import COMPUTE_DTYPES, ReferencePath
from twinfer.reference.sampling import Sampling
from twinfer.spec.ambient import CPU, pinned
from twinfer.spec.weights import tensors


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


AMBIENT: dict[str, Callable[[], Any]] = {
    "autocast to bfloat16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "default float64": lambda: default_dtype(torch.float64),
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "with meta": lambda: torch.device("meta"),
    "default meta": lambda: default_device("meta"),
}


@contextlib.contextmanager
def within(names: tuple[str, ...]) -> Iterator[None]:
    """These settings; and at the end they must still hold."""
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(AMBIENT[name]())
        before = settings()
        yield
        assert settings() == before


def settings() -> tuple[Any, ...]:
    return (
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.get_num_threads(),
    )


def bits(values: list[Tensor]) -> list[Any]:
    return [(each.dtype, each.contiguous().view(torch.int16).flatten().tolist()) for each in values]


ambient = st.lists(st.sampled_from(sorted(AMBIENT)), min_size=1, max_size=3, unique=True).map(tuple)
paths = st.sampled_from([*COMPUTE_DTYPES, None])


def opened(compute: torch.dtype | None, source: RandomSource) -> ReferencePath | CompiledPath:
    """The reference in some arithmetic, or the compiled path's programs run eagerly."""
    return CompiledPath(source, mode="eager") if compute is None else ReferencePath(source, compute=compute)


def extended(path: ReferencePath | CompiledPath) -> list[Tensor]:
    """Every way to a vector: prompts, decode steps of one row and several, all positions, whole texts."""
    long_T, one_T, none_T = (torch.tensor(ids, dtype=torch.int64, device="cpu") for ids in ([0, 1, 0, 1, 1], [1], []))
    sequences = path.open(2, 6)
    results = [path.extend(sequences, [long_T, one_T])]
    results += [path.extend(sequences, [one_T, one_T]), path.extend(sequences, [none_T, one_T])]
    results += path.extend(sequences, [long_T, one_T], every_position=True)
    return [*results, *path.encode([long_T, one_T])]


class Reread(RandomSource):
    """Draws its weights where nothing is set: what is tested is the path, not the drawing."""

    def _tensor(self, part: str, name: str, shape: tuple[int, ...]) -> Tensor:
        with pinned(CPU):
            return super()._tensor(part, name, shape)


@given(seed=st.integers(0, 2**20), compute=paths, loading=ambient, running=ambient)
def test_settings_change_no_bit_of_a_decoder(
    seed: int, compute: torch.dtype | None, loading: tuple[str, ...], running: tuple[str, ...]
) -> None:
    """Whatever is set when the weights are read, and whatever else when sequences are extended or texts encoded."""
    source = Reread(draw_model_config(RandomPicker(seed)), seed)
    right = bits(extended(opened(compute, source)))
    with within(loading):
        path = opened(compute, source)
    with within(running):
        got = extended(path)
    assert bits(got) == right
    assert not any(each.is_inference() or each.is_meta for each in got)


@given(seed=st.integers(0, 2**20), compute=paths, loading=ambient, running=ambient)
def test_settings_change_no_bit_of_an_encoder(
    seed: int, compute: torch.dtype | None, loading: tuple[str, ...], running: tuple[str, ...]
) -> None:
    source = Reread(draw_encoder_config(RandomPicker(seed)), seed)
    texts = [torch.tensor(ids) for ids in ([0, 1, 1], [1])]
    right = bits(opened(compute, source).encode(texts))
    with within(loading):
        path = opened(compute, source)
    with within(running):
        assert bits(path.encode(texts)) == right


@pytest.mark.parametrize("name", AMBIENT)
@pytest.mark.parametrize("kind", ["live", "folder"])
def test_settings_change_nothing_from_files_to_tokens(kind: str, name: str, tmp_path: Path) -> None:
    """A model opened, loaded, asked for tokens (drawn ones, too) and vectors within the setting, and without it."""
    sizes = {"vocab_size": 30, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2}
    scaled = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
    torch.manual_seed(0)
    config = hf.LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=32, rope_scaling=scaled)
    module = hf.LlamaForCausalLM(config).eval()
    if kind == "folder":
        module.save_pretrained(tmp_path)

    def everything() -> tuple[Any, ...]:
        model = twinfer.load(twinfer.from_transformers(module) if kind == "live" else str(tmp_path), path="reference")
        drawn = model.generate([[1, 2, 3], [4]], max_new_tokens=6, sampling=Sampling(temperature=1.0, top_p=0.9))
        vectors_NM = model.embed([[1, 2, 3], [4]], pooling="mean", normalize=True)
        return [each.ids for each in drawn.outputs()], bits([vectors_NM])

    right = everything()
    with within((name,)):
        assert everything() == right


@pytest.mark.parametrize("name", AMBIENT)
def test_what_a_source_hands_out_is_the_same(name: str) -> None:
    """What is made for a model, such as rotary frequencies and slopes, lies on the CPU in its own dtype."""
    llama = hf.LlamaConfig(
        vocab_size=30, hidden_size=12, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2
    )
    mpt = hf.MptConfig(vocab_size=30, d_model=12, n_heads=2, n_layers=1, max_seq_len=16)
    for module in (hf.LlamaForCausalLM(llama), hf.MptForCausalLM(mpt)):
        right = twinfer.from_transformers(module)
        with within((name,)):
            source = twinfer.from_transformers(module)
            parts = [source.embedding(), source.layer(0), source.head()]
        for got, wanted in zip(parts, [right.embedding(), right.layer(0), right.head()], strict=True):
            for (which, one), (_, other) in zip(tensors(got), tensors(wanted), strict=True):
                assert (which, bits([one])) == (which, bits([other]))


def test_two_threads_keep_the_default_dtype_between_them() -> None:
    """It is one for the whole process: the call that ends first must not take it from the other."""
    inside, leave = threading.Event(), threading.Event()
    seen: list[torch.dtype] = []

    def second() -> None:
        with pinned(CPU):
            inside.set()
            assert leave.wait(30)
            seen.append(torch.get_default_dtype())

    with default_dtype(torch.float64):
        thread = threading.Thread(target=second)
        with pinned(CPU):
            thread.start()
            assert inside.wait(30)
        leave.set()
        thread.join()
        assert seen == [torch.float32]
        assert torch.get_default_dtype() is torch.float64
