"""Mixtures of experts as the benchmark times them: published shapes scaled down, their weights, and their programs.

Shapes: T tokens, M hidden, F intermediate, E experts, K = top_k.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..compiled.experts import stack
from ..compiled.linear import PASS_ROWS, linear_decode, linear_prefill, passes
from ..compiled.moe import Mlp, Moe, moe
from ..compiled.programs import graph, mark_dynamic
from ..compiled.routing import route
from ..spec.config import Activation, MlpConfig, Storage
from ..spec.moe import ROUTERS, MoeConfig
from ..spec.weights import ExpertWeights, LinearWeights, MoeWeights, StackedLinearWeights
from .columns import matrix_of, nbytes

MOST_SEQUENCES = 8
"""The most tokens that are timed as a decode step of as many sequences; more are a prompt."""
_EXAMPLE_TOKENS = 160
"""Tokens that a program for any number of them is compiled on."""


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """One layer's mixture."""

    name: str
    hidden: int
    config: MoeConfig

    def shape(self, tokens: int) -> dict[str, int]:
        router, expert = self.config.router, self.config.expert
        return {"T": tokens, "E": router.experts, "K": router.top_k, "M": self.hidden, "F": expert.width}

    def flops(self, tokens: int) -> int:
        """Multiplications and additions of the router's and the chosen experts' products."""
        router, expert = self.config.router, self.config.expert
        of_expert = (3 if expert.gated else 2) * self.hidden * expert.width
        return 2 * tokens * (router.top_k * of_expert + router.experts * self.hidden)


def _mixture(name: str, router: str, hidden: int, width: int, experts: int, top_k: int, **expert: Any) -> Mixture:
    mlp = MlpConfig(**{"width": width, "activation": Activation.SILU, "gated": True, **expert})
    recipe = replace(ROUTERS[router], experts=experts, top_k=top_k)
    return Mixture(name=name, hidden=hidden, config=MoeConfig(router=recipe, expert=mlp))


MIXTURES: Mapping[str, Mixture] = MappingProxyType(
    {
        each.name: each
        for each in (
            _mixture("mixtral", "mixtral", 1024, 3584, 8, 2),
            _mixture("qwen3-moe", "qwen3-moe", 1024, 384, 128, 8),
            _mixture("deepspeed", "gshard", 512, 1024, 64, 2, activation=Activation.GELU, gated=False, bias=True),
        )
    }
)
"""Mixtral-8x7B at a quarter of its width, Qwen3-30B-A3B at half, and a layer as DeepSpeed's documentation builds it."""


def growing(experts: int) -> Mixture:
    """Return one of a series that differs in the number of experts only: top-2, 3 MB of float32 each."""
    return _mixture(f"{experts} experts", "mixtral", 512, 512, experts, 2)


def draw_weights(mixture: Mixture, seed: int) -> MoeWeights:
    """Return normal weights scaled by the root of their inputs; tokens then choose about evenly."""
    generator, config, hidden = torch.Generator().manual_seed(seed), mixture.config, mixture.hidden
    experts, width = config.router.experts, config.expert.width

    def stacked(outputs: int, inputs: int) -> StackedLinearWeights:
        weight_ENI = torch.randn(experts, outputs, inputs, generator=generator).mul_(inputs**-0.5)
        bias_EN = torch.randn(experts, outputs, generator=generator) if config.expert.bias else None
        return StackedLinearWeights(weight_ENI=weight_ENI, bias_EN=bias_EN)

    router_EM = torch.randn(experts, hidden, generator=generator).mul_(hidden**-0.5)
    return MoeWeights(
        router=LinearWeights(weight_NI=router_EM),
        experts=ExpertWeights(
            up=stacked(width, hidden),
            down=stacked(hidden, width),
            gate=stacked(width, hidden) if config.expert.gated else None,
        ),
    )


def prepare_mixture(weights: MoeWeights, storage: Storage) -> Moe:
    """Return a mixture of a router and experts only, as the compiled path holds it."""
    experts = weights.experts
    return Moe(
        router=matrix_of(weights.router.weight_NI, Storage.FLOAT32),
        choice_bias_E=None,
        experts=Mlp(
            stack([experts.up] if experts.gate is None else [experts.gate, experts.up], storage),
            stack([experts.down], storage),
        ),
        shared=None,
        shared_gate=None,
        residual=None,
        coefficient=None,
    )


def chosen_bytes(x_TM: Tensor, prepared: Moe, mixture: Mixture) -> int:
    """Return the stored bytes of the router and of every expert that any of the tokens chooses."""
    router = mixture.config.router
    expert_TK = route(x_TM @ prepared.router.word.t(), router).expert_TK
    return nbytes(prepared.router) + nbytes(prepared.experts) * len(torch.unique(expert_TK)) // router.experts


class CompiledMixture:
    """A mixture under torch.compile as the path's graphs have it: a program for prompts, and one for each pass."""

    def __init__(self, prepared: Moe, mixture: Mixture, storage: Storage) -> None:
        self._prepared, self._mixture, self._storage = prepared, mixture, storage
        self._prompt: Callable[..., Tensor] | None = None
        self._steps: dict[int, Callable[..., Tensor]] = {}

    def __call__(self, x_TM: Tensor) -> Tensor:
        """Serve a decode step of up to `MOST_SEQUENCES` sequences, or a prompt; returns [T, M]."""
        if len(x_TM) > MOST_SEQUENCES:
            return self._any(x_TM)
        passed = [x_TM[rows] for rows in passes(len(x_TM), self._storage)]
        served = [self._any(x_RM) if len(x_RM) > PASS_ROWS else self._step(x_RM) for x_RM in passed]
        return torch.cat(served)[: len(x_TM)]

    def _any(self, x_TM: Tensor) -> Tensor:
        if self._prompt is None:

            def serve(x_TM: Tensor, weights: Moe) -> Tensor:
                return moe(x_TM, weights, self._mixture.config, self._storage, linear_prefill)

            self._prompt = graph(serve)
            example_TM = x_TM.new_zeros(_EXAMPLE_TOKENS, x_TM.shape[1])
            mark_dynamic(serve, (example_TM, self._prepared), {"x_TM": (0,)})
            self._prompt(example_TM, self._prepared)
        return self._prompt(x_TM, self._prepared)

    def _step(self, x_RM: Tensor) -> Tensor:
        if len(x_RM) not in self._steps:

            def serve(x_RM: Tensor, weights: Moe) -> Tensor:
                return moe(x_RM, weights, self._mixture.config, self._storage, linear_decode)

            self._steps[len(x_RM)] = graph(serve)
        return self._steps[len(x_RM)](x_RM, self._prepared)
