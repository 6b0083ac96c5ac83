"""An executable specification of large-transformer inference, with its fast twins beside it.

    >>> import twinfer
    >>> model = twinfer.load("smollm2")  # doctest: +SKIP
    >>> for event in model.generate(["What is the capital of France?"], chat=True):  # doctest: +SKIP
    ...     print(event.text, end="")
    The capital of France is Paris.

`load` gives a `Model`, whose `decoder` is a path; `generate` runs the generation loop on any path, also one of yours.


Everything is imported when it is first asked for: torch takes seconds, and the command line has to be ready before.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from twinfer.reference.sampling import Sampling
    from twinfer.spec.config import Storage
    from twinfer.spec.decoder import Decoder, Path
    from twinfer.spec.errors import TwinferError

    from .generation import Event, Generation, Output, Stop, Timings, generate
    from .loading import Model, from_transformers, load
    from .paths import Compute

__all__ = [
    "Compute",
    "Decoder",
    "Event",
    "Generation",
    "Model",
    "Output",
    "Path",
    "Sampling",
    "Stop",
    "Storage",
    "Timings",
    "TwinferError",
    "from_transformers",
    "generate",
    "load",
]

_PLACES = {
    "reference.sampling": ("Sampling",),
    "spec.config": ("Storage",),
    "spec.decoder": ("Decoder", "Path"),
    "spec.errors": ("TwinferError",),
    "generation": ("Event", "Generation", "Output", "Stop", "Timings", "generate"),
    "loading": ("Model", "from_transformers", "load"),
    "paths": ("Compute",),
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        for module, names in _PLACES.items():
            if name in names:
                return globals().setdefault(name, getattr(import_module(f"twinfer.{module}"), name))
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
