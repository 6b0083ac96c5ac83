"""Errors in one line, for a table or a row."""

from ..spec.errors import TwinferError


def reason(error: Exception) -> str:
    """Return an error in one line, cut where another library goes on; this project's own say all there is to say.

    >>> reason(OSError("no\\nspace")), reason(TwinferError("a is 3")), reason(KeyError())
    ('OSError: no space', 'a is 3', 'KeyError')
    """
    words = " ".join(str(error).split())
    if isinstance(error, TwinferError):
        return words
    return f"{type(error).__name__}: {words[:300]}" if words else type(error).__name__
