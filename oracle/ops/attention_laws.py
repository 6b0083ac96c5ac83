"""What attention must obey by itself, whatever its scores are shaped by.

Shapes: B batch, T query tokens, S key tokens, H query heads, K key/value heads, G = H/K, D head size.
"""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..case import Case
from ..op import Function, Op
from ..properties import assert_same_bits, call


def ignores_unseen_keys(op: Op, function: Function, case: Case) -> None:
    """Replacing every key and value that no query may see, by any finite value, changes no bit."""
    inputs = op.inputs(case)
    seen_BTS = inputs["visible_TS"].expand(len(inputs["key_BSKD"]), -1, -1)
    unseen = ~seen_BTS.any(1)[:, :, None, None]
    replaced = {name: inputs[name].masked_fill(unseen, 3.0) for name in ("key_BSKD", "value_BSKD")}
    assert_same_bits(call(op, function, case), call(op, function, case, **replaced), "unseen keys")


def permuting_groups_permutes_output(op: Op, function: Function, case: Case) -> None:
    """Reversing the key/value heads, with their query heads, reverses the outputs, within the op's budget."""

    def reversed_groups(x_BTHD: Tensor, kv_heads: int) -> Tensor:
        grouped = rearrange(x_BTHD, "b t (k g) d -> b t k g d", k=kv_heads).flip(2)
        return rearrange(grouped, "b t k g d -> b t (k g) d")

    def there_and_back(**inputs: Any) -> Tensor:
        kv_heads = inputs["key_BSKD"].shape[2]
        names = ("query_BTHD", "key_BSKD", "value_BSKD")
        out = function(**{**inputs, **{name: reversed_groups(inputs[name], kv_heads) for name in names}})
        return reversed_groups(out, kv_heads)

    verdict = op.guarantee.judge(op.trial(there_and_back, case, once=True))
    assert not verdict.failed, verdict.complaint


def stays_between_values(op: Op, function: Function, case: Case) -> None:
    """An output lies between the least and the greatest value that may be seen, or is zero where there is none.

    A sink pulls it towards zero.
    """
    inputs = op.inputs(case)
    out = call(op, function, case)[0].double()
    group = inputs["query_BTHD"].shape[2] // inputs["key_BSKD"].shape[2]
    value_B1SHD = inputs["value_BSKD"].double().repeat_interleave(group, 2)[:, None]
    seen_BTS11 = inputs["visible_TS"].expand(len(value_B1SHD), -1, -1)[..., None, None]
    least = value_B1SHD.where(seen_BTS11, torch.inf).amin(2).nan_to_num(posinf=0.0)
    most = value_B1SHD.where(seen_BTS11, -torch.inf).amax(2).nan_to_num(neginf=0.0)
    if inputs.get("sink_H") is not None:
        least, most = least.clamp_max(0.0), most.clamp_min(0.0)
    size = torch.maximum(least.abs(), most.abs())
    slack = 2 * torch.finfo(case.dtype).eps * size.clamp_min(torch.finfo(case.dtype).smallest_normal)
    assert bool(((least - slack <= out) & (out <= most + slack)).all()), "an output lies outside its values"
