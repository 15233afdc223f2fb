"""One teacher behind its limits: pace, breaker, retries, and a bill that the reservation did not foresee."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from foundry.journal import Account
from foundry.ledger import BudgetReachedError
from foundry.settings import TeacherSettings
from foundry.teacher import (
    Answer,
    GarbledAnswerError,
    Question,
    RateLimitedError,
    RefusedKeyError,
    TeacherError,
    UnavailableError,
)
from foundry.teachers import limits
from foundry.teachers.limits import Member, Pace
from smelter.base import UserError

QUESTION = Question(prompt="p", max_tokens=100)
KEY = bytes(32)


class Scripted:
    """A teacher that does one thing after the other, and the last for ever."""

    name = "stub"

    def __init__(self, script: Sequence[Answer | TeacherError]) -> None:
        self.script = list(script)

    async def ask(self, question: Question) -> Answer:
        step = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if isinstance(step, TeacherError):
            raise step
        return step

    async def close(self) -> None:
        pass


class Books(Account):
    """In memory alone."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, float | None]] = []
        """Kind, and US dollars where it has some."""

    def write(self, kind: str, key: bytes, **parts: Any) -> None:
        assert key == KEY
        self.entries.append((kind, parts.get("cost")))

    @asynccontextmanager
    async def call(self, key: bytes, usd: float, teacher: str = "") -> AsyncIterator[None]:
        self.entries.append(("reserve", usd))
        yield


def ask(script: Sequence[Answer | TeacherError], times: int = 1, **settings: Any) -> tuple[Member, Books, list[Any]]:
    books = Books()
    results: list[Any] = []

    async def run() -> Member:
        member = Member(Scripted(script), TeacherSettings(name="stub", backend="local", **settings))
        for _ in range(times):
            try:
                results.append((await member.ask(QUESTION, KEY, books)).text)
            except TeacherError as error:
                results.append(error.cause)
        return member

    return asyncio.run(run()), books, results


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_backoff", lambda failures: 0.001)


GOOD = Answer(text="good", finish="stop", usage={"input": 10, "output": 20})


def test_failures_are_retried_and_booked_as_what_they_may_have_cost() -> None:
    script: list[Answer | TeacherError] = [UnavailableError("down"), RateLimitedError("busy", retry_after=0.001), GOOD]
    _, books, results = ask(script, price_output=1.0)
    assert results == ["good"]
    reserve = ("reserve", 100 / 1e6)
    held, free = ("held", None), ("release", None)
    assert books.entries == [reserve, held, reserve, free, reserve, ("answer", 20 / 1e6)]


def test_the_bill_stays_within_the_cap_when_first_tries_time_out(tmp_path: Path) -> None:
    """A cap of $1, calls of at most $0.40: each first try is billed in full and lost, each second costs $0.01."""

    class Vendor(Scripted):
        billed = 0.0

        async def ask(self, question: Question) -> Answer:
            self.script.reverse()  # a time-out and an answer in turn
            is_lost = isinstance(self.script[0], TeacherError)
            self.billed += 0.4 if is_lost else 0.01
            return await Scripted([self.script[0]]).ask(question)

    async def run() -> tuple[float, Account, list[int]]:
        answer = Answer(text="good", finish="stop", usage={"input": 1, "output": 10})
        vendor = Vendor([answer, UnavailableError("late", cause="timeout")])
        member = Member(vendor, TeacherSettings(name="stub", backend="local", price_output=1_000.0))
        account = Account(tmp_path / "j", cap=1.0)
        answered: list[int] = []

        async def ask_all() -> None:
            for number in range(11):
                question = Question(prompt=f"{number}", max_tokens=400)
                await member.ask(question, number.to_bytes(32, "big"), account)
                answered.append(number)

        with pytest.raises(BudgetReachedError, match=r"held back for calls .*: stub 2 x timeout \(\$0\.8000\)"):
            await ask_all()
        await account.journal.close()
        return vendor.billed, account, answered

    billed, account, answered = asyncio.run(run())
    assert answered == [0]  # $0.40 lost, $0.01, $0.40 lost: there is no room for a fourth call
    assert billed == pytest.approx(0.81)
    assert account.ledger.settled + account.ledger.reserved == pytest.approx(billed)


def test_usage_that_comes_with_an_unusable_answer_is_what_it_cost() -> None:
    usage = {"input": 10, "output": 30}
    script: list[Answer | TeacherError] = [
        GarbledAnswerError("empty", usage=usage),
        GarbledAnswerError("no bill", usage={"input": 0, "output": 0}),
        Answer(text=" ", finish="stop", usage=usage),
        GOOD,
    ]
    _, books, results = ask(script, price_output=1.0)
    assert results == ["good"]
    reserve, unusable = ("reserve", 100 / 1e6), ("unusable", 30 / 1e6)
    assert books.entries == [
        *(reserve, unusable, reserve, ("held", None), reserve, unusable),
        *(reserve, ("answer", 20 / 1e6)),
    ]


def test_a_usage_that_cannot_be_is_the_worst_case() -> None:
    """A text without tokens, or without a prompt: whoever counts so does not bill so."""
    for usage in ({}, {"input": 10}, {"input": 10, "output": 0}, {"input": 0, "output": 5}):
        _, books, _ = ask([Answer(text="good", finish="stop", usage=usage)], price_output=1.0)
        assert books.entries == [("reserve", 100 / 1e6), ("answer", 100 / 1e6)]


def test_the_prices_of_the_vendors_cache() -> None:
    usage = {"input": 1_000, "output": 1, "cache_read": 600, "cache_write": 300}
    answer = Answer(text="good", finish="stop", usage=usage)
    _, books, _ = ask([answer], price_input=4.0, price_cache_read=0.4)
    assert books.entries[-1][1] == pytest.approx((100 * 4 + 600 * 0.4 + 300 * 5) / 1e6)
    _, books, _ = ask([answer], price_input=4.0, price_cache_write=8.0)
    assert books.entries[-1][1] == pytest.approx((700 * 4 + 300 * 8) / 1e6)
    num_bytes = limits.TEMPLATE_TOKENS + len("p")
    assert books.entries[0][1] == pytest.approx(num_bytes * 8 / 1e6)  # all of it may be written to the cache


def test_what_else_is_sent_counts_as_input() -> None:
    extra = {"response_format": {"type": "json_object", "schema": "x" * 500}}
    _, books, _ = ask([GOOD], price_input=1.0, price_cache_write=1.0, extra=extra)
    assert books.entries[0] == ("reserve", (limits.TEMPLATE_TOKENS + 1 + len(json.dumps(extra))) / 1e6)


def test_a_question_that_could_not_be_put_is_free() -> None:
    class Broken(Scripted):
        async def ask(self, question: Question) -> Answer:
            raise UserError("cannot load the model")

    async def run() -> Books:
        books = Books()
        member = Member(Broken([]), TeacherSettings(name="stub", backend="local", price_output=1.0))
        with pytest.raises(UserError, match="cannot load"):
            await member.ask(QUESTION, KEY, books)
        return books

    assert asyncio.run(run()).entries == [("reserve", 100 / 1e6), ("release", None)]


def test_an_outage_opens_the_breaker_and_an_answer_closes_it() -> None:
    down: list[Answer | TeacherError] = [UnavailableError("down")] * 8
    member, _, results = ask([*down, GOOD], times=3, retries=20)
    assert results == ["good"] * 3
    assert (member.num_calls, member.given_up, member.trouble) == (11, "", "")


def test_what_is_down_for_good_or_refuses_the_key_is_given_up() -> None:
    member, _, results = ask([UnavailableError("down")], times=2, retries=9, give_up_seconds=1e-9)
    assert results[-1] == "teacher given up"
    assert "give_up_seconds" in member.given_up
    member, books, results = ask([RefusedKeyError("no")], times=2, price_output=1.0)
    assert results == ["key refused", "teacher given up"]
    assert books.entries == [("reserve", 100 / 1e6), ("release", None)]


def test_a_bill_above_the_worst_case_is_the_last_one() -> None:
    dear = Answer(text="good", finish="stop", usage={"input": 10, "output": 5_000})
    member, books, results = ask([dear], times=2, price_output=1.0)
    assert results == ["good", "teacher given up"]
    assert books.entries == [("reserve", 100 / 1e6), ("answer", 5_000 / 1e6)]
    assert "billed $0.0050" in member.given_up


def test_a_pace_spaces_evenly_and_takes_corrections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foundry.teachers.limits.time.monotonic", lambda: 100.0)
    pace = Pace(60)
    assert [pace.take(1) for _ in range(3)] == [0.0, 1.0, 2.0]
    pace.correct(2)
    assert pace.take(1) == 5.0
    assert [Pace(0).take(1) for _ in range(3)] == [0.0] * 3


def test_calls_that_fail_together_are_one_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    """32 in flight when the teacher goes down: its pauses grow with the attempts after that, not with the 32."""
    pauses: list[int] = []

    def backoff(failures: int) -> float:
        pauses.append(failures)
        return 0.01

    monkeypatch.setattr(limits, "_backoff", backoff)

    class Together(Scripted):
        async def ask(self, question: Question) -> Answer:
            await asyncio.sleep(0.005)  # all are in flight before the first fails
            return await super().ask(question)

    async def run() -> list[Answer]:
        down: list[Answer | TeacherError] = [UnavailableError("down")] * 34
        member = Member(Together([*down, GOOD]), TeacherSettings(name="stub", backend="local", retries=9))
        return await asyncio.gather(*(member.ask(QUESTION, KEY, Books()) for _ in range(32)))

    assert [answer.text for answer in asyncio.run(run())] == ["good"] * 32
    openings = 3  # by the 32, and by each of the two single attempts that followed
    assert sorted(pauses)[-1] <= openings
