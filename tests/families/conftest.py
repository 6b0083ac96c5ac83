"""What every family's test does with a drawn model: transformers in float64, and both paths beside it."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from transformers import PreTrainedConfig, PreTrainedModel

from twinfer.checkpoint import Checkpoint, families, from_transformers, open_model
from twinfer.checkpoint.families import FAMILIES
from twinfer.checkpoint.family import Family
from twinfer.compiled.path import CompiledPath
from twinfer.converting import convert
from twinfer.oracle.baseline import Baseline
from twinfer.oracle.case import RandomPicker
from twinfer.oracle.encodings import Texts, assert_encodings_agree
from twinfer.oracle.paths import assert_paths_agree
from twinfer.oracle.schedule import draw_schedule
from twinfer.oracle.trial import same_bits
from twinfer.reference.path import ReferencePath
from twinfer.spec.config import ModelConfig, Storage
from twinfer.spec.weights import EmbeddingWeights, HeadWeights, LayerWeights, WeightSource, tensors

from ..shards import assert_shards_join

AGREEMENT = 1e-9
"""Largest relative difference of two float64 computations of one model.

Roundings of 1e-16 grow by the depth and the cancellation in norms and softmax, in models this small to below 1e-12. A
convention that is off shows at 1e-4 and more, a constant that was rounded to float32 on the way at 1e-7.
"""


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Drawn models are tiny: more than one thread only makes them wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Widened(TorchFunctionMode):
    """Has transformers compute in float64 where its code names a narrower dtype (rotary angles, norms, softmax)."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in (Tensor.float, Tensor.half, Tensor.bfloat16):
            return args[0].double()
        args, kwargs = pytree.tree_map(_wide, (args, kwargs or {}))
        return function(*args, **kwargs)


def _wide(value: Any) -> Any:
    narrow = isinstance(value, torch.dtype) and value in (torch.float32, torch.bfloat16, torch.float16)
    return torch.float64 if narrow else value


def assert_same_model(one: WeightSource, other: WeightSource) -> None:
    """Configs equal but for where the models came from, and weights equal bit by bit."""
    assert replace(one.config, family="") == replace(other.config, family="")
    parts = [(one.embedding(), other.embedding()), (one.head(), other.head())]
    parts += [(one.layer(index), other.layer(index)) for index in range(len(one.config.layers))]
    for pair in parts:
        named, twins = (dict(tensors(part)) for part in pair)
        assert named.keys() == twins.keys()
        assert all(same_bits(tensor, twins[name]) for name, tensor in named.items())


def furthest(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference of an element relative to the largest of its row; NaN where there is one anywhere."""
    assert [each.shape for each in ours] == [each.shape for each in theirs]
    rows = [(own - their).abs().amax(-1) / their.abs().amax(-1) for own, their in zip(ours, theirs, strict=True)]
    return float(torch.cat(rows).max())


@contextmanager
def widened() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Widened(), torch.no_grad():
            yield
    finally:
        torch.set_default_dtype(before)


@dataclass(frozen=True)
class Altered:
    """A source with some of its parts changed on the way: a mapping that is wrong."""

    source: WeightSource
    on_config: Callable[[ModelConfig], ModelConfig] = lambda config: config
    on_embedding: Callable[[EmbeddingWeights], EmbeddingWeights] = lambda weights: weights
    on_layer: Callable[[LayerWeights], LayerWeights] = lambda weights: weights
    on_head: Callable[[HeadWeights], HeadWeights] = lambda weights: weights

    @property
    def config(self) -> ModelConfig:
        return self.on_config(self.source.config)

    def embedding(self) -> EmbeddingWeights:
        return self.on_embedding(self.source.embedding())

    def layer(self, index: int) -> LayerWeights:
        return self.on_layer(self.source.layer(index))

    def head(self) -> HeadWeights:
        return self.on_head(self.source.head())


class Twins:
    """A transformers model with random weights, in float64, and the same model as our checkpoint room reads it."""

    def __init__(
        self, kind: type[PreTrainedModel], config: PreTrainedConfig, seed: int, lengths: tuple[int, ...] = (11, 1, 6)
    ) -> None:
        self.seed = seed
        with widened():
            self.theirs = kind(config).eval()
        self.theirs.set_attn_implementation("eager")  # the others know no cap of the scores
        if hasattr(self.theirs, "set_experts_implementation"):
            self.theirs.set_experts_implementation("eager")  # the grouped products know no float64
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():  # in float32, which is how the reference stores them, but kept in float64
            choice = [each for name, each in self.theirs.named_buffers() if name.endswith("e_score_correction_bias")]
            for parameter in [*self.theirs.parameters(), *choice]:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        with TemporaryDirectory() as folder:
            self.theirs.save_pretrained(folder)
            self.source: WeightSource = open_model(folder).source
            assert_same_model(self.source, from_transformers(self.theirs))
            assert_shards_join(self.source)
        vocabulary, context = self.source.config.vocabulary, self.source.config.context
        lengths = tuple(min(length, context) for length in lengths)
        self.prompts = [torch.randint(vocabulary, (length,), generator=generator) for length in lengths]

    def their_logits(self, *, cached: bool) -> list[Tensor]:
        """Of every prompt and position; with `cached`, over two calls and transformers' own cache."""
        with widened():
            whole = [self.theirs(token_T[None], use_cache=False).logits[0] for token_T in self.prompts]
            if not cached:
                return whole
            rows = []
            for token_T in self.prompts:
                cut = len(token_T) // 2
                if cut == 0:
                    rows.append(self.theirs(token_T[None], use_cache=True).logits[0])
                    continue
                first = self.theirs(token_T[None, :cut], use_cache=True)
                second = self.theirs(token_T[None, cut:], past_key_values=first.past_key_values, use_cache=True)
                rows.append(torch.cat([first.logits[0], second.logits[0]]))
            return rows

    def our_logits(self, source: WeightSource | None = None) -> list[Tensor]:
        """The reference in float64, the prompts together as a ragged batch, over two calls."""
        path = ReferencePath(source or self.source, compute=torch.float64)
        sequences = path.open(len(self.prompts), max(map(len, self.prompts)))
        cuts = [max(1, len(token_T) // 2) for token_T in self.prompts]
        pieces = [
            path.extend(sequences, new, every_position=True)
            for new in (
                [token_T[:cut] for token_T, cut in zip(self.prompts, cuts, strict=True)],
                [token_T[cut:] for token_T, cut in zip(self.prompts, cuts, strict=True)],
            )
        ]
        return [torch.cat(rows) for rows in zip(*pieces, strict=True)]

    def difference(self, source: WeightSource | None = None, *, cached: bool = False) -> float:
        """The largest difference of a logit, relative to the largest logit of its position."""
        return furthest(self.our_logits(source), self.their_logits(cached=cached))


class Encoders(Twins):
    """The same of encoders. Texts hold no token `without`, and types are drawn where the model has some."""

    def __init__(
        self, kind: type[PreTrainedModel], config: PreTrainedConfig, seed: int, *, without: int | None = None
    ) -> None:
        super().__init__(kind, config, seed)
        generator = torch.Generator().manual_seed(seed + 1)
        if without is not None:
            vocabulary = self.source.config.vocabulary
            others = torch.tensor([token for token in range(vocabulary) if token != without])
            self.prompts = [others[token_T % len(others)] for token_T in self.prompts]
        kinds = self.source.config.token_types
        drawn = [torch.randint(kinds, each.shape, generator=generator) if kinds else each * 0 for each in self.prompts]
        self.types: list[Tensor] | None = drawn if kinds else None
        self.filler = without or 0
        self.inner = getattr(self.theirs, "text_model", self.theirs.base_model)

    def their_hidden(self) -> list[Tensor]:
        """Each text alone."""
        types = self.types or [None] * len(self.prompts)
        with widened():
            return [
                self.inner(token_T[None], **({} if type_T is None else {"token_type_ids": type_T[None]}))
                .last_hidden_state[0]
                .clone()
                for token_T, type_T in zip(self.prompts, types, strict=True)
            ]

    def their_padded_hidden(self) -> list[Tensor]:
        """All texts as one batch, padded to the longest, with a mask that says where they are."""
        lengths = [len(each) for each in self.prompts]
        token_BT = torch.nn.utils.rnn.pad_sequence(self.prompts, batch_first=True, padding_value=self.filler)
        mask_BT = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        typed = {}
        if self.types is not None:
            typed["token_type_ids"] = torch.nn.utils.rnn.pad_sequence(self.types, batch_first=True)
        with widened():
            hidden_BTM = self.inner(token_BT, attention_mask=mask_BT, **typed).last_hidden_state
        return [each[:length] for each, length in zip(hidden_BTM, lengths, strict=True)]

    def our_hidden(self, source: WeightSource | None = None) -> list[Tensor]:
        """The reference in float64, all texts in one call."""
        return ReferencePath(source or self.source, compute=torch.float64).encode(self.prompts, self.types)

    def distance(self, source: WeightSource | None = None, *, padded: bool = False) -> float:
        """The largest difference of an element, relative to the largest of its vector."""
        theirs = self.their_padded_hidden() if padded else self.their_hidden()
        return furthest(self.our_hidden(source), theirs)

    def texts(self) -> tuple[Texts, Texts | None]:
        tokens = tuple(tuple(each.tolist()) for each in self.prompts)
        return tokens, None if self.types is None else tuple(tuple(each.tolist()) for each in self.types)


@dataclass(slots=True)
class Seen:
    """What was measured of a family."""

    models: int = 0
    worst: dict[bool, float] = field(default_factory=dict)
    """Largest relative difference from transformers, without its cache and with it."""
    compiled: float = 0.0
    """Largest error / bound of the compiled path."""
    caught: dict[str, float] = field(default_factory=dict)
    """Wrong mappings, and how far each was off."""


SEEN: dict[str, Seen] = {}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The families' table, under `pytest -v`."""
    if terminalreporter.config.get_verbosity() < 1 or not SEEN:
        return
    lines = {family.model_type: _lines(family) for family in FAMILIES}
    terminalreporter.section("families: relative difference from transformers, ragged batches; compiled error / bound")
    terminalreporter.line(f"{'family':16} models  whole    cached   compiled  lines of declaration")
    for name, seen in sorted(SEEN.items()):
        whole, cached = (f"{seen.worst[key]:.1e}" if key in seen.worst else "-      " for key in (False, True))
        terminalreporter.line(f"{name:16} {seen.models:6}  {whole}  {cached}  {seen.compiled:8.2f}  {lines.get(name)}")
    terminalreporter.section("families: wrong mappings that were seen, and by how much")
    for name, seen in sorted(SEEN.items()):
        caught = "; ".join(f"{what} {by:.1e}" for what, by in seen.caught.items())
        terminalreporter.line(f"{name:16} {caught}")


def _lines(family: Family) -> int:
    """Of the file in which the family is declared."""
    inside = (module for name, module in sys.modules.items() if name.startswith(f"{families.__name__}."))
    where = next(module for module in inside if any(each is family for each in vars(module).values()))
    return len(Path(str(where.__file__)).read_text().splitlines())


@pytest.fixture(scope="session")
def agrees() -> Callable[..., None]:
    """Asserts that transformers, with and without its cache, the reference, and the compiled path say the same."""

    def check(
        kind: type[PreTrainedModel],
        config: PreTrainedConfig,
        seed: int,
        *,
        lengths: tuple[int, ...] = (11, 1, 6),
        their_cache: bool = True,
    ) -> None:
        twins = Twins(kind, config, seed, lengths)
        seen = SEEN.setdefault(twins.source.config.family, Seen())
        seen.models += 1
        for cached in (False, True) if their_cache else (False,):
            difference = twins.difference(cached=cached)
            assert difference <= AGREEMENT, f"{'with' if cached else 'without'} cache: {difference:.2e}; {config}"
            seen.worst[cached] = max(seen.worst.get(cached, 0.0), difference)
        schedule = draw_schedule(RandomPicker(seed), twins.source.config)
        compared = assert_paths_agree(
            Baseline.of(twins.source), CompiledPath(twins.source, mode="eager", routes=True), schedule
        )
        seen.compiled = max(seen.compiled, compared.largest_ratio)

    return check


def _assert_seen(
    source: WeightSource, wrong: dict[str, dict[str, Any]], difference: Callable[[WeightSource], float]
) -> None:
    """At least two ways to be wrong, and each of them shows; being right does not, nor does being converted.

    What is changed is what the declaration made, config or weights, as a declaration that is wrong there would.
    """
    assert len(wrong) >= 2, "one wrong mapping says little of a family: try another"
    assert difference(source) <= AGREEMENT
    with TemporaryDirectory() as folder:
        about: dict[str, Any] = {"tokenizer": None, "end_tokens": (), "chat_template": None, "special_tokens": {}}
        checkpoint = Checkpoint(name="drawn", source=source, config=source.config, **about)
        convert(checkpoint, Path(folder) / "out", Storage.FLOAT32, lambda line: None)
        assert difference(open_model(f"{folder}/out").source) <= AGREEMENT
    for name, changes in wrong.items():
        by = difference(Altered(source, **changes))
        assert not by <= AGREEMENT, f"{name} is not seen: {by:.2e}"
        SEEN.setdefault(source.config.family, Seen()).caught[name] = by


@pytest.fixture(scope="session")
def catches() -> Callable[[type[PreTrainedModel], PreTrainedConfig, dict[str, dict[str, Any]]], None]:
    """Asserts that every wrong mapping of the given ones (keywords of `Altered`) is seen, and the right one is not."""

    def check(kind: type[PreTrainedModel], config: PreTrainedConfig, wrong: dict[str, dict[str, Any]]) -> None:
        twins = Twins(kind, config, seed=1)
        _assert_seen(twins.source, wrong, twins.difference)

    return check


@pytest.fixture(scope="session")
def encodes() -> Callable[..., None]:
    """Asserts that transformers, text by text and padded, the reference, and the compiled path encode to the same."""

    def check(kind: type[PreTrainedModel], config: PreTrainedConfig, seed: int, *, without: int | None = None) -> None:
        twins = Encoders(kind, config, seed, without=without)
        seen = SEEN.setdefault(twins.source.config.family, Seen())
        seen.models += 1
        for padded in (False, True):
            distance = twins.distance(padded=padded)
            assert distance <= AGREEMENT, f"{'padded' if padded else 'alone'}: {distance:.2e}; {config}"
            seen.worst[False] = max(seen.worst.get(False, 0.0), distance)
        path = CompiledPath(twins.source, mode="eager")
        compared = assert_encodings_agree(Baseline.of(twins.source), path, *twins.texts())
        seen.compiled = max(seen.compiled, compared.largest_ratio)

    return check


@pytest.fixture(scope="session")
def catches_encoding() -> Callable[..., None]:
    """As `catches`, of encoders."""

    def check(
        kind: type[PreTrainedModel],
        config: PreTrainedConfig,
        wrong: dict[str, dict[str, Any]],
        *,
        without: int | None = None,
    ) -> None:
        twins = Encoders(kind, config, 1, without=without)
        _assert_seen(twins.source, wrong, twins.distance)

    return check
