"""An executable specification of large-transformer inference, with its fast twins beside it.

    >>> import twinfer
    >>> model = twinfer.load("smollm2")  # doctest: +SKIP
    >>> for event in model.generate(["What is the capital of France?"], chat=True):  # doctest: +SKIP
    ...     print(event.text, end="")
    The capital of France is Paris.

`load` gives a `Model`, whose `decoder` is a path; `generate` runs the generation loop on any path, also one of yours.
"""

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
