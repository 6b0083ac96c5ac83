"""The experts that a path's tokens chose, noted within its programs where somebody asks.

Why it costs nothing otherwise: a mixture's weights then hold no place to note choices in. With one, each layer writes
them there within its piece, so a recorded decode step stays one.

Shapes: T tokens, K = top_k, P tokens of the longest call.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..spec.config import ModelConfig
from ..spec.errors import RequestError
from ..spec.moe import MoeConfig
from .moe import Moe
from .weights import Model

_LONGEST = 512
"""The most tokens of a call whose choices are noted: those of a piece of a prompt, or of sequences that gain one."""


class Routes:
    """Notes the choices of the last `extend`, or nothing."""

    def __init__(self, model: Model, config: ModelConfig, *, noted: bool) -> None:
        self.noted = noted
        self.unnoted = model
        self.model = model
        """The same weights, with a place for each mixture's choices where they are noted."""
        self._chosen: list[Tensor] = []
        self._noted: list[list[Tensor]] = []
        if not noted:
            return
        layers = []
        for layer, weights in zip(config.layers, model.layers, strict=True):
            if isinstance(layer.mlp, MoeConfig) and isinstance(weights.mlp, Moe):
                chosen_PK = torch.zeros(_LONGEST, layer.mlp.router.top_k, dtype=torch.int64, device=model.device)
                self._chosen.append(chosen_PK)
                weights = weights._replace(mlp=weights.mlp._replace(chosen_PK=chosen_PK))
            layers.append(weights)
        self.model = model._replace(layers=tuple(layers))

    def begin(self, sequences: int) -> list[list[Tensor]]:
        """Return where the choices of a call are going to stand: for each sequence, for each mixture, int64 [T, K].

        Raises `RequestError` for more sequences than one call has places for.
        """
        if sequences > _LONGEST:
            raise RequestError(f"{sequences} sequences; with routes a path extends at most {_LONGEST} at once")
        self._noted = [[chosen_PK[:0].clone() for chosen_PK in self._chosen] for _ in range(sequences)]
        return self._noted

    def note_step(self, rows: Sequence[int]) -> None:
        """Note a decode step of these sequences; one that only fills up a pass repeats the last and is noted once."""
        if self.noted:
            for place, row in enumerate(dict.fromkeys(rows)):
                self._note(row, slice(place, place + 1))

    def note_tokens(self, row: int, count: int) -> None:
        """Note so many tokens of one sequence."""
        if self.noted:
            self._note(row, slice(count))

    def _note(self, row: int, places: slice) -> None:
        now = (chosen_PK[places] for chosen_PK in self._chosen)
        self._noted[row][:] = [torch.cat(pair) for pair in zip(self._noted[row], now, strict=True)]
