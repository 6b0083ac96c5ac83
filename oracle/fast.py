"""The compiled path's functions as fast twins: called like the reference, on inputs packed as its graphs pack them.

A case's dtype is the compute dtype: activations and caches come in it, vectors of weights are float32 as the path
keeps them.

Shapes: as in the reference's files, and R rows, C slots of a static cache.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..compiled import attention, embedding, head, linear, mlp, norms, packing, rotary
from ..compiled.compute import accumulation_dtype
from ..compiled.packing import Matrix
from ..compiled.weights import prepared_norm
from ..reference.attention import visible
from ..reference.cache import KVCache
from ..spec.config import Storage
from ..spec.weights import EmbeddingWeights, LinearWeights, NormWeights
from .case import Inputs
from .op import Fast, Function

STORAGE = "storage"
"""The key, among the inputs of a product, of the storage to pack weights in that are not rounded to it yet."""


def matrices_of(*parts: LinearWeights, storage: Storage | None = None) -> tuple[list[Matrix], Storage]:
    """Return the weights packed in this storage; without one in the narrowest that holds them all exactly.

    Integers are held so only where their scales are integers too: a sum of quantized values times 2 / 15 rounds.
    """
    if storage is not None:
        quantized = [packing.quantize(part.weight_NI.float(), storage) for part in parts]
        return [packing.pack(each, part.bias_N) for each, part in zip(quantized, parts, strict=True)], storage
    for storage in (Storage.INT4, Storage.INT8, Storage.BFLOAT16, Storage.FLOAT32):
        matrices = [packing.pack(packing.quantize(part.weight_NI.float(), storage), part.bias_N) for part in parts]
        unpacked = [
            linear.expanded(matrix, storage, part.weight_NI.shape[1], torch.float32)
            for matrix, part in zip(matrices, parts, strict=True)
        ]
        if all(
            torch.equal(each, part.weight_NI.float()) and (_scaled_by_integers(matrix) or not _integral(each))
            for each, matrix, part in zip(unpacked, matrices, parts, strict=True)
        ):
            return matrices, storage
    raise AssertionError("float32 holds every float32 weight")


def _scaled_by_integers(matrix: Matrix) -> bool:
    return all(_integral(each) for each in (matrix.scale_N, matrix.scale_BGU, matrix.min_BGU) if each is not None)


def _integral(value: Tensor) -> bool:
    return torch.equal(value, value.round())


def _few(function: Function, x: Tensor, weights: LinearWeights, storage: Storage | None = None) -> Tensor:
    """Multiply as a decode step does: packed weights in passes of a few rows."""
    (matrix,), storage = matrices_of(weights, storage=storage)
    x_RI = x.flatten(0, -2)
    given = linear.passes(len(x_RI), storage)
    out_RN = torch.cat([function(x_RI[rows], matrix, storage) for rows in given])[: len(x_RI)]
    return out_RN.reshape(*x.shape[:-1], -1)


def _many(function: Function, x: Tensor, weights: LinearWeights, storage: Storage | None = None) -> Tensor:
    (matrix,), storage = matrices_of(weights, storage=storage)
    out: Tensor = function(x.flatten(0, -2), matrix, storage)
    return out.reshape(*x.shape[:-1], -1)


def _linear_few(function: Function, inputs: Inputs) -> Tensor:
    return _few(function, inputs["x"], inputs["weights"], inputs.get(STORAGE))


def _linear_many(function: Function, inputs: Inputs) -> Tensor:
    return _many(function, inputs["x"], inputs["weights"], inputs.get(STORAGE))


def _head(function: Function, inputs: Inputs) -> Tensor:
    x: Tensor = inputs["x"]
    return _few(function, x.to(accumulation_dtype(x.dtype)), inputs["projection"])  # logits are not rounded


def _sbi_gemm(function: Function, inputs: Inputs) -> Tensor:
    weights = LinearWeights(weight_NI=inputs["weight_KN"].float().t().contiguous())
    return _few(function, inputs["x_BK"], weights)


LINEAR = (Fast(linear.linear_decode, _linear_few), Fast(linear.linear_prefill, _linear_many))
HEAD_LOGITS = (Fast(linear.linear_decode, _head),)
SBI_GEMM = (Fast(linear.linear_decode, _sbi_gemm),)


def _scale_and_cap(function: Function, inputs: Inputs) -> Tensor:
    logits: Tensor = inputs["logits"]
    out: Tensor = function(logits, inputs["scale"], inputs["softcap"])
    return out.clone()  # within a graph it may return its input


SCALE_AND_CAP = (Fast(head.scale_and_cap, _scale_and_cap),)


def _embed_with(product: embedding.Product) -> Callable[[Function, Inputs], Tensor]:
    def adapt(function: Function, inputs: Inputs) -> Tensor:
        weights: EmbeddingWeights = inputs["weights"]
        config, token_BT = inputs["config"], inputs["token_BT"]
        table = LinearWeights(weight_NI=weights.token_VW)
        matrices, storage = matrices_of(table, *([] if weights.projection is None else [weights.projection]))
        packed = embedding.Embedding(
            table=matrices[0],
            projection=None if weights.projection is None else matrices[1],
            position_PM=None if weights.position_PM is None else weights.position_PM.float(),
            type_YM=None if weights.type_YM is None else weights.type_YM.float(),
            norm=prepared_norm(weights.norm, config.embedding_norm, token_BT.device, inputs["dtype"]),
        )
        given = inputs["position_T"], packed, config, storage, product
        rows = [
            function(token_T, *given, type_T, compute=inputs["dtype"])
            for token_T, type_T in zip(token_BT, inputs["type_BT"], strict=True)
        ]
        return torch.stack(rows)

    return adapt


EMBED = (
    Fast(embedding.embed, _embed_with(linear.linear_decode)),
    Fast(embedding.embed, _embed_with(linear.linear_prefill)),
)


def _norm(function: Function, inputs: Inputs) -> Tensor:
    x: Tensor = inputs["x"]
    weights: NormWeights = inputs["weights"]
    vectors = [weights.gain_M.float()] if weights.bias_M is None else [weights.gain_M.float(), weights.bias_M.float()]
    out: Tensor = function(x.flatten(0, -2), *vectors, inputs["epsilon"])
    return out.reshape(x.shape)


def _configured_norm(function: Function, inputs: Inputs) -> Tensor:
    x: Tensor = inputs["x"]
    prepared = prepared_norm(inputs["weights"], inputs["config"], x.device, x.dtype)
    assert prepared is not None
    out: Tensor = function(x.flatten(0, -2), *prepared, inputs["config"])
    return out.reshape(x.shape)


NORM = (Fast(norms.norm, _configured_norm),)
LAYER_NORM = (Fast(norms.layer_norm, _norm),)
RMS_NORM = (Fast(norms.rms_norm, _norm),)


def _activation(function: Function, inputs: Inputs) -> Tensor:
    out: Tensor = function(inputs["x"], inputs["kind"])
    return out


ACTIVATION = (Fast(mlp.activation, _activation),)


def _rotate(function: Function, inputs: Inputs) -> Tensor:
    x_BTHD: Tensor = inputs["x_BTHD"]
    how = inputs["position_T"], inputs["frequency_J"], inputs["attention_factor"]
    table = rotary.rotary_table(*how, compute=x_BTHD.dtype)
    return torch.stack([function(x_THD, *table, inputs["layout"]) for x_THD in x_BTHD])


ROTATE = (Fast(rotary.rotate, _rotate),)


def _mask(function: Function, inputs: Inputs) -> Tensor:
    positions = inputs["query_position_T"], inputs["key_position_S"]
    out: Tensor = function(*positions, inputs["window"], causal=inputs["causal"], compute=torch.float32)
    return out == 0


def _has_no_padding(inputs: Inputs) -> bool:
    return inputs["key_length"] is None


VISIBLE = (Fast(attention.mask, _mask, applies=_has_no_padding),)


def _prefill(function: Function, inputs: Inputs) -> Tensor:
    """Sequence by sequence, each with its own slots between those of others."""
    query_BTHD: Tensor = inputs["query_BTHD"]
    mask_TS = torch.where(inputs["visible_TS"], 0.0, -torch.inf).to(query_BTHD.dtype)
    slots, start_B, capacity = _slots(inputs["key_BSKD"], inputs["value_BSKD"])
    slot_S = torch.arange(capacity - _SPARE)
    given = {"mask_TS": mask_TS, "scale": inputs["scale"], "window": None, **_shaping(inputs)}
    rows = [
        function(query_THD, *slots, slot_S=start + slot_S, **given)
        for query_THD, start in zip(query_BTHD, start_B, strict=True)
    ]
    return torch.stack(rows)


def _decode(function: Function, inputs: Inputs) -> Tensor:
    """All sequences at once, query by query; a query that sees keys lo .. hi stands at hi, with that window."""
    query_BTHD: Tensor = inputs["query_BTHD"]
    slots, start_B, _ = _slots(inputs["key_BSKD"], inputs["value_BSKD"])
    slot_S = torch.arange(inputs["key_BSKD"].shape[1])
    columns = []
    for t, seen_S in enumerate(inputs["visible_TS"]):
        run = seen_S.nonzero()[:, 0]
        position_R = run[-1].expand(len(query_BTHD))
        columns.append(
            function(
                query_BTHD[:, t],
                *slots,
                mask=attention.decode_mask(start_B, position_R, slot_S, len(run), compute=query_BTHD.dtype),
                position_R=position_R,
                slot_S=slot_S,
                scale=inputs["scale"],
                **_shaping(inputs),
            )
        )
    return torch.stack(columns, 1)


def _texts(function: Function, inputs: Inputs) -> Tensor:
    """The sequences as texts, one after the other."""
    query_BTHD: Tensor = inputs["query_BTHD"]
    causal, window = _masking(inputs) or (True, None)
    out: Tensor = function(
        *(inputs[name].flatten(0, 1) for name in ("query_BTHD", "key_BSKD", "value_BSKD")),
        cu_seqlens=torch.arange(len(query_BTHD) + 1) * query_BTHD.shape[1],
        causal=causal,
        scale=inputs["scale"],
        window=window,
        **_shaping(inputs),
    )
    return out.view(query_BTHD.shape)


def _masking(inputs: Inputs) -> tuple[bool, int | None] | None:
    """Whether attention is causal, and its window, where queries are the keys' own and such a mask is the given one."""
    seen_TS: Tensor = inputs["visible_TS"]
    position_S = torch.arange(seen_TS.shape[1])
    every = [(causal, window) for causal in (True, False) for window in (None, 1, 2, 3)]
    masks = (visible(position_S, position_S, causal=causal, window=window) for causal, window in every)
    return next((masking for masking, mask_SS in zip(every, masks, strict=True) if mask_SS.equal(seen_TS)), None)


def _is_a_text(inputs: Inputs) -> bool:
    return inputs["visible_TS"].ndim == 2 and _masking(inputs) is not None


def _shaping(inputs: Inputs) -> dict[str, Any]:
    """What the compiled functions take in place of a bias: the slopes, by which the bias grows from key to key."""
    given = {name: inputs.get(name) for name in ("softcap", "sink_H")}
    bias_HTS: Tensor | None = inputs.get("bias_HTS")
    if bias_HTS is None:
        return given
    slope_H = bias_HTS[:, -1, -1] - bias_HTS[:, -1, max(0, bias_HTS.shape[2] - 2)]
    return {**given, "slope_H": slope_H.double()}


_SPARE = 2  # slots past every sequence's length, full of NaN


def _slots(key_BSKD: Tensor, value_BSKD: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor, int]:
    """Static caches [B * C, K, D] that hold the keys and values, the start of each sequence, and C."""
    batch, held = key_BSKD.shape[:2]
    capacity = held + _SPARE
    caches = []
    for part in (key_BSKD, value_BSKD):
        cache = torch.full((batch, capacity, *part.shape[2:]), torch.nan, dtype=part.dtype)
        cache[:, :held] = part
        caches.append(cache.flatten(0, 1))
    return (caches[0], caches[1]), torch.arange(batch) * capacity, capacity


def _sees_no_later_key(inputs: Inputs) -> bool:
    """Whether every query sees something, and nothing after itself, the queries being the last positions."""
    seen_TS: Tensor = inputs["visible_TS"]
    if seen_TS.ndim != 2:
        return False
    queries, keys = seen_TS.shape
    return bool(seen_TS.any(-1).all()) and not bool(seen_TS.triu(keys - queries + 1).any())


def _sees_runs(inputs: Inputs) -> bool:
    """Whether every query sees an unbroken run of keys, as causal masks and windows give."""
    seen_TS: Tensor = inputs["visible_TS"]
    if seen_TS.ndim != 2:
        return False
    rises = (seen_TS.int().diff(dim=1, prepend=torch.zeros(len(seen_TS), 1, dtype=torch.int32)) == 1).sum(-1)
    return bool((rises == 1).all())


ATTENTION = (
    Fast(attention.attend_decode, _decode, applies=_sees_runs),
    Fast(attention.attend_prefill, _prefill, applies=_sees_no_later_key),
    Fast(attention.attend_varlen, _texts, applies=_is_a_text),
)


def _bias_is_linear(inputs: Inputs) -> bool:
    """Whether the bias, if any, grows from key to key and falls from query to query by one slope a head: ALiBi's."""
    bias_HTS: Tensor | None = inputs["bias_HTS"]
    if bias_HTS is None:
        return True
    slope_H = _shaping(inputs)["slope_H"]
    query_T = torch.arange(bias_HTS.shape[2] - bias_HTS.shape[1], bias_HTS.shape[2])
    linear_HTS = slope_H[:, None, None] * (torch.arange(bias_HTS.shape[2]) - query_T[:, None])
    return torch.equal(linear_HTS.to(bias_HTS.dtype), bias_HTS)


SHAPED_ATTENTION = tuple(
    replace(each, applies=lambda inputs, each=each: _bias_is_linear(inputs) and each.applies(inputs))  # type: ignore[misc]
    for each in ATTENTION
)


def _alibi(function: Function, inputs: Inputs) -> Tensor:
    slope_H: Tensor = inputs["slope_H"]
    bias_TSH: Tensor = function(
        inputs["query_position_T"], inputs["key_position_S"], slope_H.double(), compute=slope_H.dtype
    )
    return bias_TSH.permute(2, 0, 1).to(slope_H.dtype)


ALIBI = (Fast(attention.alibi, _alibi),)


def _write(function: Function, inputs: Inputs) -> KVCache:
    """New tokens of all sequences, token by token, into slots between those of others."""
    cache: KVCache = inputs["cache"]
    held, new = cache.length, inputs["key_BTKD"].shape[1]
    grown = []
    for old, more in ((cache.key_BSKD, inputs["key_BTKD"]), (cache.value_BSKD, inputs["value_BTKD"])):
        capacity = held + new + _SPARE
        slots = torch.full((len(old), capacity, *old.shape[2:]), torch.nan, dtype=old.dtype)
        slots[:, :held] = old
        slots = slots.flatten(0, 1)
        start_B = torch.arange(len(old)) * capacity
        for t in range(new):
            function(slots, start_B + held + t, more[:, t])
        grown.append(slots.view(len(old), capacity, *slots.shape[1:])[:, : held + new])
    return KVCache(*grown)


APPEND = (Fast(attention.write, _write),)
