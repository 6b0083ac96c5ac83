"""What an MLP is: its width, its activation, and whether it is gated."""

from dataclasses import dataclass
from enum import StrEnum

from .errors import ConfigError


class Activation(StrEnum):
    """The non-linearity inside an MLP."""

    GELU = "gelu"
    """x * Phi(x), with the exact normal distribution function (erf)."""
    GELU_TANH = "gelu_tanh"
    """The tanh approximation of GELU, which GPT-2 was trained with. Not interchangeable with `GELU`."""
    GELU_SIGMOID = "gelu_sigmoid"
    """x * sigmoid(1.702 x), the sigmoid approximation of GELU, also called quick: CLIP, gpt-oss."""
    RELU = "relu"
    SILU = "silu"
    """x * sigmoid(x), also called swish."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpConfig:
    width: int
    """Intermediate size, F."""
    activation: Activation
    gated: bool
    """down(activation(gate(x)) * (up(x) + up_offset)) if true, else down(activation(up(x)))."""
    bias: bool = False
    clamp: float | None = None
    """Before the activation gate(x) is cut to at most clamp, and up(x) to -clamp .. clamp: gpt-oss."""
    up_offset: float = 0.0
    """gpt-oss: 1."""

    def __post_init__(self) -> None:
        require_positive(self, "width")
        require(self.clamp is None or self.clamp > 0, "MlpConfig.clamp", self.clamp, "a positive number, or None")
        for field, plain in (("clamp", None), ("up_offset", 0.0)):
            value = getattr(self, field)
            require(self.gated or value == plain, f"MlpConfig.{field}", value, f"{plain} where the MLP is not gated")


def require_positive(config: object, *fields: str) -> None:
    """Raise `ConfigError` for the first of the fields that is not at least 1."""
    for field in fields:
        value = getattr(config, field)
        require(value > 0, f"{type(config).__name__}.{field}", value, "at least 1")


def require(holds: bool, field: str, value: object, right: str) -> None:
    """Raise `ConfigError`, saying what the field must be, unless the condition holds."""
    if not holds:
        raise ConfigError(f"{field} is {value!r}; it must be {right}")
