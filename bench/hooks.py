"""Looking on at torch: functions of the compiler that report while a benchmark runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(owner: type, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Call this function meanwhile where the class's own of that name would be called.

    >>> class Greeter:
    ...     def greet(self): return "hello"
    >>> with replaced(Greeter, "greet", lambda self: "good evening"):
    ...     Greeter().greet()
    'good evening'
    >>> Greeter().greet()
    'hello'
    """
    own = owner.__dict__[name]
    setattr(owner, name, function)
    try:
        yield
    finally:
        setattr(owner, name, own)
