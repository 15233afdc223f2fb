"""What people read: how far long work is, numbers in few characters, tables."""

import sys
import time
from collections import deque
from collections.abc import Sequence


class Progress:
    """A line on standard error every few seconds, none for work that is shorter: call it with how much is done.

        tokenizing: 12.0 of 96.4 MB, 3.25 MB/s, 26s left

    It is a line by itself, on a terminal too, where warnings come between. `unit` is what is counted; for MB that is
    bytes. The rate is the last minute's, or so.
    """

    def __init__(self, what: str, unit: str, total: int | None = None, *, done: int = 0, seconds: float = 5.0) -> None:
        """`total` is None where nobody knows it; `done` was done before, and does not count for the rate."""
        self.what, self.unit, self.total, self.done, self.seconds = what, unit, total, done, seconds
        self._said = deque([(time.monotonic(), done)], maxlen=12)

    @property
    def is_due(self) -> bool:
        """Whether a line would be written now."""
        return time.monotonic() - self._said[-1][0] >= self.seconds

    def add(self, count: int) -> None:
        """So much more is done."""
        self(self.done + count)

    def __call__(self, done: int, *notes: str, now: bool = False) -> None:
        """So much is done in all: a line if it is due, or wanted `now` because work ends here; `notes` at its end."""
        self.done = done
        if not (now or self.is_due):
            return
        time_before, done_before = self._said[0]
        self._said.append((time.monotonic(), done))
        rate = (done - done_before) / max(self._said[-1][0] - time_before, 1e-3)
        size, digits = (1e6, ",.1f") if self.unit == "MB" else (1.0, ",.0f")
        total = "" if self.total is None else f" of {self.total / size:{digits}}"
        parts = [f"{done / size:{digits}}{total} {self.unit}", f"{short_number(rate / size)} {self.unit}/s"]
        if rate and self.total is not None and not now:
            parts.append(f"{short_duration((self.total - done) / rate)} left")
        print(f"{self.what}: {', '.join([*parts, *notes])}", file=sys.stderr, flush=True)


def short_number(value: float) -> str:
    """3 significant digits and a unit: 950, 18.2k, 101M, 2.5B."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{float(f'{value / size:.3g}'):g}{unit}"
    return f"{float(f'{value:.3g}'):g}"


def short_duration(seconds: float) -> str:
    """The two largest units: 12s, 6m12s, 3h05m, 2d04h."""
    total = max(0, round(seconds))
    if total < 60:
        return f"{total}s"
    if total < 3_600:
        return f"{total // 60}m{total % 60:02d}s"
    if total < 86_400:
        return f"{total // 3_600}h{total % 3_600 // 60:02d}m"
    return f"{total // 86_400}d{total % 86_400 // 3_600:02d}h"


def megabytes(num_bytes: float) -> str:
    """12.3 MB: a million bytes each."""
    return f"{num_bytes / 1e6:,.1f} MB"


def percent(share: float | None) -> str:
    """A share as text; "-" where it is not known."""
    return "-" if share is None else f"{share:.1%}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns; the last one is not padded."""
    widths = [max(len(row[i]) for row in rows if len(row) > i) for i in range(max(map(len, rows)))]
    return "\n".join("  ".join(f"{cell:{widths[i]}}" for i, cell in enumerate(row)).rstrip() for row in rows)
