"""Finding stop strings in text that arrives in pieces, holding back only what may still become one.

Pure text: it knows neither tokens nor HTTP.
"""

from collections.abc import Sequence


class StopStringFilter:
    """Cuts a text at the first stop string, wherever the pieces' borders fall.

    The first is the one that is complete first; of several complete at the same character, the longest. That is what a
    reader sees who gets one character at a time, so the result does not depend on how the text was cut into tokens.
    """

    def __init__(self, stop: Sequence[str], *, include_in_output: bool = False) -> None:
        self._stop = tuple(stop)
        self._include_in_output = include_in_output
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """Take the next piece; returns what is now certain to be part of the text. After a stop that is nothing."""
        if not self._stop:
            return piece
        if self.stopped:
            return ""
        text = self._held + piece
        found = self._find_first(text)
        if found is not None:
            self.stopped, self._held = True, ""
            start, end = found
            return text[: end if self._include_in_output else start]
        certain = len(text) - self._longest_beginning(text)
        self._held = text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """The text has ended: what was held back did not become a stop string."""
        held, self._held = self._held, ""
        return held

    def _find_first(self, text: str) -> tuple[int, int] | None:
        """(start, end) of the first stop string in `text`."""
        matches = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if not matches:
            return None
        end, start = min(matches)
        return start, end

    def _longest_beginning(self, text: str) -> int:
        """Length of the longest end of `text` with which some stop string begins."""
        return max((_overlap(text, stop) for stop in self._stop), default=0)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
