"""What Inductor fuses in a decode layer is what docs/deep-fusion.md says.

A small LLaMA with int8 weights gains one token on two threads. Its layer's C++ falls into loops, one after the other,
each run by all threads or by one; what a loop does shows in its bounds and its arithmetic.
"""

import re
from collections.abc import Callable, Iterator
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch._inductor.async_compile import AsyncCompile

from twinfer.bench.kernels import watched
from twinfer.compiled.packing import ROWS
from twinfer.compiled.path import CompiledPath
from twinfer.oracle.models import RandomSource
from twinfer.spec.config import (
    Activation,
    AttentionConfig,
    Head,
    LayerConfig,
    MlpConfig,
    ModelConfig,
    NormConfig,
    NormKind,
    RotaryConfig,
    RotaryLayout,
    Storage,
)

PAGE = Path(__file__).parents[2] / "docs" / "deep-fusion.md"
THREADS, LAYERS = 2, 3
HIDDEN, HEADS, KV_HEADS, HEAD_SIZE, MLP = 256, 6, 3, 64, 512
WORD, PARTS = 4, 4
"""Inputs in a word of int8, and as how many parts a matrix is read side by side."""
VALUE_PART = 16
"""As much of a value as one loop sums."""


class Step(NamedTuple):
    name: str
    over: str
    """What its loop is divided over among threads, or "-" where one thread runs it."""
    region: str
    """The paper's region, or "-" where that fuses it with nothing or has no such step."""


LAYER = [
    Step("norm", "-", "1"),
    Step("QKV product", "outputs", "1"),
    Step("rotary", "-", "-"),
    Step("cache writes", "-", "-"),
    Step("scores", "key positions", "2"),
    Step("exponentials", "-", "2"),
    Step("weighted sum of values", "key/value heads", "2"),
    Step("division by their sum", "-", "2"),
    Step("output product", "outputs", "-"),
    Step("residual and norm", "-", "3"),
    Step("gate and up product", "outputs", "3"),
    Step("activation", "-", "3"),
    Step("down product", "outputs", "-"),
    Step("residual", "-", "4"),
]

PRODUCTS = {
    ((HEADS + 2 * KV_HEADS) * HEAD_SIZE, HIDDEN): "QKV product",
    (HIDDEN, HEADS * HEAD_SIZE): "output product",
    (2 * MLP, HIDDEN): "gate and up product",
    (HIDDEN, MLP): "down product",
}
"""By outputs and inputs."""


class Loop(NamedTuple):
    shared: bool
    """Among threads."""
    source: str

    @property
    def bounds(self) -> list[int | None]:
        """From the outermost; None for the number of key positions, which alone varies."""
        found = re.findall(r"for\(int64_t x\d=.*?; x\d<static_cast<int64_t>\((.*?)\);", self.source)
        return [None if "ks" in bound else int(bound.rstrip("L")) for bound in found]

    def has(self, *patterns: str) -> bool:
        return all(re.search(pattern, self.source) for pattern in patterns)


def llama() -> ModelConfig:
    norm = NormConfig(kind=NormKind.RMS, epsilon=1e-5)
    rotary = RotaryConfig(layout=RotaryLayout.HALF_SPLIT, size=HEAD_SIZE)
    attention = AttentionConfig(
        heads=HEADS, kv_heads=KV_HEADS, head_size=HEAD_SIZE, scale=HEAD_SIZE**-0.5, rotary=rotary
    )
    layer = LayerConfig(
        norm=norm, attention=attention, mlp=MlpConfig(width=MLP, activation=Activation.SILU, gated=True)
    )
    return ModelConfig(
        family="llama",
        hidden=HIDDEN,
        vocabulary=96,
        context=256,
        layers=(layer,) * LAYERS,
        final_norm=norm,
        learned_positions=False,
        head=Head.UNTIED,
    )


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(threads)


@cache
def kernels_of_a_layer() -> list[str]:
    """Their sources: of kernels that a step calls once for each layer."""
    sources: list[str] = []
    load = AsyncCompile.cpp_pybinding

    def loading(compiler: AsyncCompile, argtypes: list[str], source_code: str) -> Callable[..., Any]:
        sources.append(source_code)
        loaded: Callable[..., Any] = load(compiler, argtypes, source_code)
        return loaded

    path = CompiledPath(RandomSource(llama(), seed=1), storage=Storage.INT8, captured=False)
    one_T, sequences = torch.arange(1), path.open(1, 8)
    with mock.patch.object(AsyncCompile, "cpp_pybinding", loading), watched() as kernels:
        path.extend(sequences, [one_T])
        kernels.forget()
        path.extend(sequences, [one_T])
    calls = [kernel.calls for kernel in kernels.each]
    assert set(calls) == {1, LAYERS}
    return [source for source, times in zip(sources, calls, strict=True) if times == LAYERS]


def loops(kernel: str) -> Iterator[Loop]:
    """One after the other; before threads start they have no mark but their indentation."""
    first, *rest = re.split(r"^ *#pragma omp (for|single)\b.*\n|^ {4}(?=\{\n)", kernel, flags=re.MULTILINE)
    assert "for(" not in first
    for mark, source in zip(rest[::2], rest[1::2], strict=True):
        if "for(" in source:
            yield Loop(mark == "for", source)


def named(loop: Loop) -> tuple[str | None, str]:
    """What the loop computes, None for a mere copy, and over what it is divided."""
    if not loop.shared:
        return of_one_thread(loop), "-"
    if loop.has(" >> "):  # words are unpacked
        names = [name for sizes, name in PRODUCTS.items() if loop.bounds == bounds_of_product(*sizes)]
        assert len(names) == 1, f"no product has the bounds {loop.bounds}"
        return names[0], "outputs"
    if loop.has("vec_reduce_all") and loop.bounds == [None, KV_HEADS, HEAD_SIZE]:
        return "scores", "key positions"
    if not loop.has("vec_reduce_all") and loop.bounds == [KV_HEADS, VALUE_PART, None]:
        return "weighted sum of values", "key/value heads"
    raise AssertionError(f"no step is known by this shared loop:\n{loop.source}")


def bounds_of_product(outputs: int, inputs: int) -> list[int]:
    return [outputs // ROWS // PARTS, ROWS, inputs // WORD]


def of_one_thread(loop: Loop) -> str | None:
    reduces, residual = loop.has("tmp_acc"), loop.has("in_ptr0", r"tmp0 \+ tmp")
    if loop.has(r"store\(\w+ \+ static_cast<int64_t>\([^;]*tmp"):  # to a place that is itself computed
        return "cache writes"
    if not reduces and not loop.has(r"tmp\d+ [-+*/] tmp|exp\("):
        return None
    if None in loop.bounds:
        return "exponentials" if loop.has(r"infinity|exp\(") else "division by their sum"
    if reduces or loop.has("sqrt"):
        return "residual and norm" if residual else "norm"
    if loop.has(r"exp\("):
        return "activation"
    if loop.has(" / "):
        return "division by their sum"
    if loop.has(r"tmp\d+ - tmp\d+"):
        return "rotary"
    if residual or loop.has("in_ptr0", r"tmp\d+ \+ tmp\d+"):
        return "residual"
    raise AssertionError(f"no step is known by this loop of one thread:\n{loop.source}")


def test_a_layer_is_one_kernel() -> None:
    assert len(kernels_of_a_layer()) == 1


def test_loops_of_a_layer_are_its_steps() -> None:
    """In order; steps that follow each other under one name are one."""
    (kernel,) = kernels_of_a_layer()
    found = [named(loop) for loop in loops(kernel)]
    steps = [step for step, _ in groupby(each for each in found if each[0] is not None)]
    assert steps == [(step.name, step.over) for step in LAYER]


def test_each_shared_loop_is_a_step_of_its_own() -> None:
    (kernel,) = kernels_of_a_layer()
    shared = [named(loop) for loop in loops(kernel) if loop.shared]
    assert shared == [(step.name, step.over) for step in LAYER if step.over != "-"]


@pytest.mark.parametrize("what", ["exp(", "sqrt", " / "])
def test_what_products_read_is_not_made_anew_for_each_output(what: str) -> None:
    """No norm, softmax or activation inside of a shared loop."""
    (kernel,) = kernels_of_a_layer()
    assert [what in loop.source for loop in loops(kernel) if loop.shared] == [False] * 6


def rows(header: str) -> list[list[str]]:
    """The page's table with this header."""
    lines = PAGE.read_text().splitlines()
    first = lines.index(header) + 2
    table = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    return table


def test_the_page_has_the_same_steps() -> None:
    found = rows("| step | divided over | region | what else is in it |")
    assert [Step(*cells[:3]) for cells in found] == LAYER


def test_the_page_counts_the_shared_loops() -> None:
    shared = [step for step in LAYER if step.over != "-"]
    assert f"{len(shared)} of its loops are divided among threads" in " ".join(PAGE.read_text().split())


def test_steps_go_through_the_papers_regions_in_order() -> None:
    """All four, and into none again once it is left."""
    header = "| region | ops, in order | tiled over | why its tiles need nothing of each other |"
    regions = [region for region, _ in groupby(step.region for step in LAYER if step.region != "-")]
    assert regions == [cells[0] for cells in rows(header)] == ["1", "2", "3", "4"]
