"""Arguments that programs are compiled on, with sequences of their own; every size that varies later differs here.

Loops over sizes that are small when a program is compiled would be compiled as serial ones.
"""

from dataclasses import replace
from typing import Any

import torch

from ..spec.config import ModelConfig
from .linear import PASS_ROWS
from .programs import Program
from .sequences import StaticSequences
from .weights import Model

_TOKENS, _SLOTS, _CAPACITY = 160, 224, 352
_TEXT = 20
"""Tokens of each text that is encoded."""


def example(name: Program, model: Model, config: ModelConfig) -> tuple[Any, ...]:
    """Return arguments of a program, the model first; `steps` says what they are."""
    device = model.device
    token_T = torch.zeros(_TOKENS, dtype=torch.int64, device=device)
    position_T = torch.arange(_TOKENS, device=device) % config.context
    if name is Program.ENCODE:
        type_T = torch.zeros_like(token_T) if config.token_types else None
        return model, token_T, type_T, position_T, torch.arange(0, _TOKENS + 1, _TEXT)
    rows = {Program.DECODE_ROWS: PASS_ROWS, Program.DECODE_MANY: PASS_ROWS + 2}.get(name, 1)
    different = dict.fromkeys(config.layers)  # layers of one config may share a cache, which saves memory
    part = replace(config, layers=tuple(different))
    sequences = StaticSequences(part, rows, _CAPACITY, device, model.compute)
    cache_of = dict(zip(different, sequences.caches, strict=True))
    caches = tuple(cache_of[layer] for layer in config.layers)
    start_R, slot_S = torch.arange(rows, device=device) * _CAPACITY, torch.arange(_SLOTS, device=device)
    if name is Program.PREFILL:
        return model, caches, token_T, position_T, start_R, slot_S
    return model, caches, torch.stack([0 * start_R, 0 * start_R, start_R]), slot_S
