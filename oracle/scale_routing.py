"""The sizes of what rounds within a router: scores, and the weights of chosen experts.

A softmax rounds each difference from its largest logit, so its relative error grows with that difference; a sigmoid
rounds by its own size. Dividing by a sum adds the relative errors of what is summed.

Shapes: T tokens, E experts, K chosen.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..reference.routing import choice_weights
from ..spec.moe import RouterConfig, Score
from .budget import Sizes
from .scale import Known, root

_LEAST = torch.finfo(torch.float32).smallest_normal / torch.finfo(torch.float32).eps
"""The size whose eps is the smallest normal number: exponentials below may become zero."""
_TINY = 1e-20
"""What the reference adds to a sum that it divides by; others may leave it out."""


def score_sizes(logit_TE: Tensor, kind: Score) -> Tensor:
    """Return the sizes of what rounds on the way to each score; of a logit that is given, nothing."""
    match kind:
        case Score.SOFTMAX:
            return torch.softmax(logit_TE, -1) * _of_softmax(logit_TE)
        case Score.SIGMOID:
            return 3 * torch.sigmoid(logit_TE)
        case _:
            return torch.zeros_like(logit_TE)


def weight_sizes(logit_TE: Tensor, expert_TK: Tensor, config: RouterConfig) -> Sizes:
    """Return the sizes of what rounds on the way to each chosen expert's weight, logits being given."""
    weight_TK = choice_weights(logit_TE, expert_TK, config).abs()
    chosen_TK = logit_TE.gather(1, expert_TK)
    match config.score:
        case Score.SOFTMAX:
            relative_TK = _of_softmax(logit_TE).gather(1, expert_TK)
        case Score.SIGMOID:
            relative_TK = torch.full_like(weight_TK, 3.0)
        case Score.SOFTMAX_OF_CHOSEN:
            relative_TK = _of_softmax(chosen_TK)
        case Score.SPARSEMIXER:  # only logits near the best one count
            relative_TK = 3 + 2 * (config.nearness or 0.0) * chosen_TK.abs()
    jump_TK = torch.zeros_like(weight_TK)
    if config.renormalize:
        share_TK = weight_TK / config.scale
        relative_TK = relative_TK + (share_TK * relative_TK).sum(-1, keepdim=True) + 1
        plain_TK = torch.sigmoid(chosen_TK) if config.score is Score.SIGMOID else torch.ones_like(chosen_TK)
        jump_TK = (weight_TK * _TINY / plain_TK.sum(-1, keepdim=True)).nan_to_num(0.0)
    return Sizes(weight_TK * (relative_TK + 1) + _LEAST, jump=jump_TK)


def _of_softmax(logit: Tensor) -> Tensor:
    """The relative sizes of what rounds in a softmax along the last axis."""
    distance = logit.amax(-1, keepdim=True) - logit
    return 3 + distance + (torch.softmax(logit, -1) * distance).sum(-1, keepdim=True)


def weights_known(logit_TE: Known, expert_TK: Tensor, config: RouterConfig) -> Known:
    """The weights of chosen experts, from logits on whose way something was rounded."""
    value_TK = choice_weights(logit_TE.value, expert_TK, config)
    through = _relative_change(logit_TE.value, expert_TK, config)
    sizes = weight_sizes(logit_TE.value, expert_TK, config)
    own_TK = sizes.wide + sizes.jump / torch.finfo(torch.float32).eps
    return Known(value_TK, root(own_TK, value_TK * through(logit_TE.wide)), value_TK * through(logit_TE.narrow))


def _relative_change(logit_TE: Tensor, expert_TK: Tensor, config: RouterConfig) -> Callable[[Tensor], Tensor]:
    """How independent errors of the logits change the weights, relative to them."""

    def of_softmax(size: Tensor, probability: Tensor) -> Tensor:
        return root(size, (probability * size).square().sum(-1, keepdim=True).sqrt().expand_as(size))

    def through(size_TE: Tensor) -> Tensor:
        size_TK, chosen_TK = size_TE.gather(1, expert_TK), logit_TE.gather(1, expert_TK)
        match config.score:
            case Score.SOFTMAX:
                relative_TK = of_softmax(size_TE, torch.softmax(logit_TE, -1)).gather(1, expert_TK)
            case Score.SIGMOID:
                relative_TK = torch.sigmoid(-chosen_TK) * size_TK
            case Score.SOFTMAX_OF_CHOSEN:
                relative_TK = of_softmax(size_TK, torch.softmax(chosen_TK, -1))
            case Score.SPARSEMIXER:
                relative_TK = root(size_TK, size_TE.amax(-1, keepdim=True).expand_as(size_TK))
        if config.renormalize:
            share_TK = choice_weights(logit_TE, expert_TK, config) / config.scale
            relative_TK = of_softmax(relative_TK, share_TK)
        return relative_TK

    return through


def sigmoid_known(x: Known) -> Known:
    value = torch.sigmoid(x.value)
    steep = value * torch.sigmoid(-x.value)
    return Known(value, root(3 * value, steep * x.wide), steep * x.narrow)


def softmax_known(x: Known) -> Known:
    """Along the last axis."""
    value = torch.softmax(x.value, -1)

    def through(size: Tensor) -> Tensor:
        return value * root(size, (value * size).square().sum(-1, keepdim=True).sqrt().expand_as(size))

    return Known(value, root(value * _of_softmax(x.value), through(x.wide)), through(x.narrow))
