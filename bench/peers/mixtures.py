"""Other libraries' mixture layers with the same weights: transformers' blocks, and DeepSpeed's `MoE`.

Shapes: T tokens, M hidden, E experts.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.nn import functional

from ...spec.weights import MoeWeights
from ..mixtures import Mixture
from ..reasons import reason

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
"""Ways in which transformers computes experts."""
MOST_COPIED = 2**27
"""Numbers that batched_mm may copy: it gives every choice a matrix of its own, 44 s for 64 tokens of Mixtral."""

Layer = Callable[[Tensor], Tensor]


def peers_of(mixture: Mixture, weights: MoeWeights) -> Mapping[str, Layer | str]:
    """Return the layers of libraries that know such a mixture, by name, or why one is not there."""
    library = "deepspeed" if mixture.name == "deepspeed" else "transformers"
    if find_spec(library) is None:
        return {library: f"not installed (pip install {library})"}
    try:
        if library == "deepspeed":
            return {"DeepSpeed MoE": deepspeed_layer(mixture, weights)}
        return {f"transformers {each}": transformers_block(mixture, weights, each) for each in IMPLEMENTATIONS}
    except Exception as error:  # another library's
        return {library: reason(error)}


def transformers_block(mixture: Mixture, weights: MoeWeights, implementation: str) -> Layer:
    """Return the block of a Mixtral or Qwen3-MoE model with one of transformers' ways to compute its experts."""
    router, expert = mixture.config.router, mixture.config.expert
    sizes = {"hidden_size": mixture.hidden, "num_experts_per_tok": router.top_k, "hidden_act": "silu"}
    config: Any
    if mixture.name == "mixtral":
        modeling: Any = import_module("transformers.models.mixtral.modeling_mixtral")
        config = modeling.MixtralConfig(**sizes, num_local_experts=router.experts, intermediate_size=expert.width)
        make = modeling.MixtralSparseMoeBlock
    else:
        modeling = import_module("transformers.models.qwen3_moe.modeling_qwen3_moe")
        named = {"num_experts": router.experts, "moe_intermediate_size": expert.width, "norm_topk_prob": True}
        config = modeling.Qwen3MoeConfig(**sizes, **named)
        make = modeling.Qwen3MoeSparseMoeBlock
    config._experts_implementation = implementation
    with torch.device("meta"):
        block = make(config).eval()
    assert weights.experts.gate is not None
    gate_up = torch.cat([weights.experts.gate.weight_ENI, weights.experts.up.weight_ENI], 1)
    state = {
        "gate.weight": weights.router.weight_NI,
        "experts.gate_up_proj": gate_up,
        "experts.down_proj": weights.experts.down.weight_ENI,
    }
    block.load_state_dict(state, strict=True, assign=True)

    def serve(x_TM: Tensor) -> Tensor:
        if implementation == "batched_mm" and len(x_TM) * router.top_k * gate_up[0].numel() > MOST_COPIED:
            raise MemoryError("it would copy the matrices of every choice")
        out: Tensor = block(x_TM[None])[0]
        return out

    return serve


class _Expert(nn.Module):
    """What DeepSpeed copies for each expert."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(hidden, width), nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(functional.gelu(self.up(x)))
        return out


def deepspeed_layer(mixture: Mixture, weights: MoeWeights) -> Layer:
    """Return DeepSpeed's `MoE` on one rank, its capacity as it comes: what exceeds that is dropped."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with contextlib.redirect_stdout(sys.stderr):  # where it logs
        deepspeed: Any = import_module("deepspeed")
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # one rank sends nothing: no need to build it
        if not torch.distributed.is_initialized():
            store = HashStore()
            torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        deepspeed.init_distributed("gloo")
        layers: Any = import_module("deepspeed.moe.layer")
        config = mixture.config
        expert = _Expert(mixture.hidden, config.expert.width)
        layer = layers.MoE(
            mixture.hidden,
            expert,
            num_experts=config.router.experts,
            k=config.router.top_k,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        ).eval()
        layer.set_deepspeed_parallelism()
    up, down = weights.experts.up, weights.experts.down
    assert up.bias_EN is not None
    assert down.bias_EN is not None
    prefix = "deepspeed_moe.experts.deepspeed_experts"
    state = {"deepspeed_moe.gate.wg.weight": weights.router.weight_NI}
    for index in range(config.router.experts):
        state[f"{prefix}.{index}.up.weight"] = up.weight_ENI[index]
        state[f"{prefix}.{index}.up.bias"] = up.bias_EN[index]
        state[f"{prefix}.{index}.down.weight"] = down.weight_ENI[index]
        state[f"{prefix}.{index}.down.bias"] = down.bias_EN[index]
    layer.load_state_dict(state, strict=True)

    def serve(x_TM: Tensor) -> Tensor:
        out: Tensor = layer(x_TM[None])[0][0]
        return out

    return serve
