"""Configs as JSON and back: every field by its name, enums by their values, layers in order.

Numbers come back bit by bit, for JSON writes a float with as many digits as it needs.
"""

from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from enum import Enum
from types import NoneType
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

from ..spec.config import ModelConfig
from ..spec.errors import ConfigError
from .fields import MOST, MOST_NUMBER, short

Config = TypeVar("Config")


def to_json(config: Any) -> dict[str, Any]:
    """A config dataclass as plain values that `json` can write."""
    return dict(asdict(config, dict_factory=lambda items: {name: _plain(value) for name, value in items}))


def from_json(values: object, where: str) -> ModelConfig:
    """A model's config; as `read` does."""
    return read(ModelConfig, values, where)


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


def read(kind: type[Config], values: object, where: str) -> Config:
    """`to_json` undone. Raises `ConfigError` naming the field that is unknown, missing, or not of its type."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where} is {short(values)}; it must be an object")
    hints = get_type_hints(kind)
    if surplus := sorted(values.keys() - hints.keys()):
        raise ConfigError(f"{where}.{surplus[0]} is not known to this version; it must be one of {', '.join(hints)}")
    for field in fields(kind):  # type: ignore[arg-type]
        if field.name not in values and field.default is MISSING:
            raise ConfigError(f"{where}.{field.name} is missing; it must be there")
    return kind(**{name: _value(hints[name], value, f"{where}.{name}") for name, value in values.items()})


def _best_known(kinds: Sequence[Any], value: object) -> type[Any]:
    """Return the config of several that knows most of the value's fields."""
    own = value.keys() if isinstance(value, dict) else set()
    known = [kind for kind in kinds if is_dataclass(kind)]
    return cast("type[Any]", max(known, key=lambda kind: len(own & get_type_hints(kind).keys())))


def _value(hint: Any, value: Any, where: str) -> Any:
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{where} is {short(value)}; it must be a list")
        return tuple(_value(get_args(hint)[0], each, f"{where}[{index}]") for index, each in enumerate(value))
    kinds = get_args(hint) or (hint,)
    if value is None and NoneType in kinds:
        return None
    kind = next(each for each in kinds if each is not NoneType)
    if is_dataclass(kind):
        return read(_best_known(kinds, value), value, where)
    if issubclass(kind, Enum):
        if value not in [each.value for each in kind]:
            raise ConfigError(f"{where} is {short(value)}; it must be one of {', '.join(each.value for each in kind)}")
        return kind(value)
    fits = isinstance(value, int | float) if kind is float else isinstance(value, kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{where} is {short(value)}; it must be of type {kind.__name__}")
    most = {int: MOST, float: MOST_NUMBER}.get(kind)
    if most is not None and not -most <= value <= most:  # which NaN is not either
        raise ConfigError(f"{where} is {short(value)}; it must be from {-most} to {most}")
    return kind(value)
