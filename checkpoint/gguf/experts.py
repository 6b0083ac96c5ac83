"""Experts as the keys of a GGUF file describe them, where the architecture leaves something open.

Where a key and what other readers compute differ, the key counts: `expert_weights_norm` is the model's own
`norm_topk_prob`, though readers of OLMoE and Qwen's files take no notice of it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ...spec.config import MlpConfig
from ...spec.moe import ROUTERS, MoeConfig, RouterConfig, Score
from ..fields import Fields

EXPERT_WIDTH = "expert_feed_forward_length"
SHARED_WIDTH = "expert_shared_feed_forward_length"

SCORES = {
    Score.SOFTMAX: (1,),
    Score.SIGMOID: (2,),
    Score.SOFTMAX_OF_CHOSEN: (1, 3),  # a softmax over all, its chosen renormalized, is the softmax over the chosen
    Score.SPARSEMIXER: (1,),  # no number stands for it
}
"""By what number `expert_gating_func` names each score."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """The experts of an architecture."""

    recipe: str
    """Of `spec.moe.ROUTERS`."""
    optional: bool = False
    """Whether models without experts are of the same architecture; elsewhere `expert_count` must be there."""
    width: str = "feed_forward_length"
    """The key of an expert's width."""
    divided: bool = False
    """Whether, without that key, the experts of a token share the width of a dense MLP."""
    expert: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `MlpConfig` in which an expert differs from a dense MLP of the architecture."""
    shared: str | None = None
    """Whether an MLP serves every token beside the experts: "always", or "said" where a key gives its width."""
    shared_gate: bool = False
    leading_dense: bool = False
    """Whether `leading_dense_block_count` layers at the beginning have no experts."""


def feeds(mixture: Mixture | None, fields: Fields, layers: int) -> Callable[[MlpConfig], list[MlpConfig | MoeConfig]]:
    """Read the keys; what is returned makes each layer's MLP or mixture, given the dense MLP of the architecture."""
    if mixture is None or (mixture.optional and not fields.values.get("expert_count")):
        fields.only("expert_count", 0)
        fields.only("expert_used_count", 0)
        return lambda plain: [plain] * layers
    chooses = _router(mixture, fields)
    leading = fields.integer("leading_dense_block_count", 0, least=0) if mixture.leading_dense else 0
    width = _width(mixture, fields, chooses)
    shared_width = _shared_width(mixture, fields, width)

    def each(plain: MlpConfig) -> list[MlpConfig | MoeConfig]:
        sparse = MoeConfig(
            router=chooses,
            expert=replace(plain, width=width, **mixture.expert),
            shared=None if shared_width is None else replace(plain, width=shared_width),
            shared_gate=mixture.shared_gate,
        )
        return [plain if index < leading else sparse for index in range(layers)]

    return each


def _router(mixture: Mixture, fields: Fields) -> RouterConfig:
    recipe = ROUTERS[mixture.recipe]
    renormalize, scale = recipe.renormalize, 1.0
    if recipe.score in (Score.SOFTMAX_OF_CHOSEN, Score.SPARSEMIXER):
        fields.only("expert_weights_norm", True)
    elif recipe.score is Score.SIGMOID:
        renormalize = fields.flag("expert_weights_norm")  # without it, readers and the models' own code differ
    else:
        renormalize = fields.flag("expert_weights_norm", recipe.renormalize)
    numbers = SCORES[recipe.score]
    if fields.integer("expert_gating_func", numbers[0]) not in numbers:
        right = " or ".join(map(str, numbers))
        raise fields.wrong("expert_gating_func", f"{right}, the {recipe.score.value} of this architecture's routers")
    if fields.has("expert_weights_scale"):
        scale = fields.number("expert_weights_scale")
    groups, kept = fields.integer("expert_group_count", 1), fields.integer("expert_group_used_count", 1)
    return replace(
        recipe,
        experts=fields.integer("expert_count"),
        top_k=fields.integer("expert_used_count"),
        renormalize=renormalize,
        scale=scale,
        groups=groups,
        kept_groups=kept,
    )


def _width(mixture: Mixture, fields: Fields, chooses: RouterConfig) -> int:
    if not mixture.divided or fields.has(mixture.width):
        return fields.integer(mixture.width)
    return fields.integer("feed_forward_length") // chooses.top_k


def _shared_width(mixture: Mixture, fields: Fields, width: int) -> int | None:
    """The width of the MLP beside the experts, or None where there is none."""
    if mixture.shared is None:
        return None
    count = fields.integer("expert_shared_count", 1, least=0)
    if fields.has(SHARED_WIDTH):
        return fields.integer(SHARED_WIDTH)
    if mixture.shared == "said" or count == 0:
        return None
    return width * count
