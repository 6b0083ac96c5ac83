"""Shaping the next-token distribution: each function takes logits [V] and returns logits [V].

A token is ruled out by the logit -inf. Ties are broken by token id, the lower one winning, so that results do not
depend on the sorting algorithm.

Shapes: V vocabulary, T tokens so far.
"""

import torch
from torch import Tensor


def penalize_repetition(logits_V: Tensor, previous_T: Tensor, penalty: float) -> Tensor:
    """Make tokens that already occurred less likely: positive logits are divided by the penalty, negative multiplied.

    Keskar et al. 2019, section 4.1, divide whatever the sign, which makes negative logits likelier; the rule by sign is
    the one in use since. How often a token occurred does not matter. 1.0 changes nothing.
    """
    seen_V = torch.isin(torch.arange(len(logits_V), device=logits_V.device), previous_T)
    return torch.where(seen_V, torch.where(logits_V > 0, logits_V / penalty, logits_V * penalty), logits_V)


def scale_temperature(logits_V: Tensor, temperature: float) -> Tensor:
    """Divide by the temperature: below 1 sharpens, above 1 flattens."""
    return logits_V / temperature


def keep_top_k(logits_V: Tensor, k: int) -> Tensor:
    """Rule out all but the k likeliest tokens.

    >>> keep_top_k(torch.tensor([1.0, 3.0, 3.0, 2.0]), 1).tolist()
    [-inf, 3.0, -inf, -inf]
    """
    order_V = torch.sort(logits_V, descending=True, stable=True).indices
    return logits_V.index_fill(0, order_V[min(k, len(order_V)) :], -torch.inf)


def keep_top_p(logits_V: Tensor, p: float) -> Tensor:
    """Keep the fewest likeliest tokens whose probabilities add up to at least p, where p > 0; 1 keeps all.

    Holtzman et al. 2020 (nucleus sampling). A token stays iff those likelier than it add up to less than p:

        >>> keep_top_p(torch.tensor([0.5, 0.3, 0.2]).log(), 0.6).isfinite().tolist()
        [True, True, False]
    """
    if p >= 1:  # the rounding of a long sum must not rule out what no sum was to rule out
        return logits_V
    sorted_V, order_V = torch.sort(logits_V, descending=True, stable=True)
    probability_V = torch.softmax(sorted_V.to(torch.float64), -1)
    likelier_V = probability_V.cumsum(-1) - probability_V
    return logits_V.index_fill(0, order_V[likelier_V >= p], -torch.inf)


def keep_min_p(logits_V: Tensor, p: float) -> Tensor:
    """Rule out tokens less than p times as likely as the likeliest. Nguyen et al. 2024."""
    return logits_V.masked_fill(torch.exp(logits_V - logits_V.max()) < p, -torch.inf)
