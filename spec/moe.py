"""What a mixture of experts is: its router, its capacity, and the MLPs beside the experts.

Every convention that public models disagree on is a field or an enum here. `ROUTERS` names the recipes of published
models, so that a difference between two of them can be read off one line each.

Letters: E experts, k experts a token (top-k), C capacity, T tokens, M hidden, F intermediate.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from types import MappingProxyType

from .errors import ConfigError
from .mlp import MlpConfig, require, require_positive


class Score(StrEnum):
    """How a router's logits become the scores that rank and weigh experts."""

    SOFTMAX = "softmax"
    """Softmax over all experts, before the choice: Switch, GShard, Qwen 2 and 3, OLMoE."""
    SOFTMAX_OF_CHOSEN = "softmax_of_chosen"
    """The choice by the logits, then softmax over the chosen only: Mixtral, gpt-oss."""
    SIGMOID = "sigmoid"
    """Each expert's own sigmoid; scores of one token need not sum to 1: DeepSeek-V3, GLM-4 MoE."""
    SPARSEMIXER = "sparsemixer"
    """One choice after the other; a choice's weight is its softmax among the experts not chosen before whose logit is
    near the best: Phi-3.5-MoE (arXiv 2409.12136)."""


class DropOrder(StrEnum):
    """Which tokens an expert keeps when more choose it than its capacity."""

    FIRST_COME = "first_come"
    """All first choices in the order of the tokens, then all second choices, and so on: GShard, DeepSpeed."""
    HIGHEST_SCORE = "highest_score"
    """The largest weights; of equal ones the choice that `FIRST_COME` would serve first. DeepSpeed's "probs"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """How a token chooses its experts. Ties go to the lower index; nothing is drawn at random."""

    experts: int
    """E."""
    top_k: int
    """k."""
    score: Score = Score.SOFTMAX
    renormalize: bool = False
    """Whether a token's k weights are divided by their sum."""
    scale: float = 1.0
    """Multiplies the weights, after they are renormalized: DeepSeek-V3's routed_scaling_factor."""
    logit_bias: bool = False
    """Whether the router's linear map has a bias: gpt-oss."""
    choice_bias: bool = False
    """Whether a bias for each expert is added to the scores for the choice only, never to the weights: DeepSeek-V3."""
    nearness: float | None = None
    """SPARSEMIXER: experts count whose logit lies at most nearness * max(|logit|, best) below the best; 0.02 in Phi."""
    groups: int = 1
    """Groups of E / groups neighboring experts each."""
    kept_groups: int = 1
    """Groups that a token may choose from: those with the largest sum of their two best scores (DeepSeek-V3)."""

    def __post_init__(self) -> None:
        require_positive(self, "experts", "top_k", "groups", "kept_groups")
        require(self.scale > 0, "RouterConfig.scale", self.scale, "a positive number, usually 1")
        require(
            self.experts % self.groups == 0,
            "RouterConfig.groups",
            self.groups,
            f"a divisor of experts, which is {self.experts}",
        )
        require(
            self.kept_groups <= self.groups,
            "RouterConfig.kept_groups",
            self.kept_groups,
            f"at most groups, which is {self.groups}",
        )
        require(
            (self.nearness is not None and self.nearness > 0) == (self.score is Score.SPARSEMIXER),
            "RouterConfig.nearness",
            self.nearness,
            "a positive number where the score is sparsemixer, and None elsewhere",
        )
        choosable = self.experts // self.groups * self.kept_groups
        require(
            self.top_k <= choosable,
            "RouterConfig.top_k",
            self.top_k,
            f"at most the experts that a token may choose from, which are {choosable}",
        )
        require(
            not (self.choice_bias and self.score in (Score.SOFTMAX_OF_CHOSEN, Score.SPARSEMIXER)),
            "RouterConfig.choice_bias",
            self.choice_bias,
            "false where scores exist only after the choice",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityConfig:
    """The most tokens that one expert serves in one call. What is dropped passes by the residual only."""

    factor: float
    """Times T * k / E, the tokens of an expert if all were chosen equally often."""
    minimum: int = 1
    drop_order: DropOrder = DropOrder.FIRST_COME

    def __post_init__(self) -> None:
        require(self.factor > 0, "CapacityConfig.factor", self.factor, "a positive number, such as 1.25")
        require_positive(self, "minimum")


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeConfig:
    """A mixture of experts where a dense layer has one MLP."""

    router: RouterConfig
    expert: MlpConfig
    """Each of the E experts."""
    capacity: CapacityConfig | None = None
    """None serves every choice (dropless)."""
    shared: MlpConfig | None = None
    """An MLP that serves every token beside the chosen experts: Qwen 2 MoE, DeepSeek-V3."""
    shared_gate: bool = False
    """Whether the shared MLP's output is multiplied by a sigmoid of a linear map of the token: Qwen 2 MoE."""
    residual: MlpConfig | None = None
    """An MLP mixed with the experts by a learned softmax of two: residual MoE (arXiv 2201.05596, section 4.1)."""

    def __post_init__(self) -> None:
        require(
            self.shared is not None or not self.shared_gate,
            "MoeConfig.shared_gate",
            self.shared_gate,
            "false without a shared MLP",
        )
        require(
            self.shared is None or self.residual is None,
            "MoeConfig.residual",
            self.residual,
            "None beside a shared MLP; no model has both",
        )


_TOP_1 = RouterConfig(experts=2, top_k=1)
_TOP_2 = RouterConfig(experts=2, top_k=2)

ROUTERS: Mapping[str, RouterConfig] = MappingProxyType(
    {
        "switch": _TOP_1,
        "gshard": replace(_TOP_2, renormalize=True),
        "mixtral": replace(_TOP_2, score=Score.SOFTMAX_OF_CHOSEN),
        "qwen2-moe": _TOP_2,
        "qwen3-moe": replace(_TOP_2, renormalize=True),
        "olmoe": _TOP_2,
        "phimoe": replace(_TOP_2, score=Score.SPARSEMIXER, nearness=0.02),
        "deepseek-v3": replace(_TOP_2, score=Score.SIGMOID, renormalize=True, choice_bias=True),
        "gpt-oss": replace(_TOP_2, score=Score.SOFTMAX_OF_CHOSEN, logit_bias=True),
    }
)
"""Recipes by who uses them; `router(name, experts=..., top_k=...)` gives one at a size. The paper's are "switch"."""


def router(name: str, *, experts: int, top_k: int, **further: float) -> RouterConfig:
    """Return a published recipe at a given size; `further` sets groups, kept_groups or scale.

    >>> router("mixtral", experts=8, top_k=2).score
    <Score.SOFTMAX_OF_CHOSEN: 'softmax_of_chosen'>

    Raises `ConfigError` for a name that is none of `ROUTERS`, and for sizes that no router can have.
    """
    if name not in ROUTERS:
        raise ConfigError(f"router is {name!r}; it must be one of {', '.join(ROUTERS)}")
    return replace(ROUTERS[name], experts=experts, top_k=top_k, **further)  # type: ignore[arg-type]
