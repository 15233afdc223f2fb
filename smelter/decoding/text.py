"""What one answer has written: its bytes up to a stop, and the text of them that may be shown already.

Two things hold text up. A character may be spread over several tokens. And what may become a stop must not be shown
before it is sure that it does not; stops are therefore looked for in the bytes, across the borders of tokens.
"""

import codecs
import re
from collections.abc import Sequence

Stop = str | re.Pattern[bytes]
"""Ends a text and is cut off. Before a pattern nothing can be shown: it may begin anywhere."""


class Text:
    """The text of one answer, without the `skip` bytes at its beginning that repeat the prompt."""

    def __init__(self, stops: Sequence[Stop] = (), skip: int = 0) -> None:
        self._strings = [stop.encode() for stop in stops if isinstance(stop, str) and stop]
        self._patterns = [stop for stop in stops if not isinstance(stop, str)]
        self._raw = bytearray()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.skip = skip
        self.num_shown = skip
        """Bytes that have been shown, or never will be."""
        self.stop: str | None = None
        """The stop that ended the text."""

    @property
    def num_bytes(self) -> int:
        """Bytes that have come in, those to skip included, up to the stop if there was one."""
        return len(self._raw)

    def push(self, raw: bytes) -> bool:
        """Take a token's bytes; true if they complete a stop, after which nothing more may be pushed."""
        self._raw += raw
        matches = [(at + len(stop), at) for stop in self._strings if (at := self._raw.find(stop, self.num_shown)) >= 0]
        for pattern in self._patterns:
            if match := pattern.search(self._raw, self.skip):
                matches.append((match.end(), match.start()))
        if not matches:
            return False
        end, start = min(matches)  # the first that is complete: it does not matter how the bytes were cut into tokens
        self.stop = self._raw[start:end].decode("utf-8", "replace")
        del self._raw[start:]
        return True

    def show(self) -> str:
        """What may be shown now and was not before."""
        return self._show(len(self._raw) - self._held_back(), final=False)

    def close(self) -> str:
        """The answer has ended: returns the rest."""
        return self._show(len(self._raw), final=True)

    def _held_back(self) -> int:
        """How many of the last bytes could be the beginning of a stop."""
        num_hidden = len(self._raw) - self.num_shown
        if self._patterns:
            return num_hidden
        longest = 0
        for stop in self._strings:
            sizes = range(min(len(stop) - 1, num_hidden), longest, -1)
            longest = next((size for size in sizes if self._raw.endswith(stop[:size])), longest)
        return longest

    def _show(self, end: int, *, final: bool) -> str:
        text = self._decoder.decode(bytes(self._raw[self.num_shown : end]), final)
        self.num_shown = max(self.num_shown, end)
        return text
