"""Text from a stream of tokens, cut at the first stop string, wherever token boundaries fall."""

from collections.abc import Sequence
from typing import Protocol


class TextStream(Protocol):
    """An incremental tokenizer."""

    def add(self, token: int, /) -> str:
        """The characters that the token completed."""
        ...

    def pending(self) -> str:
        """What `finish` would return now, while more tokens may come."""
        ...

    def finish(self) -> str:
        """What is left, once no more tokens come."""
        ...


class StopWatch:
    """Passes text on, but holds back an end that may turn out to begin a stop string.

    With the stop string "--Q", the pieces "a-", "-b", "--", "Q:" come out as "a", "--b", "", "", and the last one says
    that the string was found. Of several strings, the one that is complete first cuts the text.
    """

    def __init__(self, stream: TextStream, stops: Sequence[str]):
        self._stream = stream
        self._stops = tuple(stops)
        self._held = ""

    def add(self, token: int) -> tuple[str, bool]:
        """The text that this token settled, and whether a stop string ended it."""
        text = self._held + self._stream.add(token)
        spelled = text + self._stream.pending() if self._stops else text  # of the tokens so far, as decoded at once
        found = [(spelled.find(stop) + len(stop), spelled.find(stop)) for stop in self._stops if stop in spelled]
        if found:
            _, begin = min(found)
            self._held = ""
            return spelled[:begin], True
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def rest(self) -> str:
        """What was held back, once no more tokens come."""
        text, self._held = self._held + self._stream.finish(), ""
        return text


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text begin the stop string.

    >>> _overlap("to be or", "or not"), _overlap("to be or", "be")
    (2, 0)
    """
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
