"""The books never say less than may have been billed, whatever becomes of which call in which order."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foundry.ledger import Ledger


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


STEPS = ["reserve", "release", "settle", "hold", "settle_held"]


@given(st.lists(st.tuples(st.integers(0, 4), st.floats(0.01, 1), st.sampled_from(STEPS))))
def test_the_bill_never_exceeds_the_cap(steps: list[tuple[int, float, str]]) -> None:
    """Against plain lists; every call that is not known to be free is billed at its worst case or its price."""
    ledger, live, held = Ledger(2.0), dict[int, float](), list[float]()
    settled = 0.0
    for number, usd, step in steps:
        if step == "reserve" and number not in live and ledger.fits(usd):
            ledger.reserve(key(number), usd, "t")
            live[number] = usd
        elif step == "release" and number in live:
            ledger.release(key(number))
            del live[number]
        elif step == "settle" and number in live:
            cost = live.pop(number) * usd  # no call costs more than its worst case
            ledger.settle(key(number), cost)
            settled += cost
        elif step == "hold" and number in live:
            ledger.hold(key(number), "timeout")
            held.append(live.pop(number))
        elif step == "settle_held" and not live:
            settled += sum(held) * usd
            ledger.settle_held(sum(held) * usd)
            held.clear()
        assert ledger.settled == pytest.approx(settled)
        assert ledger.reserved == pytest.approx(sum(held) + sum(live.values()), abs=1e-9)
        number_held, usd_held = ledger.held.get(("t", "timeout"), (0, 0.0))
        assert number_held == len(held)
        assert usd_held == pytest.approx(sum(held))
        assert settled + sum(held) + sum(live.values()) <= ledger.cap + 1e-7


def test_a_good_answer_says_nothing_of_the_calls_before_it() -> None:
    ledger = Ledger(1.0)
    ledger.reserve(key(1), 0.4, "vendor")
    ledger.hold(key(1), "timeout")
    ledger.reserve(key(1), 0.4, "vendor")
    ledger.settle(key(1), 0.01)
    assert ledger.settled == 0.01
    assert ledger.reserved == pytest.approx(0.4)
    assert "up to $0.4000 held back for calls that may have been billed: vendor 1 x timeout" in ledger.held_words()
    assert Ledger(1.0).held_words() == ""
