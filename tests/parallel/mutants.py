"""Seeded faults of many ranks: each is put into the code of every rank for one case."""

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from twinfer.compiled.layers import Cache
from twinfer.compiled.programs import Program
from twinfer.oracle.models import RandomSource
from twinfer.parallel import experts, path, pieces, programs, weights
from twinfer.parallel.exchange import Route
from twinfer.parallel.groups import Group
from twinfer.parallel.wire import Pending, Wire
from twinfer.spec.shard import Shard
from twinfer.spec.weights import LayerWeights, MoeWeights

Patches = list[Any]
_layer = RandomSource.layer
_prepare = path.prepare_share
_gather, _exchange = Wire.all_gather, Wire.all_to_all
_gather_rows = Wire.all_gather_rows
_through = programs.RankProgram.through
_runs = path.runs_of
_work = programs.RankProgram.work


def _in_layer(change: Callable[[RandomSource, int, Shard, LayerWeights], LayerWeights]) -> Patches:
    def layer(self: RandomSource, index: int, shard: Shard | None = None) -> LayerWeights:
        whole = _layer(self, index, shard)
        return whole if shard is None else change(self, index, shard, whole)

    return [patch.object(RandomSource, "layer", layer), patch.object(weights, "validate_layer", lambda *_: None)]


def _bias_everywhere(source: RandomSource, index: int, shard: Shard, held: LayerWeights) -> LayerWeights:
    whole = _layer(source, index).attention.output.bias_N
    return replace(held, attention=replace(held.attention, output=replace(held.attention.output, bias_N=whole)))


def _heads_of_the_next(source: RandomSource, index: int, shard: Shard, held: LayerWeights) -> LayerWeights:
    other = _layer(source, index, replace(shard, rank=(shard.rank + 1) % shard.ranks))
    return replace(held, attention=replace(held.attention, query=other.attention.query))


def _half_a_head(source: RandomSource, index: int, shard: Shard, held: LayerWeights) -> LayerWeights:
    value = held.attention.value.weight_NI.clone()
    half = len(value) // 2
    value[half * shard.rank :][:half] = 0
    return replace(held, attention=replace(held.attention, value=replace(held.attention.value, weight_NI=value)))


def _no_sum(self: Wire, x: Tensor, group: Group) -> Pending:
    return Pending(x, None)


def _gathered_backwards(self: Wire, part_RV: Tensor, group: Group, counted: int) -> Tensor:
    every = _gather(self, part_RV, group, counted)
    return torch.cat(every.chunk(len(group), 1)[::-1], 1)


def _next_piece_first(self: Wire, rows: Tensor, sent: list[int], arriving: list[int], group: Group) -> Tensor:
    got = _exchange(self, rows, sent, arriving, group)
    if rows.dtype is torch.int64:  # how many rows there are: ranks would wait for what never comes
        return got
    return torch.cat(got.split(list(arriving))[::-1])


def _wrong_first_token(*given: Any, **options: Any) -> Any:
    share = _prepare(*given, **options)
    return share._replace(first_token_1=share.first_token_1 + 1)


def _caches_of_another_layer(self: Any, x: Tensor, caches: Any, tokens: Any) -> Tensor:
    later = bool(int(tokens.position_T[0]) > 0)
    return _through(self, x, caches[::-1] if later else caches, tokens)


def _members_mixed_up(lengths: Any, tokens: Any, *given: Any) -> Any:
    runs = _runs(lengths, tokens, *given)
    if not torch.distributed.get_rank():
        return runs
    last = len(lengths) - 1
    return [run._replace(members=[last - member for member in run.members]) for run in runs]


def _stream_on_each(x_TM: Tensor, stream_TM: Tensor, part_TM: Tensor) -> Any:
    return None if stream_TM is x_TM else stream_TM, (stream_TM + part_TM).contiguous()


def _own_squares(self: Any, given: Any, x_TM: Tensor, weights_: Any, tokens: Any) -> Any:
    yield from ()
    return () if given.project is None else given.project(x_TM, weights_)


def _own_slice(self: Wire, rows: Tensor, lengths: list[int], group: Group) -> Tensor:
    every = _gather_rows(self, rows, lengths, group)
    return every if rows.dtype is torch.int64 else every.flip(0)  # rows, and not how many there are


def _mix_swapped(source: RandomSource, index: int, shard: Shard, held: LayerWeights) -> LayerWeights:
    mlp = held.mlp
    if not isinstance(mlp, MoeWeights) or mlp.coefficient is None:
        return held
    matrix = mlp.coefficient
    assert matrix.bias_N is not None
    swapped = replace(matrix, weight_NI=matrix.weight_NI.flip(0), bias_N=matrix.bias_N.flip(0))
    return replace(held, mlp=replace(mlp, coefficient=swapped))


def _kept_instead_of_returned(swap: Any) -> Any:
    """Of numbers, rows and results, which travel in turn, results stay with whoever computed them."""
    calls = count()

    def wrong(rows: Tensor, route: Route, wire: Wire) -> Tensor:
        if next(calls) % 3 < 2:
            return swap(rows, route, wire)
        kept = rows.new_zeros(sum(route.arriving), *rows.shape[1:])
        kept[: len(rows)] = rows[: len(kept)]
        return kept

    return wrong


def _unsorted(order_of: Any) -> Any:
    def sort(expert_TK: Tensor, count: int) -> Any:
        order = order_of(expert_TK, count)
        return order._replace(place_A=torch.arange(len(order.place_A)))

    return sort


def _later_pieces_first(*given: Any) -> Any:
    runs = _runs(*given)
    prefills = [run for run in runs if run.program is Program.PREFILL]
    return [*(run for run in runs if run.program is not Program.PREFILL), *prefills[::-1]]


def _each_piece_from_the_start(lengths: Any, *given: Any) -> Any:
    """Where the sequence was when the call began."""
    return [run._replace(first=lengths[run.members[0]]) for run in _runs(lengths, *given)]


def _first_keys_not_kept(self: Any, caches: Any, tokens: Any, **given: Any) -> Any:
    """Of a sequence's first tokens each layer of the last stage forgets keys and values."""
    place = self._wire.groups.place
    if place.stage + 1 == self._wire.groups.parallel.pipeline and int(tokens.position_T[0]) == 0:
        caches = [Cache(*(each.clone() for each in cache)) for cache in caches]
    return _work(self, caches, tokens, **given)


def _awaited_at_once(self: Any, part_TM: Tensor, tokens: Any) -> Any:
    sum_TM = self._start_reduce(part_TM, tokens)()
    yield
    return sum_TM


OF_PIECES: dict[str, Callable[[], Patches]] = {
    "later pieces first": lambda: [patch.object(path, "runs_of", _later_pieces_first)],
    "each piece from the start": lambda: [patch.object(path, "runs_of", _each_piece_from_the_start)],
    "keys of the first piece not kept": lambda: [patch.object(programs.RankProgram, "work", _first_keys_not_kept)],
    "the other piece of a pair first": lambda: [
        patch.object(path, "by_turns", lambda works: programs.by_turns(works[::-1])[::-1])
    ],
    "sums awaited at once": lambda: [patch.object(programs.RankProgram, "_summed", _awaited_at_once)],
}

MUTANTS: dict[str, Callable[[], Patches]] = {
    "bias added on each rank": lambda: _in_layer(_bias_everywhere),
    "query heads of another rank": lambda: _in_layer(_heads_of_the_next),
    "a replicated key/value head cut": lambda: _in_layer(_half_a_head),
    "no all-reduce": lambda: [patch.object(Wire, "start_all_reduce", _no_sum)],
    "scales of the slice": lambda: [patch.object(Wire, "largest", lambda self, x, group: x)],
    "logits gathered backwards": lambda: [patch.object(Wire, "all_gather", _gathered_backwards)],
    "another first token": lambda: [patch.object(path, "prepare_share", _wrong_first_token)],
    "caches of another layer": lambda: [patch.object(programs.RankProgram, "through", _caches_of_another_layer)],
    "the stream added on each rank": lambda: [patch.object(pieces, "_of_own", _stream_on_each)],
    "a norm over own heads": lambda: [patch.object(programs.RankProgram, "_heads", _own_squares)],
    "micro-batches mixed up": lambda: [patch.object(path, "runs_of", _members_mixed_up)],
    "all-to-all in another order": lambda: [patch.object(Wire, "all_to_all", _next_piece_first)],
    "rows not put back": lambda: [patch.object(experts, "sort_by_expert", _unsorted(experts.sort_by_expert))],
    "combined before the return": lambda: [patch.object(experts, "swap", _kept_instead_of_returned(experts.swap))],
    "residual mix swapped": lambda: _in_layer(_mix_swapped),
    "slices gathered backwards": lambda: [patch.object(Wire, "all_gather_rows", _own_slice)],
}
