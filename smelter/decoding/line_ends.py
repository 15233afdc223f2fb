"""Lines end with LF for the model, and as the file's own lines end in what is given back.

Models are trained on code whose lines end with LF (`foundry corpus` sees to it), and a CR before each is noise that
they have not seen: many more answers are wrong. An editor whose file has CRLF wants CRLF.
"""

import re

LF, CRLF = "\n", "\r\n"
_BARE_LF = re.compile(rb"(?<!\r)\n")


def to_lf(text: str) -> str:
    """The text as the model is shown it."""
    return text.replace(CRLF, LF)


def line_end_of(*parts: str) -> str:
    """How most lines of a file's parts end: with LF where there are as many of each, or none."""
    num_crlf = sum(part.count(CRLF) for part in parts)
    return CRLF if 2 * num_crlf > sum(part.count(LF) for part in parts) else LF


class LineEnds:
    """An answer's bytes, as they come, with the file's line ends."""

    def __init__(self, line_end: str) -> None:
        self._is_crlf = line_end == CRLF
        self._cr = b""  # the last byte, where it is one

    def give(self, raw: bytes) -> bytes:
        """The next bytes: every line break as the file has it, a CRLF that the model wrote remaining one."""
        if not self._is_crlf or not raw:
            return raw
        given = _BARE_LF.sub(CRLF.encode(), self._cr + raw)[len(self._cr) :]
        self._cr = b"\r" if raw.endswith(b"\r") else b""
        return given
