"""The errors that twinfer raises on purpose.

Each message names the thing, its value, and what would be right. The command line prints the message alone and
exits with status 2; anything that is not a `TwinferError` is a bug in twinfer and keeps its traceback.
"""


class TwinferError(ValueError):
    """Something handed to twinfer cannot be used; the message says what would be right."""


class ConfigError(TwinferError):
    """A config field has a value that no model can have, or that this version does not compute."""


class WeightError(TwinferError):
    """A weight is missing, surplus, or of the wrong shape or dtype."""


class RequestError(TwinferError):
    """A call asks for something impossible: a token outside the vocabulary, more tokens than the context holds."""


class CheckpointError(TwinferError):
    """A model folder or file is missing, malformed, truncated, unsafe, or of an unknown architecture."""


class NumericsError(TwinferError):
    """Numbers went wrong on the way (NaN, overflow): the weights, or the arithmetic chosen for them."""


class MachineError(TwinferError):
    """The machine lacks something that the request needs, such as a C++ compiler or a device."""
