"""What one answer has written: its bytes up to a stop, and the text of them that may be shown already.

Two things hold text up. A character may be spread over several tokens. And what may become a stop must not be shown
before it is sure that it does not; stops are therefore looked for in the bytes, across the borders of tokens.

A text may also end where a line begins that is indented less than asked for. As in llama.cpp's server the first line,
which begins before the cursor, is not looked at, an empty line is one indented by nothing, and the line break and what
blanks follow it stay. (That server looks a token later: with its last token it lets such a line pass.)

Stops and lines are those of the model, whose lines end with LF; shown they end as the file's (see `line_ends`).
"""

import codecs
import re
from collections.abc import Sequence

from smelter.decoding.line_ends import CRLF, LF, LineEnds, to_lf

Stop = str | re.Pattern[bytes]
"""Ends a text and is cut off. Before a pattern nothing can be shown: it may begin anywhere."""

MAX_INDENT = 1_000
"""No line is indented further, and a pattern has its bounds."""


class Text:
    """The text of one answer, without the `skip` bytes at its beginning that repeat the prompt.

    It ends before a line that is indented by fewer than `n_indent` blanks.
    """

    def __init__(self, stops: Sequence[Stop] = (), skip: int = 0, n_indent: int = 0, line_end: str = LF) -> None:
        to_own = to_lf if line_end == CRLF else str
        self._strings = {to_own(stop).encode(): stop for stop in stops if isinstance(stop, str) and stop}
        self._patterns = [stop for stop in stops if not isinstance(stop, str)]
        most = min(n_indent, MAX_INDENT) - 1
        self._outdented = re.compile(rb"\n[ \t]{0,%d}[^ \t]" % most) if n_indent else None
        self._raw = bytearray()
        self._line_ends = LineEnds(line_end)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.skip = skip
        self.num_shown = skip
        """Bytes that have been shown, or never will be."""
        self.stop: str | None = None
        """The stop that ended the text."""
        self.has_ended = False
        """By a stop or a line indented less."""

    @property
    def num_bytes(self) -> int:
        """Bytes that have come in, those to skip included, up to the stop if there was one."""
        return len(self._raw)

    def push(self, raw: bytes) -> bool:
        """Take a token's bytes; true if they end the text, after which nothing more may be pushed."""
        last_line = max(self._raw.rfind(b"\n", self.skip), self.skip)  # those before it have been judged
        self._raw += raw
        matches = [(at + len(stop), at) for stop in self._strings if (at := self._raw.find(stop, self.num_shown)) >= 0]
        for pattern in self._patterns:
            if match := pattern.search(self._raw, self.skip):
                matches.append((match.end(), match.start()))
        # The first that is complete: it does not matter how the bytes were cut into tokens.
        end, start = min(matches, default=(len(self._raw) + 1, -1))
        outdented = self._outdented.search(self._raw, last_line) if self._outdented else None
        if outdented and outdented.end() < end:
            start = outdented.end() - 1
        elif matches:
            stop = bytes(self._raw[start:end])
            self.stop = self._strings.get(stop) or stop.decode("utf-8", "replace")
        self.has_ended = start >= 0
        if self.has_ended:
            del self._raw[start:]
        return self.has_ended

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
        text = self._decoder.decode(self._line_ends.give(bytes(self._raw[self.num_shown : end])), final)
        self.num_shown = max(self.num_shown, end)
        return text
