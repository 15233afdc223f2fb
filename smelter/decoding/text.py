"""Text as it may be shown: tokens come in as bytes, characters go out, and nothing has to be taken back.

Two things hold text up. A character may be spread over several tokens. And what may become a stop string must not
be shown before it is sure that it does not; stop strings are therefore looked for in the bytes, across the borders of
tokens.
"""

import codecs
from collections.abc import Sequence


class TextStream:
    """The text of one answer, without the `skip` bytes at its beginning that repeat the prompt."""

    def __init__(self, stops: Sequence[str] = (), skip: int = 0) -> None:
        self._stops = [stop.encode() for stop in stops if stop]
        self.skip = skip
        """Bytes that are still to come and do not count."""
        self._raw = bytearray()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.num_shown = 0
        """Bytes that have been given out, of those that count (after `skip`)."""
        self.stop: str | None = None
        """The stop string that ended the text."""

    @property
    def num_bytes(self) -> int:
        """Bytes that have come in, after `skip`, up to the stop string if there was one."""
        return len(self._raw)

    def push(self, raw: bytes) -> str:
        """Take a token's bytes; returns what may be shown now. After a stop string nothing more may be pushed."""
        if self.skip:
            raw, self.skip = raw[self.skip :], max(0, self.skip - len(raw))
        self._raw += raw
        found = [(at, stop) for stop in self._stops if (at := self._raw.find(stop, self.num_shown)) >= 0]
        if found:
            # The first that is complete, so that it does not matter how the bytes were cut into tokens.
            at, stop = min(found, key=lambda each: (each[0] + len(each[1]), each[0]))
            self.stop = stop.decode()
            del self._raw[at:]
            return self._show(len(self._raw), final=True)
        return self._show(len(self._raw) - self._held_back(), final=False)

    def close(self) -> str:
        """The answer has ended: returns the rest."""
        return self._show(len(self._raw), final=True)

    def _held_back(self) -> int:
        """How many of the last bytes could be the beginning of a stop string."""
        longest = 0
        for stop in self._stops:
            most = min(len(stop) - 1, len(self._raw) - self.num_shown)
            size = next((size for size in range(most, longest, -1) if self._raw.endswith(stop[:size])), 0)
            longest = max(longest, size)
        return longest

    def _show(self, end: int, *, final: bool) -> str:
        text = self._decoder.decode(bytes(self._raw[self.num_shown : end]), final)
        self.num_shown = end
        return text
