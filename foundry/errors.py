"""Errors that a person can act on.

A `FoundryError` says in one line what was wrong, where (file, line or key) and the fix; the command
line prints that line and exits with code 2. Everything else is a defect and keeps its traceback.
"""

import difflib
from collections.abc import Collection


class FoundryError(ValueError):
    """Input that cannot be used: the message is one line that names what, where and the fix."""


def nearest(name: str, known: Collection[str]) -> str:
    """A hint that names the known word nearest to `name`, or all known words where none is near."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"
