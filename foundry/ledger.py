"""The books: what is spent, and what may have been. At every moment settled + reserved <= cap.

A vendor bills a call and not a question. So each call has a reservation of its own, at its worst case, which ends in
one of three ways: the call has a price (`settle`), or was certainly free (`release`), or nobody knows (`hold`: it timed
out, broke off, was garbled, or the process was killed). What is held back stays in the books at its worst case,
whatever the next try of the same question costs, until a person reads on the vendor's bill what it was (`settle_held`).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from smelter.base import UserError

CUT_OFF = "cut off"
"""Why a call is held back whose process ended before it did."""


class BudgetReachedError(UserError):
    """The next call could exceed the spending cap, and no call is in flight whose end could change that."""


@dataclass
class Reservation:
    """One call's worst case in US dollars, and why it is held back ("" while the call is in flight)."""

    usd: float
    teacher: str
    why: str = ""


class Ledger:
    """What is spent (`settled`) and what may yet turn out to be (`reserved`), in US dollars."""

    def __init__(self, cap: float) -> None:
        self.cap = cap
        self.settled = 0.0
        self.reserved = 0.0
        self._open: dict[bytes, list[Reservation]] = {}

    def fits(self, usd: float) -> bool:
        """Whether the cap has room for a call of that worst case."""
        # A millionth of a cent of room: sums of floating-point numbers are not exact.
        return self.settled + self.reserved + usd <= self.cap + 1e-8

    def reserve(self, key: bytes, usd: float, teacher: str = "") -> None:
        """A call is about to be made."""
        self._open.setdefault(key, []).append(Reservation(usd, teacher))
        self.reserved += usd

    def release(self, key: bytes) -> None:
        """The latest call of that key cost nothing."""
        self.settle(key, 0.0)

    def settle(self, key: bytes, usd: float) -> None:
        """The latest call of that key cost so much. Earlier ones keep what is reserved for them."""
        self.settled += usd
        calls = self._open.get(key)
        if calls is None:  # a call without a price needs no reservation
            return
        self.reserved -= calls.pop().usd
        if not calls:
            del self._open[key]
        if not self._open:
            self.reserved = 0.0  # what rounding left

    def hold(self, key: bytes, why: str) -> None:
        """The latest call of that key may have been billed, and nobody says how much."""
        self._open[key][-1].why = why

    def hold_all(self) -> None:
        """No call is in flight any more: the process that made them has ended."""
        for call in self._calls():
            call.why = call.why or CUT_OFF

    def settle_held(self, usd: float) -> None:
        """All open calls cost so much together. None may be in flight."""
        self.settled += usd
        self.reserved = 0.0
        self._open.clear()

    @property
    def held(self) -> dict[tuple[str, str], tuple[int, float]]:
        """(teacher, why) -> (number of calls held back, US dollars of their worst cases)."""
        held: dict[tuple[str, str], tuple[int, float]] = {}
        for call in self._calls():
            if call.why:
                number, usd = held.get((call.teacher, call.why), (0, 0.0))
                held[call.teacher, call.why] = (number + 1, usd + call.usd)
        return held

    def held_words(self) -> str:
        """What is held back, why, and how it is released; "" where nothing is."""
        held = sorted(self.held.items())
        if not held:
            return ""
        usd = sum(part for _, (_, part) in held)
        calls = [f"{teacher} {count:,} x {why} (${part:,.4f})".lstrip() for (teacher, why), (count, part) in held]
        return (
            f"up to ${usd:,.4f} held back for calls that may have been billed: {', '.join(calls)}; book what the"
            " vendor's bill says with the same command and --settle-held US_DOLLARS (0 if it has none of them)"
        )

    def _calls(self) -> Iterator[Reservation]:
        for calls in self._open.values():
            yield from calls
