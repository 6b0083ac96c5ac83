"""When experts are used, and which of those that are held goes first: the policies of a cache of experts.

A step goes through the layers in order, so the next use of an expert is at least as far away as its layer, and whole
steps farther if the next token does not choose it. With chance p that a token does,

    layers to go + layers of the model * (1 / p - 1)

is how many layers away the next use is expected to be. `Policy.NEXT_USE` gives up the largest, also if it was used just
now. p is estimated from the past at two rates, since tokens choose as the one before did and as the text does:

    p = recent / 5 + long * 4 / 5    each an average of used (1) or not (0), renewed by 1/2 and 1/50 with each token

The long one is a plain mean until 50 tokens were seen, of them and of k / E, which is all that is known at first.

In a model of 30 layers, at layer 3, of two experts with p = 1/2 that of layer 2 goes, whose turn comes in 29 layers,
before that of layer 5. The other two policies are known from caches of all kinds.
"""

from collections.abc import Sequence
from enum import StrEnum

Expert = tuple[int, int]
"""Layer and number; layers are counted among those that have experts."""

_RECENT, _LONG = 1 / 2, 1 / 50
_SHARE_OF_RECENT = 1 / 5
_LEAST = 1 / 100
"""The least chance that is believed in."""


class Policy(StrEnum):
    """Which expert goes first."""

    LEAST_RECENT = "least recently used"
    LEAST_FREQUENT = "least frequently used"
    """Of equals the least recently used."""
    NEXT_USE = "next use expected last"


class Uses:
    """What is known of the past: `experts` and `top_k` of each layer that has experts."""

    def __init__(self, experts: Sequence[int], top_k: Sequence[int], policy: Policy) -> None:
        self.policy = policy
        shares = [(k / count, count) for count, k in zip(experts, top_k, strict=True)]
        self._recent = [[share] * count for share, count in shares]
        self._long = [[share] * count for share, count in shares]
        self._tokens = [0 for _ in shares]
        self._last: dict[Expert, int] = {}
        self._count: dict[Expert, int] = {}
        self._now = 0
        self._layer = 0

    def note(self, used: set[Expert]) -> None:
        """Note the experts of a layer that were used together."""
        self._now += 1
        for layer in {layer for layer, _ in used}:
            self._layer = layer
            self._tokens[layer] += 1
            renewed = max(_LONG, 1 / (self._tokens[layer] + 1))
            recent_E, long_E = self._recent[layer], self._long[layer]
            for expert in range(len(recent_E)):
                use = float((layer, expert) in used)
                recent_E[expert] += _RECENT * (use - recent_E[expert])
                long_E[expert] += renewed * (use - long_E[expert])
        for each in used:
            self._last[each] = self._now
            self._count[each] = self._count.get(each, 0) + 1

    def first_to_go(self, held: Sequence[Expert], used: set[Expert]) -> Expert:
        """Return which of the held experts goes; by policies that only look back, none that was used just now.

        Where all were used just now, one of them must go all the same.
        """
        others = [each for each in held if each not in used]
        match self.policy:
            case Policy.NEXT_USE:
                return max(held, key=lambda each: (self._distance(each), each))
            case Policy.LEAST_RECENT:
                return min(others or held, key=lambda each: (self._last.get(each, 0), each))
            case Policy.LEAST_FREQUENT:
                return min(others or held, key=lambda each: (self._count.get(each, 0), self._last.get(each, 0), each))

    def _distance(self, expert: Expert) -> float:
        layers, (layer, number) = len(self._recent), expert
        to_go = (layer - self._layer - 1) % layers + 1
        recent, long = self._recent[layer][number], self._long[layer][number]
        chance = max(_LEAST, _SHARE_OF_RECENT * recent + (1 - _SHARE_OF_RECENT) * long)
        return to_go + layers * (1 / chance - 1)
