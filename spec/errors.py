"""The errors that twinfer raises on purpose.

Each message names the thing, its value, and what would be right. The command line prints the message alone and
exits with status 2; anything that is not a `TwinferError` is a bug in twinfer and keeps its traceback.
"""

LONGEST = 1000
"""Characters of a message; of a longer one, the middle is left out."""


def one_line(text: str) -> str:
    """Return a text as one line that a terminal shows and does not obey.

    Names in files may hold anything, also a megabyte of it, or what clears the screen:

        >>> one_line("no such  tensor:\\n\\x1b[2J")
        'no such tensor: \\\\x1b[2J'
    """
    line = " ".join(text.split())
    line = "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in line)
    if len(line) <= LONGEST:
        return line
    return f"{line[: LONGEST * 6 // 10]} ... {line[-LONGEST * 4 // 10 + 5 :]}"  # the remedy comes last


class TwinferError(ValueError):
    """Something handed to twinfer cannot be used; the message says what would be right, in one line."""

    def __str__(self) -> str:
        return one_line(super().__str__())


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
