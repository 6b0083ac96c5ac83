"""A config.json's rotary fields, in the older style or the newer, and the rotation they mean.

Newer: `rope_parameters` holds everything, for all layers or once for each type of layer. Older: `rope_theta` is the
base, `partial_rotary_factor` the part of each head that rotates, and `rope_scaling` the rest, if any.
"""

from dataclasses import dataclass

from torch import Tensor

from ..spec.config import RotaryConfig, RotaryLayout
from ..spec.errors import ConfigError
from . import rotary
from .fields import Fields

KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rotation:
    """How a layer's queries and keys rotate."""

    config: RotaryConfig
    frequency_J: Tensor
    """float64, scaled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What the rotation of a head depends on besides the rotary fields."""

    size: int
    context: int
    """The tokens that the model was made for: `max_position_embeddings`."""
    layout: RotaryLayout = RotaryLayout.HALF_SPLIT
    base: float = 10000.0
    """Where the config does not say."""
    part: float | None = None
    """Of the head's elements, how many rotate where the config does not say; None in families that rotate all."""


def rotation(config: Fields, head: Head, own_base: float | None = None) -> Rotation:
    """The rotation of all layers, or of one that has a base of its own.

    Raises `ConfigError` for a kind of scaling that is not known here.
    """
    base, part = config.number("rope_theta", head.base), _part(config, head, head.part or 1.0)
    scaling = config.section("rope_scaling")
    parameters = config.section("rope_parameters")
    if parameters is not None and scaling is not None:
        raise ConfigError(f"{config.where}rope_scaling and rope_parameters are both given; leave one of them out")
    return _rotation(config, parameters or scaling, head, base, part, own_base)


def rotations(config: Fields, head: Head, local_base: float) -> dict[str, Rotation]:
    """The rotations of layers with a window and without, by the names of those types: Gemma 3.

    In the older style the latter alone are scaled, and `rope_local_base_freq` is the base of the others.
    """
    bases = {
        "full_attention": config.number("rope_theta", head.base),
        "sliding_attention": config.number("rope_local_base_freq", local_base),
    }
    parameters = config.section("rope_parameters")
    if parameters is None:
        sections = {"full_attention": config.section("rope_scaling"), "sliding_attention": None}
    else:
        config.only("rope_scaling", None)
        sections = {kind: parameters.section(kind) for kind in bases}
        parameters.finish()
    return {kind: _rotation(config, sections[kind], head, base, 1.0) for kind, base in bases.items()}


def _rotation(
    config: Fields, scaling: Fields | None, head: Head, base: float, part: float, own_base: float | None = None
) -> Rotation:
    if scaling is not None:
        base, part = scaling.number("rope_theta", base), _part(scaling, head, part)
    base = base if own_base is None else own_base
    size = int(head.size * part)
    frequency_J, attention_factor = rotary.frequencies(base, size), 1.0
    if scaling is not None:
        frequency_J, attention_factor = _scaled(config, scaling, head, base, size, frequency_J)
        scaling.finish()
    turning = RotaryConfig(layout=head.layout, size=2 * len(frequency_J), attention_factor=attention_factor)
    return Rotation(config=turning, frequency_J=frequency_J)


def _part(fields: Fields, head: Head, otherwise: float) -> float:
    """How much of each head rotates."""
    if head.part is None:
        fields.only("partial_rotary_factor", 1.0, 1)
        return 1.0
    part = fields.number("partial_rotary_factor", otherwise)
    if part > 1:
        raise fields.wrong("partial_rotary_factor", "above 0 and at most 1")
    return part


def _scaled(
    config: Fields, scaling: Fields, head: Head, base: float, size: int, frequency_J: Tensor
) -> tuple[Tensor, float]:
    """The scaled frequencies, and by how much what rotates is lengthened."""
    names = {kind: kind for kind in KINDS} | {"su": "longrope"}
    kind = scaling.choice("rope_type", names, scaling.choice("type", names, "default"))
    match kind:
        case "linear":
            return rotary.scaled_linearly(frequency_J, scaling.number("factor")), 1.0
        case "dynamic":
            scaling.number("factor")  # acts on sequences longer than the context alone, which no path extends
            scaling.ignore(("original_max_position_embeddings",))
        case "llama3":
            low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
            if high <= low:
                raise ConfigError(f"{scaling.where}high_freq_factor is {high}; it must be above low_freq_factor, {low}")
            factor, original = scaling.number("factor"), _original_context(config, scaling, head)
            return rotary.scaled_by_band(frequency_J, factor=factor, low=low, high=high, original_context=original), 1.0
        case "yarn":
            return _yarn(config, scaling, head, base, size, frequency_J)
        case "longrope":
            return _longrope(config, scaling, head, frequency_J)
    return frequency_J, 1.0


def _yarn(
    config: Fields, scaling: Fields, head: Head, base: float, size: int, frequency_J: Tensor
) -> tuple[Tensor, float]:
    original = _original_context(config, scaling, head)
    factor = scaling.number("factor", head.context / original)
    if base <= 1:
        raise ConfigError(f"{config.where}rope_theta is {base}; with YaRN it must be above 1")
    scaled_J = rotary.scaled_by_index(
        frequency_J,
        base=base,
        size=size,
        factor=factor,
        fast=scaling.number("beta_fast", 32.0),
        slow=scaling.number("beta_slow", 1.0),
        original_context=original,
        whole=scaling.flag("truncate", True),
    )
    attention_factor = rotary.yarn_attention_factor(factor)
    if scaling.has("mscale") and scaling.has("mscale_all_dim"):
        whole, part = scaling.number("mscale"), scaling.number("mscale_all_dim")
        attention_factor = rotary.yarn_attention_factor(factor, whole) / rotary.yarn_attention_factor(factor, part)
    scaling.ignore(("mscale", "mscale_all_dim"))  # one of them alone says nothing
    return scaled_J, scaling.number("attention_factor", attention_factor)


def _longrope(config: Fields, scaling: Fields, head: Head, frequency_J: Tensor) -> tuple[Tensor, float]:
    """Divisors for short texts or for long ones, chosen once, by how many tokens the model is opened for.

    Keys once rotated cannot be rotated otherwise when a text outgrows the original context.
    """
    original = _original_context(config, scaling, head)
    factor = scaling.number("factor", head.context / original)
    if original < 2:
        raise ConfigError(
            f"{config.where}original_max_position_embeddings is {original}; with LongRoPE it must be above 1"
        )
    divisors = {kind: scaling.numbers(f"{kind}_factor") for kind in ("short", "long")}
    for kind, found in divisors.items():
        if len(found) != len(frequency_J):
            raise scaling.wrong(f"{kind}_factor", f"a list of {len(frequency_J)} numbers above 0")
    chosen = divisors["long" if config.limited(head.context) > original else "short"]
    if config.limited(head.context) > original:
        config.notes.append(rotary.note_on_long_texts(config.limited(head.context), original))
    attention_factor = scaling.number("attention_factor", rotary.longrope_attention_factor(factor, original))
    return rotary.divided(frequency_J, chosen), attention_factor


def _original_context(config: Fields, scaling: Fields, head: Head) -> int:
    """Tokens that the model was first trained on; Phi-3 says so beside the rotary fields, which then counts."""
    inside = scaling.integer("original_max_position_embeddings", head.context)
    return config.integer("original_max_position_embeddings", inside)
