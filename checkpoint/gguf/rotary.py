"""The rotary keys and tensors of a GGUF file, and the rotation they mean."""

import torch
from torch import Tensor

from ...spec.config import RotaryConfig
from ...spec.errors import ConfigError, WeightError
from .. import rotary
from ..fields import LEAST_NUMBER, MOST_NUMBER, Fields
from ..rotary_fields import Rotation
from .architectures import Architecture
from .file import REMEDY, GgufFile

DIVISORS = "rope_freqs.weight"
"""By what each pair's frequency is to be divided: how converters write down LLaMA 3.1's scaling."""

LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
"""The same for LongRoPE: for contexts longer than the original one, and for others."""

TENSORS = (DIVISORS, LONG, SHORT)

SAME = 2**-22
"""How far apart a number and its float32 may be, relatively."""


def rotations(
    architecture: Architecture, fields: Fields, file: GgufFile, head_size: int, context: int
) -> tuple[Rotation | None, Rotation | None]:
    """Of layers that see everything, and of those with a window. Raises `ConfigError` or `WeightError`."""
    if architecture.rotary is None:
        fields.ignore(("rope.dimension_count", "rope.freq_base"))  # of no use, and written all the same
        return None, None
    if architecture.rotation_switch:
        fields.only("rope.scaling.finetuned", True)
    if architecture.permuted:
        fields.only("rope.dimension_count", head_size)  # half of a head's pairs cannot be put back into their places
    size = fields.integer("rope.dimension_count", head_size)
    base = fields.number("rope.freq_base", 10000.0)
    frequency_J, attention_factor = _scaled(fields, file, base, size, context, whole=architecture.whole_yarn)
    turning = RotaryConfig(layout=architecture.rotary, size=size, attention_factor=attention_factor)
    everywhere, windows = Rotation(config=turning, frequency_J=frequency_J), architecture.windows
    if windows is None:
        return everywhere, None
    if windows.alone:
        return None, everywhere
    local = fields.number("rope.freq_base_swa", windows.base or base)
    if windows.scaled:
        if local != base:
            raise fields.wrong("rope.freq_base_swa", f"that of the other layers, {base}")
        return everywhere, everywhere
    plain = RotaryConfig(layout=architecture.rotary, size=size)
    return everywhere, Rotation(config=plain, frequency_J=rotary.frequencies(local, size))


def _scaled(
    fields: Fields, file: GgufFile, base: float, size: int, context: int, *, whole: bool
) -> tuple[Tensor, float]:
    """The scaled frequencies, and by how much what rotates is lengthened."""
    frequency_J, attention_factor = rotary.frequencies(base, size), 1.0
    kinds = {kind: kind for kind in ("none", "linear", "yarn", "longrope")}
    kind = fields.choice("rope.scaling.type", kinds, "linear")
    factor = fields.number("rope.scaling.factor", fields.number("rope.scale_linear", 1.0))
    original = fields.integer("rope.scaling.original_context_length", context)
    if kind == "linear":
        frequency_J = rotary.scaled_linearly(frequency_J, factor)
    if kind == "yarn":
        frequency_J, attention_factor = _yarn(fields, frequency_J, base, size, factor, original, whole)
    if DIVISORS in file.shapes:
        frequency_J = frequency_J / _divisors(file, DIVISORS, size)
    if LONG in file.shapes or SHORT in file.shapes:
        if kind in ("yarn", "longrope") and factor != 1:
            raise fields.wrong("rope.scaling.factor", f"absent, since {LONG} holds a factor for each pair")
        chosen = LONG if fields.limited(context) > original else SHORT
        if chosen == LONG:
            fields.notes.append(rotary.note_on_long_texts(fields.limited(context), original))
        return frequency_J / _divisors(file, chosen, size), fields.number("rope.scaling.attn_factor")
    if kind == "longrope":
        raise WeightError(f"{file.where} lacks {LONG} and {SHORT}, which rope.scaling.type longrope asks for")
    fields.only("rope.scaling.attn_factor", 1.0)
    return frequency_J, attention_factor


def _yarn(
    fields: Fields, frequency_J: Tensor, base: float, size: int, factor: float, original: int, whole: bool
) -> tuple[Tensor, float]:
    fields.only("rope.scaling.yarn_ext_factor", 1.0)
    if base <= 1:
        raise fields.wrong("rope.freq_base", "above 1, with YaRN")
    scaled_J = rotary.scaled_by_index(
        frequency_J,
        base=base,
        size=size,
        factor=factor,
        fast=fields.number("rope.scaling.yarn_beta_fast", 32.0),
        slow=fields.number("rope.scaling.yarn_beta_slow", 1.0),
        original_context=original,
        whole=whole,
    )
    attention_factor = rotary.yarn_attention_factor(factor)
    given = fields.number("rope.scaling.yarn_attn_factor", attention_factor)
    if abs(given - attention_factor) > SAME * attention_factor:
        right = (
            f"absent or {attention_factor:.6g}, YaRN's own: "
            "readers disagree on whether another replaces or multiplies it"
        )
        raise fields.wrong("rope.scaling.yarn_attn_factor", right)
    return scaled_J, attention_factor


def _divisors(file: GgufFile, name: str, size: int) -> Tensor:
    if name not in file.shapes:
        raise WeightError(f"{file.where} lacks {name}, though it holds its counterpart; fetch it again")
    shape = file.shapes[name]
    if shape != (size // 2,):
        raise WeightError(f"{file.where}: {name} has shape {list(shape)}; it must be {[size // 2]}")
    if reason := file.unreadable(name):
        raise WeightError(f"{file.where}: {name} is {reason}; {REMEDY}")
    divisor_J = file.read(name).to(torch.float64)
    for divisor in divisor_J.tolist():
        if not LEAST_NUMBER <= divisor <= MOST_NUMBER:
            raise ConfigError(f"{file.where}: {name} holds {divisor}; all must be above 0 and finite")
    return divisor_J
