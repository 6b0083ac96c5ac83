"""The record of the key/value cache.

Shapes: B batch, S tokens held, T new tokens, K key/value heads, D head size.
"""

from typing import Any

import torch
from torch import Tensor

from ...reference.cache import KVCache, append
from ...spec.decoder import Path
from .. import fast
from ..case import DTYPES, UNMASKED, Case, Inputs, Picker, activations
from ..guarantees import Bitwise
from ..op import Function, Op
from ..properties import assert_same_bits, first_rows_alone, repeats_itself
from ..sizes import BATCH, HEAD_SIZE, TOKENS, resized
from ..variants import changed


def append_cases(pick: Picker) -> Case:
    return Case(
        op="append",
        sizes={
            "B": pick.integer(1, 2),
            "S": pick.integer(0, 5),
            "T": pick.integer(1, 4),
            "K": pick.integer(1, 3),
            "D": pick.integer(1, 6),
        },
        data=pick.choice(UNMASKED),
        dtype=pick.choice(DTYPES),
        seed=pick.integer(0, 2**31),
    )


def append_inputs(case: Case) -> Inputs:
    n = case.n

    def rows(name: str, tokens: int) -> Tensor:
        return activations(case, name, n.B, tokens, n.K, n.D)

    return {
        "cache": KVCache(rows("old keys", n.S), rows("old values", n.S)),
        "key_BTKD": rows("new keys", n.T),
        "value_BTKD": rows("new values", n.T),
    }


def _written_into_place(*, cache: KVCache, key_BTKD: Tensor, value_BTKD: Tensor) -> KVCache:
    """Slots reserved up front and filled one by one, as a static cache does."""
    held, new = cache.length, key_BTKD.shape[1]

    def grow(old: Tensor, more: Tensor) -> Tensor:
        slots = torch.empty(old.shape[0], held + new, *old.shape[2:], dtype=old.dtype)
        slots[:, :held] = old
        return slots.index_copy(1, torch.arange(held, held + new), more)

    return KVCache(grow(cache.key_BSKD, key_BTKD), grow(cache.value_BSKD, value_BTKD))


def _one_slot_early(**inputs: Any) -> KVCache:
    out = append(**inputs)
    at = max(inputs["cache"].length - 1, 0)
    new = inputs["key_BTKD"].shape[1]
    key_BSKD = out.key_BSKD.clone()
    key_BSKD[:, at : at + new] = inputs["key_BTKD"]
    return KVCache(key_BSKD, out.value_BSKD)


def _keys_for_values(inputs: Inputs) -> Inputs:
    return {"value_BTKD": inputs["key_BTKD"]}


def _new_first(**inputs: Any) -> KVCache:
    return append(
        KVCache(inputs["key_BTKD"], inputs["value_BTKD"]), inputs["cache"].key_BSKD, inputs["cache"].value_BSKD
    )


def _heads_and_size_mixed(inputs: Inputs) -> Inputs:
    key = inputs["key_BTKD"]
    return {"key_BTKD": key.transpose(2, 3).reshape(key.shape)}


def pieces_are_the_whole(op: Op, function: Function, case: Case) -> None:
    """Appending tokens one at a time gives what appending them at once gives."""
    inputs = copied_inputs = op.inputs(case)
    cache = inputs["cache"]
    for t in range(inputs["key_BTKD"].shape[1]):
        one = {name: copied_inputs[name][:, t : t + 1] for name in ("key_BTKD", "value_BTKD")}
        cache = function(cache=cache, **one)
    whole = function(**inputs)
    assert_same_bits([cache.key_BSKD, cache.value_BSKD], [whole.key_BSKD, whole.value_BSKD], "pieces")


APPEND = Op(
    name="append",
    larger=resized({"T": TOKENS, "S": TOKENS, "D": HEAD_SIZE, "B": BATCH}),
    paper="III-D",
    axes="B S T K D",
    reference=append,
    outputs=("B S+T K D", "B S+T K D"),
    cases=append_cases,
    inputs=append_inputs,
    guarantee=Bitwise(),
    properties=(repeats_itself, first_rows_alone("cache", "key_BTKD", "value_BTKD"), pieces_are_the_whole),
    variants={"written_into_place": _written_into_place},
    mutants={
        "one_slot_early": _one_slot_early,
        "keys_for_values": changed(append, _keys_for_values),
        "new_tokens_first": _new_first,
        "heads_and_size_mixed": changed(append, _heads_and_size_mixed),
    },
    flops=lambda n: 0,
    bytes=lambda n: 4 * 2 * 2 * n.B * n.T * n.K * n.D,
    fast={Path.COMPILED: fast.APPEND},
)
