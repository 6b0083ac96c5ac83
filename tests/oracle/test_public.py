"""Public implementations that are right raise no alarm: torch's own functions, and transformers' layers and parts.

    python tests/oracle/test_public.py [CASES]

prints the table. What transformers sums or stores in 16 bits besides results is declared: `Arithmetic.NARROW`.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from twinfer.oracle.case import Case, Data
from twinfer.oracle.search import drawn
from twinfer.oracle.table import OPS
from twinfer.oracle.trial import Arithmetic, Status
from twinfer.reference.cache import KVCache
from twinfer.spec.config import Activation, RotaryLayout

CASES = 24


@dataclass(frozen=True, kw_only=True)
class Public:
    """A public implementation, and under what it is held against an op."""

    op: str
    name: str
    function: Callable[..., Any]
    options: tuple[str, ...] = ()
    change: Callable[[Case], Case | None] = lambda case: case
    """The case as the implementation can take it; None where it cannot."""
    narrow: bool = False
    """Whether its 16-bit arithmetic rounds more than results and what the reference stores."""


_HF_NAMES = {
    Activation.GELU: "gelu",
    Activation.GELU_TANH: "gelu_pytorch_tanh",
    Activation.GELU_SIGMOID: "quick_gelu",
    Activation.RELU: "relu",
    Activation.SILU: "silu",
}


def torch_linear(*, x: Tensor, weights: Any) -> Tensor:
    return F.linear(x, weights.weight_NI, weights.bias_N)


def torch_layer_norm(*, x: Tensor, weights: Any, epsilon: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weights.gain_M, weights.bias_M, epsilon)


def torch_rms_norm(*, x: Tensor, weights: Any, epsilon: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weights.gain_M, epsilon)


def llama_rms_norm(*, x: Tensor, weights: Any, epsilon: float) -> Tensor:
    norm = LlamaRMSNorm(x.shape[-1], epsilon)
    norm.weight.data = weights.gain_M
    return norm(x)  # type: ignore[no-any-return]


def hf_activation(*, x: Tensor, kind: Activation) -> Tensor:
    return ACT2FN[_HF_NAMES[kind]](x)  # type: ignore[no-any-return]


def of_torch(case: Case) -> Case:
    """The activations that are one call of torch; 1.702 x and its sigmoid are results of their own elsewhere."""
    kind = case.options["kind"]
    return replace(case, options={**case.options, "kind": "gelu_tanh" if kind == "gelu_sigmoid" else kind})


def plain_mlp(case: Case) -> Case:
    """As `of_torch`, and nothing is cut or added before the product with the gate."""
    case = of_torch(case)
    return replace(case, options={**case.options, "clamp": None, "up_offset": 0.0})


def quick_gelu(case: Case) -> Case:
    return replace(case, options={**case.options, "kind": "gelu_sigmoid"})


def hf_mlp(*, x_BTM: Tensor, weights: Any, config: Any) -> Tensor:
    """The lines of LlamaMLP.forward and GPT2MLP.forward, which differ in the gate."""
    inner = torch_linear(x=x_BTM, weights=weights.up if weights.gate is None else weights.gate)
    inner = ACT2FN[_HF_NAMES[config.activation]](inner)
    if weights.gate is not None:
        inner = inner * torch_linear(x=x_BTM, weights=weights.up)
    return torch_linear(x=inner, weights=weights.down)


def sdpa(backend: SDPBackend) -> Callable[..., Tensor]:
    def call(*, query_BTHD: Tensor, key_BSKD: Tensor, value_BSKD: Tensor, visible_TS: Tensor, scale: float) -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in (query_BTHD, key_BSKD, value_BSKD))
        group = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(group, 1) for x in (key, value))
        query, key, value = (x.contiguous() for x in (query, key, value))  # fused kernels ask for it
        mask = visible_TS if visible_TS.ndim == 2 else visible_TS[:, None]
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
        return out.transpose(1, 2)

    return call


class _Groups(torch.nn.Module):
    training = False

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups


def hf_eager_attention(
    *, query_BTHD: Tensor, key_BSKD: Tensor, value_BSKD: Tensor, visible_TS: Tensor, scale: float
) -> Tensor:
    query, key, value = (x.transpose(1, 2) for x in (query_BTHD, key_BSKD, value_BSKD))
    seen = visible_TS if visible_TS.ndim == 2 else visible_TS[:, None]
    mask = torch.zeros(seen.shape, dtype=query.dtype).masked_fill(~seen, torch.finfo(query.dtype).min)
    groups = _Groups(query.shape[1] // key.shape[1]).eval()
    return eager_attention_forward(groups, query, key, value, mask, scale)[0]  # type: ignore[no-any-return]


def every_query_sees(case: Case) -> Case | None:
    """A mask of large negative numbers has no blind queries, and is no mask to scores that are larger."""
    usual = case.data not in (Data.MASKED, Data.LARGE, Data.OFFSET)
    return case if usual else replace(case, data=Data.NORMAL)


def hf_rotary(
    *, x_BTHD: Tensor, position_T: Tensor, frequency_J: Tensor, layout: RotaryLayout, attention_factor: float
) -> Tensor:
    """As LlamaRotaryEmbedding and apply_rotary_pos_emb do, whose angles are float32."""
    angle_TJ = position_T[:, None].float() * frequency_J.float()
    both_1TD = torch.cat([angle_TJ, angle_TJ], -1)[None]
    cos, sin = ((f(both_1TD) * attention_factor).to(x_BTHD.dtype) for f in (torch.cos, torch.sin))
    size = 2 * len(frequency_J)
    turned, _ = apply_rotary_pos_emb(*[x_BTHD[..., :size].transpose(1, 2)] * 2, cos, sin)
    return torch.cat([turned.transpose(1, 2), x_BTHD[..., size:]], -1)


def half_split(case: Case) -> Case:
    return replace(case, options={**case.options, "layout": RotaryLayout.HALF_SPLIT.value})


def as_llama(case: Case) -> Case | None:
    """Every convention as Llama has it, which has no experts."""
    if case.options["experts"] is not None:
        return None
    pairs = max(1, case.n.J)
    options = {
        "norm": "rms",
        "norm_bias": False,
        "gain_from_one": False,
        "placement": "pre_norm",
        "residual": "sequential",
        "residual_scale": 1.0,
        "layout": "half_split",
        "window": None,
        "attention_factor": 1.0,
        "alibi": False,
        "causal": True,
        "softcap": None,
        "sinks": False,
        "qkv_clip": None,
        "qk_norm": None,
        "kind": "silu",
        "gated": True,
        "clamp": None,
        "up_offset": 0.0,
        "bias": False,
    }
    heads = case.n.H
    sizes = {**case.sizes, "J": pairs, "D": 2 * pairs, "M": heads * max(1, case.n.M // heads)}
    return replace(case, sizes=sizes, options={**case.options, **options})


class _Cache:
    """What LlamaAttention asks of a cache."""

    def __init__(self, cache: KVCache) -> None:
        self.key, self.value = cache.key_BSKD.transpose(1, 2), cache.value_BSKD.transpose(1, 2)

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.key, self.value = torch.cat([self.key, key], 2), torch.cat([self.value, value], 2)
        return self.key, self.value


def llama_layer(attention: str) -> Callable[..., Any]:
    def call(*, x_BTM: Tensor, weights: Any, config: Any, cache: KVCache) -> tuple[Tensor, KVCache]:
        has = config.attention
        made = LlamaConfig(
            hidden_size=x_BTM.shape[-1],
            intermediate_size=config.mlp.width,
            num_attention_heads=has.heads,
            num_key_value_heads=has.kv_heads,
            head_dim=has.head_size,
            rms_norm_eps=config.norm.epsilon,
            attn_implementation=attention,
        )
        with torch.random.fork_rng(devices=[]):  # weights are drawn, and then replaced
            layer = LlamaDecoderLayer(made, 0).to(x_BTM.dtype).eval()
        own, mlp = layer.self_attn, layer.mlp
        for module, part in (
            *((own.q_proj, weights.attention.query), (own.k_proj, weights.attention.key)),
            *((own.v_proj, weights.attention.value), (own.o_proj, weights.attention.output)),
            *((mlp.gate_proj, weights.mlp.gate), (mlp.up_proj, weights.mlp.up), (mlp.down_proj, weights.mlp.down)),
        ):
            module.weight.data = part.weight_NI
        layer.input_layernorm.weight.data = weights.attention_norm.gain_M
        layer.post_attention_layernorm.weight.data = weights.mlp_norm.gain_M
        position = torch.arange(cache.length, cache.length + x_BTM.shape[1])
        angle = position[:, None].float() * weights.attention.rotary_frequency_J.float()
        both = torch.cat([angle, angle], -1)[None]
        seen = torch.arange(cache.length + len(position))[None] <= position[:, None]
        mask = torch.zeros(seen.shape, dtype=x_BTM.dtype).masked_fill(~seen, torch.finfo(x_BTM.dtype).min)
        held = _Cache(cache)
        out = layer(
            x_BTM,
            attention_mask=mask[None, None],
            position_embeddings=(both.cos().to(x_BTM.dtype), both.sin().to(x_BTM.dtype)),
            past_key_values=held,
        )
        return out, KVCache(held.key.transpose(1, 2), held.value.transpose(1, 2))

    return call


TURNS = ("angles=float32",)
PUBLIC = (
    Public(op="linear", name="torch linear", function=torch_linear),
    Public(op="layer_norm", name="torch layer_norm", function=torch_layer_norm),
    Public(op="rms_norm", name="torch rms_norm", function=torch_rms_norm),
    Public(op="rms_norm", name="LlamaRMSNorm", function=llama_rms_norm),
    Public(op="activation", name="torch gelu, silu, relu", function=hf_activation, change=of_torch),
    Public(op="activation", name="QuickGELUActivation", function=hf_activation, change=quick_gelu, narrow=True),
    Public(op="mlp", name="LlamaMLP, GPT2MLP", function=hf_mlp, change=plain_mlp),
    Public(op="attention", name="torch attention, math", function=sdpa(SDPBackend.MATH)),
    Public(op="attention", name="torch attention, flash", function=sdpa(SDPBackend.FLASH_ATTENTION)),
    Public(
        op="attention",
        name="transformers' eager attention",
        function=hf_eager_attention,
        change=every_query_sees,
        narrow=True,
    ),
    Public(op="rotate", name="apply_rotary_pos_emb", function=hf_rotary, options=TURNS, change=half_split, narrow=True),
    Public(
        op="layer",
        name="LlamaDecoderLayer, eager",
        function=llama_layer("eager"),
        options=TURNS,
        change=as_llama,
        narrow=True,
    ),
    Public(
        op="layer",
        name="LlamaDecoderLayer, sdpa",
        function=llama_layer("sdpa"),
        options=TURNS,
        change=as_llama,
        narrow=True,
    ),
)


def judged(public: Public, cases: int, seed: int = 1) -> tuple[int, int, float, list[str]]:
    """Cases judged and rejected, the largest error as a share of the bound, and the alarms."""
    op = OPS[public.op].under(*public.options)
    arithmetic = Arithmetic.NARROW if public.narrow else Arithmetic.WIDE
    seen, rejected, largest, alarms = 0, 0, 0.0, []
    for number in range(cases):
        case = public.change(drawn(op, seed, number)[0])
        if case is None:
            continue
        of_case = arithmetic if case.dtype.itemsize == 2 else Arithmetic.WIDE
        verdict = op.guarantee.judge(op.trial(public.function, case, of_case))
        seen, rejected = seen + 1, rejected + (verdict.status is Status.REJECTED)
        if verdict.failed:
            alarms.append(f"{verdict.complaint} {verdict.details} {case!r}")
        else:
            largest = max(largest, verdict.ratio)
    return seen, rejected, largest, alarms


@pytest.mark.parametrize("public", PUBLIC, ids=lambda public: public.name)
def test_public_implementations_raise_no_alarm(public: Public) -> None:
    """In every dtype, on drawn cases, small and large."""
    cases, _, _, alarms = judged(public, CASES if public.op != "layer" else CASES // 3)
    assert cases
    assert not alarms, alarms[0]


def main(cases: int = 300) -> int:
    bad = False
    print("| op | implementation | arithmetic | cases | rejected | alarms | largest error / bound |")
    print("|---|---|---|---|---|---|---|")
    for public in PUBLIC:
        seen, rejected, largest, alarms = judged(public, cases)
        bad = bad or bool(alarms)
        option = "".join(f", {option}" for option in public.options)
        arithmetic = "narrow" if public.narrow else "wide"
        figures = f"{seen} | {rejected} | {len(alarms)} | {largest:.2f}"
        print(f"| {public.op}{option} | {public.name} | {arithmetic} | {figures} |", flush=True)
        for alarm in alarms[:2]:
            print("   ", alarm, file=sys.stderr)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main(*(int(argument) for argument in sys.argv[1:2])))
