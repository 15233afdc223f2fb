"""One teacher behind its limits: pace, breaker, retries, and a bill that the reservation did not foresee."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from foundry.journal import Account
from foundry.settings import TeacherSettings
from foundry.teacher import Answer, Question, RateLimitedError, RefusedKeyError, TeacherError, UnavailableError
from foundry.teachers import limits
from foundry.teachers.limits import Member, Pace

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
    async def call(self, key: bytes, usd: float) -> AsyncIterator[None]:
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
    assert books.entries == [reserve, reserve, ("release", None), reserve, ("answer", 20 / 1e6)]


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
