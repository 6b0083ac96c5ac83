"""A config file's fields, each read by name, so that none can change the result unread.

A family's declaration reads every field it understands; `finish` then raises for whatever is left. Errors name the
file, the field, its value, and what would be right.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch

from ..spec.errors import CheckpointError, ConfigError

T = TypeVar("T")

MOST = 2**31 - 1
"""No size of a model comes near; a damaged file may say so, and must not make anything that large."""

MOST_LAYERS = 10_000

LEAST_NUMBER, MOST_NUMBER = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
"""Paths compute in float32, or in float16 and bfloat16 with float32 beside; outside these there is 0 or infinity."""

_RANGE = f"above 0, from {LEAST_NUMBER:.3g} to {MOST_NUMBER:.3g}"

_DEEPEST = 64
"""Levels of nesting in a JSON file; published ones have fewer than ten."""

_REQUIRED: Any = object()


class Fields:
    """The fields of one JSON object or metadata table. `where` begins every message.

    `most_tokens` is how many tokens a sequence will hold at most, where whoever opens the model has said so.
    """

    def __init__(self, values: Mapping[str, Any], where: str, *, most_tokens: int | None = None):
        self.values = values
        self._read: set[str] = set()
        self.where = where
        self.most_tokens = most_tokens
        self.notes: list[str] = []
        """What whoever opens the model should know, though nothing is wrong."""

    def limited(self, context: int) -> int:
        """The tokens that a sequence may hold, of a model made for `context`."""
        return context if self.most_tokens is None else min(context, self.most_tokens)

    @classmethod
    def of_json(
        cls, content: bytes, where: str, *, most_tokens: int | None = None, remedy: str = "fetch the file again"
    ) -> "Fields":
        """Parse a JSON object. Raises `CheckpointError` where it is none."""
        values = parsed_json(content, where, remedy)
        if not isinstance(values, dict):
            raise CheckpointError(f"{where} holds a JSON {type(values).__name__}; it must hold an object")
        return cls(values, f"{where}: ", most_tokens=most_tokens)

    def names(self) -> list[str]:
        return list(self.values)

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(name) is not None

    def integer(self, name: str, default: int | None = _REQUIRED, *, least: int = 1, most: int = MOST) -> int:
        """A whole number from `least` to `most`."""
        value = self._take(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.wrong(name, f"a whole number from {least} to {most}")
        return value

    def optional_integer(self, name: str, absent: int | None) -> int | None:
        """A whole number of at least 1, or null, which is not the same as the field being absent."""
        if name in self.values and self.values[name] is None:
            self._read.add(name)
            return None
        return absent if name not in self.values else self.integer(name)

    def number(self, name: str, default: float = _REQUIRED) -> float:
        """A finite number above zero that float32 can hold."""
        value = self._take(name, default)
        if not _is_number(value):
            raise self.wrong(name, f"a finite number {_RANGE}")
        return float(value)

    def numbers(self, name: str, *, zero: bool = False) -> list[float]:
        """A list of such numbers; with `zero`, 0 is one of them."""
        value = self._take(name, _REQUIRED)
        fits = [_is_number(item) or (zero and _is_zero(item)) for item in value] if isinstance(value, list) else [False]
        if not all(fits):
            raise self.wrong(name, f"a list of finite numbers {'that are 0 or ' if zero else ''}{_RANGE}")
        return [float(item) for item in value]

    def optional_number(self, name: str) -> float | None:
        """A number as `number` takes it, or None where it is absent or null."""
        self._read.add(name)
        return self.number(name) if self.has(name) else None

    def flag(self, name: str, default: bool = _REQUIRED) -> bool:
        value = self._take(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def text(self, name: str, default: str = _REQUIRED) -> str:
        value = self._take(name, default)
        if not isinstance(value, str):
            raise self.wrong(name, "a string")
        return value

    def optional_text(self, name: str) -> str | None:
        """A string, or None where it is absent or null."""
        self._read.add(name)
        return self.text(name) if self.has(name) else None

    def texts(self, name: str) -> list[str]:
        """A list of strings."""
        value = self._take(name, _REQUIRED)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(name, "a list of strings")
        return value

    def integers(self, name: str, *, least: int = 0) -> list[int]:
        """A list of whole numbers; one alone counts as a list of one, and null or nothing as an empty one."""
        value = self._take(name, [])
        items = value if isinstance(value, list) else [value]
        if any(isinstance(item, bool) or not isinstance(item, int) or not least <= item <= MOST for item in items):
            raise self.wrong(name, f"a whole number from {least} to {MOST}, or a list of them")
        return items

    def choice(self, name: str, known: Mapping[str, T], default: str = _REQUIRED) -> T:
        """What `known` holds for the field's value."""
        value = self._take(name, default)
        if not isinstance(value, str) or value not in known:
            raise self.wrong(name, "one of " + ", ".join(known))
        return known[value]

    def only(self, name: str, *computed: object) -> None:
        """Refuse any value but these, which are what is computed; the first also stands for an absent field."""
        value = self.values.get(name, computed[0])
        self._read.add(name)
        if value not in computed:
            raise self.wrong(name, f"{json.dumps(computed[0])}, which is all that this version computes")

    def section(self, name: str) -> "Fields | None":
        """The object that the field holds, as fields of its own; None where it is absent or null."""
        self._read.add(name)
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(name, "an object or null")
        section = Fields(value, f"{self.where}{name}.")
        section.notes = self.notes
        return section

    def ignore(self, names: Iterable[str]) -> None:
        """Mark fields as known to leave results unchanged."""
        self._read.update(names)

    def finish(self) -> None:
        """Raise `ConfigError` if a field was neither read nor ignored."""
        for name, value in self.values.items():
            if name not in self._read:
                raise ConfigError(
                    f"{self.where}{name} is {short(value)}; this version does not know what that field means, and it "
                    "may change the results; remove it only if you know that it does not"
                )

    def wrong(self, name: str, right: str) -> ConfigError:
        """The error for a field whose value cannot be used."""
        if name not in self.values:
            return ConfigError(f"{self.where}{name} is missing; it must be {right}")
        return ConfigError(f"{self.where}{name} is {short(self.values[name])}; it must be {right}")

    def _take(self, name: str, default: Any) -> Any:
        """The value, or the default where it is absent or null."""
        self._read.add(name)
        value = self.values.get(name)
        return value if value is not None else None if default is _REQUIRED else default


def parsed_json(content: bytes | str, where: str, remedy: str = "fetch the file again") -> Any:
    """Parse JSON. Raises `CheckpointError` where it is none, nested too deeply, or holds text that is not Unicode."""
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not valid JSON ({error}); {remedy}") from None
    left = [(values, 1)]
    while left:
        value, depth = left.pop()
        if depth > _DEEPEST:
            raise CheckpointError(f"{where} holds JSON nested more than {_DEEPEST} levels deep; {remedy}")
        if isinstance(value, str) and any("\ud800" <= sign <= "\udfff" for sign in value):
            raise CheckpointError(f"{where} holds {short(value)}, half a surrogate pair; it must be Unicode: {remedy}")
        if isinstance(value, dict):
            left += [(each, depth) for each in value]
        if isinstance(value, dict | list):
            left += [(each, depth + 1) for each in (value.values() if isinstance(value, dict) else value)]
    return values


def _is_number(value: object) -> bool:
    fits = isinstance(value, int | float) and not isinstance(value, bool)
    return fits and LEAST_NUMBER <= value <= MOST_NUMBER  # type: ignore[operator]


def _is_zero(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == 0


def short(value: object) -> str:
    """A value as one line of at most 80 characters."""
    line = json.dumps(value, default=str)
    return line if len(line) <= 80 else line[:77] + "..."
