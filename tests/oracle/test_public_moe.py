"""transformers' routers and blocks of experts are right by the recipe that they follow, and wrong by another's.

    python tests/oracle/test_public_moe.py [CASES]

prints the table. In 16 bits most of these routers compute logits and weights in that dtype, which ours never does; so
they are held in float32.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
from transformers.models.mixtral import modeling_mixtral as mixtral
from transformers.models.olmoe import modeling_olmoe as olmoe
from transformers.models.phimoe.modeling_phimoe import sparsemixer
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3_moe

from twinfer.oracle.case import DTYPES, Case
from twinfer.oracle.search import drawn
from twinfer.oracle.table import OPS
from twinfer.oracle.trial import Status

CASES = 30


@dataclass(frozen=True, kw_only=True)
class Public:
    """A public router or block, and under what it is held."""

    op: str
    name: str
    function: Callable[..., Any]
    options: tuple[str, ...]
    conventions: dict[str, Any]
    """Options of the case, as the implementation has them."""
    least_experts: int = 1
    """In each group."""
    top_k: int | None = None
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)


def _config(kind: Any, hidden: int, width: int, config: Any, **more: Any) -> Any:
    sizes = {"hidden_size": hidden, "intermediate_size": width, "moe_intermediate_size": width}
    experts = dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), config.experts)
    return kind(**sizes, **experts, num_experts_per_tok=config.top_k, hidden_act="silu", **more)


def _mixtral(hidden: int, width: int, config: Any) -> Any:
    return mixtral.MixtralSparseMoeBlock(_config(transformers.MixtralConfig, hidden, width, config))


def _qwen3(hidden: int, width: int, config: Any) -> Any:
    made = _config(transformers.Qwen3MoeConfig, hidden, width, config, norm_topk_prob=True)
    return qwen3_moe.Qwen3MoeSparseMoeBlock(made)


def _olmoe(hidden: int, width: int, config: Any) -> Any:
    return olmoe.OlmoeSparseMoeBlock(_config(transformers.OlmoeConfig, hidden, width, config))


def _gpt_oss(hidden: int, width: int, config: Any) -> Any:
    return gpt_oss.GptOssMLP(_config(transformers.GptOssConfig, hidden, width, config))


def _deepseek(hidden: int, width: int, config: Any) -> Any:
    """Its shared experts draw weights when they are made, which are then replaced."""
    groups = {"n_group": config.groups, "topk_group": config.kept_groups}
    more = {"routed_scaling_factor": config.scale, "norm_topk_prob": True, "n_shared_experts": 1}
    made = _config(transformers.DeepseekV3Config, hidden, width, config, **groups, **more)
    with torch.random.fork_rng(devices=[]):
        return deepseek.DeepseekV3MoE(made)


def router_of(make: Callable[..., Any]) -> Callable[..., Any]:
    """The block's router, of which the hidden vector is the logits and the matrix the identity."""

    def call(*, logit_TE: Tensor, config: Any, choice_bias_E: Tensor | None) -> tuple[Tensor, Tensor]:
        block = make(config.experts, 1, config)
        router = block.router if hasattr(block, "router") else block.gate
        router.weight.data = torch.eye(config.experts, dtype=logit_TE.dtype)
        if hasattr(router, "bias"):
            router.bias.data.zero_()
        if choice_bias_E is not None:
            router.e_score_correction_bias = choice_bias_E
        _, weight_TK, expert_TK = router(logit_TE)
        return expert_TK, weight_TK

    return call


def phimoe_router(*, logit_TE: Tensor, config: Any, choice_bias_E: Tensor | None) -> tuple[Tensor, Tensor]:
    weight_TK, expert_TK = sparsemixer(logit_TE, jitter_eps=config.nearness / 2, training=False, top_k=config.top_k)
    return expert_TK, weight_TK


def block_of(make: Callable[..., Any]) -> Callable[..., Any]:
    """The block with the case's weights, gate and up as it has them in one matrix."""

    def call(*, x_BTM: Tensor, weights: Any, config: Any) -> Tensor:
        x_BTM = x_BTM.contiguous()
        block = make(x_BTM.shape[-1], config.expert.width, config.router).to(x_BTM.dtype).eval()
        router, experts = block.router if hasattr(block, "router") else block.gate, weights.experts
        router.weight.data = weights.router.weight_NI
        block.experts.config._experts_implementation = "eager"
        if isinstance(block, gpt_oss.GptOssMLP):
            router.bias.data = weights.router.bias_N
            block.experts.limit = config.expert.clamp
            block.experts.gate_up_proj.data = experts.gate_up.weight_ENI.mT.contiguous()
            block.experts.gate_up_proj_bias.data = experts.gate_up.bias_EN
            block.experts.down_proj.data = experts.down.weight_ENI.mT.contiguous()
            block.experts.down_proj_bias.data = experts.down.bias_EN
            return block(x_BTM)[0]  # type: ignore[no-any-return]
        block.experts.gate_up_proj.data = experts.gate_up.weight_ENI
        block.experts.down_proj.data = experts.down.weight_ENI
        if weights.choice_bias_E is not None:
            router.e_score_correction_bias = weights.choice_bias_E
        if weights.shared is not None:
            for name in ("gate", "up", "down"):
                getattr(block.shared_experts, f"{name}_proj").weight.data = getattr(weights.shared, name).weight_NI
        return block(x_BTM)  # type: ignore[no-any-return]

    return call


PLAIN = {"scale": 1.0, "groups": 1, "kept": 1}
SILU = {"kind": "silu", "gated": True, "bias": False, "clamp": None, "up_offset": 0.0, "factor": None}
EXPERTS = {**PLAIN, **SILU, "beside": "nothing"}
GPT_OSS = {**EXPERTS, "kind": "gelu_sigmoid", "bias": True, "clamp": 1.0, "up_offset": 1.0}

PUBLIC = tuple(
    Public(op="route", name=name, function=function, options=(f"recipe={recipe}", *options), conventions=how, **more)
    for name, function, recipe, options, how, more in (
        (
            "MixtralTopKRouter",
            router_of(_mixtral),
            "mixtral",
            ("ties=any",),
            PLAIN,
            {"dtypes": (torch.float32, torch.float16)},
        ),
        ("Qwen3MoeTopKRouter", router_of(_qwen3), "qwen3-moe", ("ties=any",), PLAIN, {}),
        ("OlmoeTopKRouter", router_of(_olmoe), "olmoe", ("ties=any",), PLAIN, {}),
        ("GptOssTopKRouter", router_of(_gpt_oss), "gpt-oss", ("ties=any",), PLAIN, {}),
        (
            *("DeepseekV3TopkRouter", router_of(_deepseek), "deepseek-v3", ("ties=any", "order=any"), {}),
            {"least_experts": 2, "dtypes": DTYPES},
        ),
        ("Phi-3.5-MoE's sparsemixer", phimoe_router, "phimoe", ("ties=any",), PLAIN, {"least_experts": 2, "top_k": 2}),
    )
) + tuple(
    Public(op="moe", name=name, function=block_of(make), options=(f"recipe={recipe}", f"gate_up={order}"), **more)
    for name, make, recipe, order, more in (
        ("MixtralSparseMoeBlock", _mixtral, "mixtral", "gate_first", {"conventions": EXPERTS}),
        ("Qwen3MoeSparseMoeBlock", _qwen3, "qwen3-moe", "gate_first", {"conventions": EXPERTS}),
        ("OlmoeSparseMoeBlock", _olmoe, "olmoe", "gate_first", {"conventions": EXPERTS}),
        ("GptOssMLP", _gpt_oss, "gpt-oss", "interleaved", {"conventions": GPT_OSS}),
        (
            *("DeepseekV3MoE", _deepseek, "deepseek-v3", "gate_first"),
            {"conventions": {**SILU, "beside": "shared"}, "least_experts": 2},
        ),
    )
)


def fitted(public: Public, case: Case) -> Case | None:
    """The case as the implementation can take it; None where it cannot."""
    case = replace(case, options={**case.options, **public.conventions})
    case = case if case.dtype in public.dtypes else replace(case, dtype=public.dtypes[0])
    groups = int(case.options["groups"] or 1)
    if case.n.E % groups or case.n.E // groups < public.least_experts:
        return None
    return case if public.top_k is None else replace(case, sizes={**case.sizes, "K": public.top_k})


def judged(public: Public, cases: int, *options: str, seed: int = 1) -> tuple[int, int, int, float, list[str]]:
    """Cases judged and rejected, rows left out, the largest error as a share of the bound, and the alarms."""
    op = OPS[public.op].under(*(options or (*public.options, *(("ties=any",) if public.op == "moe" else ()))))
    seen, rejected, left_out, largest, alarms = 0, 0, 0, 0.0, []
    for number in range(cases):
        case = fitted(public, drawn(op, seed, number)[0])
        if case is None:
            continue
        with torch.no_grad():
            verdict = op.guarantee.judge(op.trial(public.function, case))
        seen, rejected = seen + 1, rejected + (verdict.status is Status.REJECTED)
        left_out += verdict.left_out
        if verdict.failed:
            alarms.append(f"{verdict.complaint} {verdict.details} {case!r}")
        else:
            largest = max(largest, verdict.ratio)
    return seen, rejected, left_out, largest, alarms


@pytest.mark.parametrize("public", PUBLIC, ids=lambda public: public.name)
def test_public_routers_and_blocks_raise_no_alarm(public: Public) -> None:
    """Each under its own recipe, and order of gate and up, on drawn cases, small and large."""
    cases, _, _, _, alarms = judged(public, CASES if public.op == "route" else CASES // 3)
    assert cases
    assert not alarms, alarms[0]


def main(cases: int = 300) -> int:
    bad = False
    print("| op | implementation | options | cases | rejected | rows left out | alarms | largest error / bound |")
    print("|---|---|---|---|---|---|---|---|")
    for public in PUBLIC:
        seen, rejected, left_out, largest, alarms = judged(public, cases)
        bad = bad or bool(alarms)
        figures = f"{seen} | {rejected} | {left_out} | {len(alarms)} | {largest:.2f}"
        print(f"| {public.op} | {public.name} | {', '.join(public.options)} | {figures} |", flush=True)
        for alarm in alarms[:2]:
            print("   ", alarm, file=sys.stderr)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main(*(int(argument) for argument in sys.argv[1:2])))
