"""The path's algorithm, its programs run eagerly, over many drawn models and schedules."""

import functools
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from twinfer.compiled import attention, steps
from twinfer.compiled import path as path_module
from twinfer.compiled.path import CompiledPath
from twinfer.compiled.sequences import StaticSequences
from twinfer.oracle.baseline import Baseline
from twinfer.oracle.models import RandomSource, draw_model_config
from twinfer.oracle.paths import assert_paths_agree
from twinfer.oracle.schedule import draw_schedule
from twinfer.oracle.strategies import drawn
from twinfer.spec.config import Head, ModelConfig, Storage
from twinfer.spec.errors import MachineError, RequestError, TwinferError
from twinfer.spec.shapes import is_buffer
from twinfer.spec.weights import tensors

CONTEXT = 40
configs = drawn(lambda pick: draw_model_config(pick, context=CONTEXT))
seeds = st.integers(0, 2**20)
storages = st.sampled_from(Storage)


def eager(config: ModelConfig, seed: int, storage: Storage = Storage.FLOAT32) -> CompiledPath:
    return CompiledPath(RandomSource(config, seed), storage=storage, mode="eager")


def tokens(config: ModelConfig, seed: int, length: int) -> Tensor:
    return torch.randint(config.vocabulary, (length,), generator=torch.Generator().manual_seed(seed))


def bits(tensor: Tensor) -> list[int]:
    values: list[int] = tensor.contiguous().view(torch.int32).flatten().tolist()
    return values


cases = drawn(
    lambda pick: (
        config := draw_model_config(pick, context=CONTEXT),
        draw_schedule(pick, config),
        pick.integer(0, 2**20),
        pick.choice(list(Storage)),
        pick.choice([2, 3, 512]),
        pick.choice([1, 2, 128]),
        pick.choice([1, 4, 256]),
    )
)


@given(case=cases)
def test_any_schedule_gives_what_the_reference_gives(case: tuple[Any, ...]) -> None:
    """On the same stored weights, within the budget; prompts in small pieces and blocks, some of them by products."""
    config, schedule, seed, storage, piece, block, product_rows = case
    source = RandomSource(config, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(path_module, "_PREFILL_TOKENS", piece)
        patch.setattr(attention, "_BLOCK", block)
        patch.setattr(attention, "_PRODUCT_ROWS", product_rows)
        path = CompiledPath(source, storage=storage, mode="eager")
        assert_paths_agree(Baseline.of(source, storage=storage), path, schedule)


class Largest(TorchDispatchMode):
    """Notes the most elements of any tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@given(config=configs.filter(lambda config: not config.learned_positions), seed=seeds, first=st.sampled_from([1, 5]))
def test_a_long_context_costs_nothing_until_it_is_used(config: ModelConfig, seed: int, first: int) -> None:
    """Of 2**28 tokens: bit by bit what the short context gives, without a table of the context's size."""
    given_tokens = tokens(config, seed, 12)
    with pytest.MonkeyPatch.context() as patch, Largest() as largest:
        patch.setattr(path_module, "_FIRST_SLOTS", first)  # so that it grows on the way
        found = [
            (path := eager(replace(config, context=context), seed)).extend(
                path.open(1, 4), [given_tokens], every_position=True
            )[0]
            for context in (CONTEXT, 2**28)
        ]
    assert bits(found[0]) == bits(found[1])
    assert largest.elements < 2**20


@given(config=configs, seed=seeds, storage=storages, lengths=st.lists(st.integers(1, 9), min_size=2, max_size=4))
def test_a_row_of_a_batch_is_the_row_alone(
    config: ModelConfig, seed: int, storage: Storage, lengths: list[int]
) -> None:
    """Bit by bit while every sequence gains several tokens, for then each runs alone."""
    path = eager(config, seed, storage)
    lengths = [length + 1 for length in lengths]
    given_tokens = [tokens(config, seed + index, length) for index, length in enumerate(lengths)]
    together = path.extend(path.open(len(lengths), 5), given_tokens)
    for row_V, each in zip(together, given_tokens, strict=True):
        assert bits(row_V) == bits(path.extend(path.open(1, 9), [each])[0])


@given(config=configs, seed=seeds, storage=storages, poison=st.sampled_from([torch.nan, torch.inf, 3e38, 1.0]))
def test_what_unused_slots_hold_does_not_matter(
    config: ModelConfig, seed: int, storage: Storage, poison: float
) -> None:
    """Ragged sequences, so that the shorter ones have unused slots below the length of the longest."""
    path = eager(config, seed, storage)
    clean, poisoned = path.open(3, 20), path.open(3, 20)
    for cache in poisoned.caches:
        cache.key_CKD.fill_(poison)
        cache.value_CKD.fill_(-poison)
    one = torch.zeros(1, dtype=torch.int64)
    for step in ([2, 9, 1], [1, 1, 1], [1, 0, 1], [0, 3, 1]):
        new = [tokens(config, seed + length, length) if length > 1 else one[:length] for length in step]
        assert bits(path.extend(clean, new)) == bits(path.extend(poisoned, new))


@given(config=configs, seed=seeds, storage=storages)
def test_a_sequence_given_nothing_is_unchanged(config: ModelConfig, seed: int, storage: Storage) -> None:
    """Its logits are repeated, its slots keep every bit, and growing moves them whole."""
    path = eager(config, seed, storage)
    sequences = path.open(2, 6)
    first_BV = path.extend(sequences, [tokens(config, seed, 5), tokens(config, seed, 3)])
    before = [each[:5].clone() for cache in sequences.caches for each in cache]
    nothing = torch.zeros(0, dtype=torch.int64)
    for length in (1, 2, 25):
        again_BV = path.extend(sequences, [nothing, tokens(config, seed, length)])
        assert bits(again_BV[0]) == bits(first_BV[0])
    assert sequences.capacity > 6
    after = [each[:5] for cache in sequences.caches for each in cache]
    assert [bits(each) for each in after] == [bits(each) for each in before]
    assert sequences.lengths == (5, 31)


@given(config=configs, seed=seeds, storage=storages)
def test_twice_the_same_is_the_same(config: ModelConfig, seed: int, storage: Storage) -> None:
    """Bit by bit, whatever was reserved, with other sequences extended in between; and the inputs are untouched."""
    path = eager(config, seed, storage)
    pieces = [tokens(config, seed + index, length) for index, length in enumerate((4, 1, 1, 6, 1))]
    kept = [piece.clone() for piece in pieces]
    small, large, other = path.open(1, 1), path.open(1, CONTEXT), path.open(2, 3)
    results = []
    for piece in pieces:
        results.append((path.extend(small, [piece]), path.extend(large, [piece])))
        path.extend(other, [piece, piece])
    assert all(bits(one) == bits(two) for one, two in results)
    assert all(torch.equal(piece, copy) for piece, copy in zip(pieces, kept, strict=True))


def test_returned_logits_belong_to_the_caller() -> None:
    """Later calls leave them alone, and writing to them leaves the path alone."""
    config = _some_config()
    path = eager(config, 0)
    sequences, nothing = path.open(2, 8), torch.zeros(0, dtype=torch.int64)
    first_BV = path.extend(sequences, [tokens(config, 0, 3), tokens(config, 1, 1)])
    copy_BV = first_BV.clone()
    path.extend(sequences, [tokens(config, 2, 1), tokens(config, 3, 4)])
    assert bits(first_BV) == bits(copy_BV)
    second_BV = path.extend(sequences, [nothing, nothing])
    copy_BV = second_BV.clone()
    second_BV.fill_(7)
    assert bits(path.extend(sequences, [nothing, nothing])) == bits(copy_BV)
    third_TV, _ = path.extend(sequences, [tokens(config, 4, 1), nothing], every_position=True)
    copy_V = third_TV[0].clone()
    third_TV.fill_(7)
    assert bits(path.extend(sequences, [nothing, nothing])[0]) == bits(copy_V)


def test_an_extension_that_breaks_off_changes_nothing() -> None:
    """Interrupted after some of the sequences: lengths and last logits are as before, and it can be done again."""
    config = _some_config()
    path, whole = eager(config, 0), eager(config, 0)
    held, right = path.open(3, 8), whole.open(3, 8)
    begin = [tokens(config, row, 2 + row) for row in range(3)]
    more = [tokens(config, 3, 1), tokens(config, 4, 3), tokens(config, 5, 2)]
    before = path.extend(held, begin)
    whole.extend(right, begin)
    prefill, runs = path._prefill, iter(range(9))

    def interrupted(*arguments: Any) -> Any:
        if next(runs) == 1:
            raise KeyboardInterrupt
        return prefill(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(path, "_prefill", interrupted)
        with pytest.raises(KeyboardInterrupt):
            path.extend(held, more)
    assert held.lengths == (2, 3, 4)
    nothing = torch.zeros(0, dtype=torch.int64)
    assert bits(path.extend(held, [nothing] * 3)) == bits(before)
    assert bits(path.extend(held, more)) == bits(whole.extend(right, more))


def test_weight_bytes_count_what_is_shared_once() -> None:
    """In float32, four bytes an element of the model; a tied head adds nothing to its table."""
    for tied in (True, False):
        config = replace(_some_config(), head=Head.TIED if tied else Head.UNTIED, token_types=0)
        source = RandomSource(config)
        parts = [source.embedding(), *map(source.layer, range(len(config.layers))), source.head()]
        named = [(name, each) for part in parts for name, each in tensors(part)]
        trained = 4 * sum(each.numel() for name, each in named if not is_buffer(name))
        made = 8 * sum(each.numel() for name, each in named if is_buffer(name))
        assert trained <= eager(config, 0).weight_bytes <= trained + made


class Watched(RandomSource):
    """A source whose weights are made once, so that writing to them would be seen."""

    embedding = functools.cache(RandomSource.embedding)
    layer = functools.cache(RandomSource.layer)
    head = functools.cache(RandomSource.head)


@pytest.mark.parametrize("storage", list(Storage))
def test_the_weights_handed_over_are_never_written_nor_kept(storage: Storage) -> None:
    config = _some_config()
    source = Watched(config)
    parts = [source.embedding(), source.head(), *(source.layer(index) for index in range(len(config.layers)))]
    every = [tensor for part in parts for _, tensor in tensors(part)]
    copies = [tensor.clone() for tensor in every]
    path = CompiledPath(source, storage=storage, mode="eager")
    first = path.extend(path.open(1, 4), [tokens(config, 0, 4)])
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(every, copies, strict=True))
    for tensor in every:
        tensor.zero_()
    assert bits(path.extend(path.open(1, 4), [tokens(config, 0, 4)])) == bits(first)


def test_a_tied_head_shares_the_tables_memory() -> None:
    for seed in range(8):
        config = _some_config(seed)
        model = eager(config, seed).model
        assert model.embedding is not None
        assert model.head is not None
        shared = model.head.projection.word.data_ptr() == model.embedding.table.word.data_ptr()
        assert shared == (config.head is Head.TIED)


def test_growth_at_least_doubles_and_stops_at_the_context() -> None:
    config = _some_config()
    path = eager(config, 0)
    sequences = path.open(1, 4)
    capacities = []
    for _ in range(CONTEXT):
        path.extend(sequences, [torch.zeros(1, dtype=torch.int64)])
        capacities.append(sequences.capacity)
    assert sorted(set(capacities)) == [4, 8, 16, 32, CONTEXT]


def _some_config(seed: int = 3) -> ModelConfig:
    from twinfer.oracle.case import RandomPicker

    return draw_model_config(RandomPicker(seed), context=CONTEXT)


def bad_extensions() -> list[tuple[str, list[Tensor], str]]:
    one, config = torch.zeros(1, dtype=torch.int64), _some_config()
    return [
        ("too few tensors", [one], "1 tensors"),
        ("outside the vocabulary", [one, torch.tensor([0, config.vocabulary])], f"id {config.vocabulary}"),
        ("negative", [one, torch.tensor([-1])], "id -1"),
        ("past the context", [one, torch.zeros(CONTEXT, dtype=torch.int64)], str(CONTEXT)),
        ("not integers", [one, torch.zeros(1)], "float32"),
        ("not 1-D", [one, one[None]], "2-D"),
    ]


@pytest.mark.parametrize(("new", "says"), [case[1:] for case in bad_extensions()], ids=[c[0] for c in bad_extensions()])
def test_a_refused_extension_changes_nothing(new: list[Tensor], says: str) -> None:
    config = _some_config()
    path = eager(config, 0)
    sequences = path.open(2, 4)
    path.extend(sequences, [tokens(config, 0, 4), tokens(config, 1, 2)])
    before = [bits(each) for cache in sequences.caches for each in cache]
    with pytest.raises(RequestError, match=says):
        path.extend(sequences, new)
    assert sequences.lengths == (4, 2)
    assert sequences.capacity == 4
    assert [bits(each) for cache in sequences.caches for each in cache] == before


def test_a_sequence_must_begin_with_a_token() -> None:
    path = eager(_some_config(), 0)
    with pytest.raises(RequestError, match="sequence 0 holds no token"):
        path.extend(path.open(1, 4), [torch.zeros(0, dtype=torch.int64)])


def test_sequences_closed_or_of_another_path_are_refused() -> None:
    config = _some_config()
    path, one = eager(config, 0), [torch.zeros(1, dtype=torch.int64)]
    sequences = path.open(1, 4)
    with pytest.raises(RequestError, match="another path"):
        eager(config, 0).extend(sequences, one)
    sequences.close()
    sequences.close()
    with pytest.raises(RequestError, match="closed"):
        path.extend(sequences, one)


@pytest.mark.parametrize(("batch", "reserve"), [(0, 4), (1, 0), (1, CONTEXT + 1)])
def test_impossible_openings_are_refused(batch: int, reserve: int) -> None:
    with pytest.raises(RequestError):
        eager(_some_config(), 0).open(batch, reserve)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"storage": "int3"}, RequestError, "float32, bfloat16, int8"),
        ({"compute": torch.int8}, RequestError, "torch.float32, torch.bfloat16, torch.float16, torch.float64"),
        ({"mode": "eagre"}, RequestError, "compiled, eager, guarded"),
        ({"device": "nowhere"}, RequestError, "nowhere"),
        ({"device": "meta"}, RequestError, "meta"),
        ({"device": "cuda:77"}, MachineError, "cuda:77"),
    ],
)
def test_what_is_not_offered_is_refused_before_anything_is_read(
    options: dict[str, Any], error: type[TwinferError], says: str
) -> None:
    class Unread:
        config = _some_config()

    with pytest.raises(error, match=says):
        CompiledPath(Unread(), **{"mode": "eager", **options})  # type: ignore[arg-type]


def test_a_missing_compiler_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MachineError, match=r"C\+\+ compiler.*install.*path=reference"):
        CompiledPath(RandomSource(_some_config()))
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(MachineError, match="'no-such-compiler -O2' is not there"):
        CompiledPath(RandomSource(_some_config()))


def test_reserve_is_taken_when_opened() -> None:
    """No step of what was reserved moves the caches."""
    config = _some_config()
    path = eager(config, 0)
    sequences: StaticSequences = path.open(2, 20)
    addresses = [[each.data_ptr() for cache in sequences.caches for each in cache]]
    for length in (7, 1, 12):
        path.extend(sequences, [tokens(config, 0, length), tokens(config, 1, length)])
        addresses.append([each.data_ptr() for cache in sequences.caches for each in cache])
    assert all(one == two for one, two in pairwise(addresses))


@pytest.mark.parametrize("hidden", [48, 7])
@pytest.mark.parametrize("storage", Storage)
@given(config=configs, seed=seeds)
@settings(max_examples=3)
def test_every_layer_is_given_rows_that_lie_alike(
    hidden: int, storage: Storage, config: ModelConfig, seed: int
) -> None:
    """One piece is compiled for all layers of one config and called without guards, so strides may not differ.

    Here nothing stands between the table and the first layer, which would lay out the rows anew.
    """
    bare: dict[str, Any] = {"embedding_scale": 1.0, "embedding_norm": None, "embedding_size": None}
    config = replace(config, hidden=hidden, learned_positions=False, token_types=0, **bare)
    path = eager(config, seed, storage)
    entered = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("decode_layer", "prefill_layer"):
            original = getattr(steps, name)

            def noted(x: Tensor, *given: Any, original: Any = original, **options: Any) -> Tensor:
                entered.append(x.is_contiguous())
                out: Tensor = original(x, *given, **options)
                return out

            patch.setattr(steps, name, noted)
        sequences = path.open(2, 6)
        path.extend(sequences, [tokens(config, seed, 3), tokens(config, seed, 1)])
        path.extend(sequences, [tokens(config, seed, 1)] * 2)
    assert all(entered)
