"""Strategies: who is asked, in which order, and what counts of the answers."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest

from foundry.journal import Account
from foundry.settings import GenerateSettings, TeacherSettings
from foundry.teacher import Answer, GarbledAnswerError, Question, TeacherError, UnavailableError
from foundry.teachers.ensemble import Call, Ensemble, Outcome
from foundry.teachers.judging import verdict
from foundry.teachers.limits import Member

GOOD, BAD = "```python\nx = 1\n```", "```python\nx =\n```"


class Scripted:
    """Teachers that say one thing each, or fail."""

    script: Mapping[str, str | TeacherError]
    asked: list[str]

    def __init__(self, name: str) -> None:
        self.name = name

    async def ask(self, question: Question) -> Answer:
        self.asked.append(self.name)
        words = self.script[self.name]
        if isinstance(words, TeacherError):
            raise words
        return Answer(text=words, finish="stop")

    async def close(self) -> None:
        pass


class Books(Account):
    """Without a file: nothing was answered before."""

    def __init__(self) -> None:
        self.answers = {}

    def write(self, kind: str, key: bytes, **parts: Any) -> None:
        pass

    @asynccontextmanager
    async def call(self, key: bytes, usd: float, teacher: str = "") -> AsyncIterator[None]:
        yield


def ensemble(strategy: Any, names: str = "abc", weights: Mapping[str, float] | None = None, **more: Any) -> Ensemble:
    settings = [
        TeacherSettings(name=name, backend="local", retries=0, weight=(weights or {}).get(name, 1.0)) for name in names
    ]
    members = [Member(Scripted(teacher.name), teacher) for teacher in settings]
    return Ensemble(members, GenerateSettings(strategy=strategy, **more), Books())


def calls(teachers: Ensemble, seed: str) -> list[Call]:
    return teachers.calls(seed, "p", "", {})


def answered(
    teachers: Ensemble, script: Mapping[str, str | TeacherError], seed: str = "s"
) -> tuple[Outcome, list[str], list[tuple[str, float]]]:
    """The outcome, who was asked in which order, and (teacher, weight) of each reply."""
    Scripted.script, Scripted.asked = script, []
    outcome = asyncio.run(teachers.answer(seed, calls(teachers, seed)))
    return outcome, Scripted.asked, [(reply.call.member.name, reply.weight) for reply in outcome.replies]


DOWN = UnavailableError("down")


def test_all_keeps_every_answer_with_its_teachers_weight() -> None:
    teachers = ensemble("all", weights={"b": 2.0})
    outcome, asked, replies = answered(teachers, {"a": "1", "b": "2", "c": "3"})
    assert (asked, replies) == (["a", "b", "c"], [("a", 1.0), ("b", 2.0), ("c", 1.0)])
    assert outcome.is_complete
    outcome, _, replies = answered(teachers, {"a": "1", "b": DOWN, "c": "3"})
    assert [name for name, _ in replies] == ["a", "c"]
    assert [name for name, _ in outcome.failures] == ["b"]
    assert not outcome.is_complete


def test_one_teacher_is_chosen_by_the_seed_and_by_nothing_else() -> None:
    teachers = ensemble("round_robin")
    chosen = [calls(teachers, f"seed {i}")[0].member.name for i in range(600)]
    assert chosen == [calls(teachers, f"seed {i}")[0].member.name for i in range(600)]
    assert min(Counter(chosen).values()) > 150
    # Without one teacher only its own seeds go elsewhere.
    fewer = ensemble("round_robin", "ab")
    for i, name in enumerate(chosen):
        assert name == "c" or calls(fewer, f"seed {i}")[0].member.name == name


def test_weights_are_shares() -> None:
    teachers = ensemble("weighted", weights={"a": 6.0, "b": 3.0, "c": 1.0})
    counts = Counter(calls(teachers, f"seed {i}")[0].member.name for i in range(3_000))
    for name, share in (("a", 0.6), ("b", 0.3), ("c", 0.1)):
        assert counts[name] / 3_000 == pytest.approx(share, abs=0.04)


def test_fallback_asks_the_next_one_only_on_failure() -> None:
    teachers = ensemble("fallback")
    assert answered(teachers, {"a": "1", "b": "2", "c": "3"})[1:] == (["a"], [("a", 1.0)])
    outcome, asked, replies = answered(teachers, {"a": DOWN, "b": "2", "c": "3"})
    assert (asked, replies, outcome.is_complete) == (["a", "b"], [("b", 1.0)], True)
    outcome, asked, replies = answered(teachers, {"a": DOWN, "b": DOWN, "c": DOWN})
    assert (asked, replies, len(outcome.failures)) == (["a", "b", "c"], [], 3)


def test_a_cascade_goes_on_until_an_answer_is_good() -> None:
    teachers = ensemble("cascade")
    assert answered(teachers, {"a": GOOD, "b": GOOD, "c": GOOD})[1:] == (["a"], [("a", 1.0)])
    _, asked, replies = answered(teachers, {"a": BAD, "b": GOOD, "c": GOOD})
    assert (asked, replies) == (["a", "b"], [("a", 0.0), ("b", 1.0)])
    _, asked, replies = answered(teachers, {"a": BAD, "b": DOWN, "c": BAD})
    assert (asked, replies) == (["a", "b", "c"], [("a", 0.0), ("c", 0.0)])


def test_best_of_by_execution_keeps_one_whose_code_runs() -> None:
    teachers = ensemble("best_of", samples=2)
    for seed in "stuv":
        _, asked, replies = answered(teachers, {"a": BAD, "b": GOOD, "c": BAD}, seed)
        assert asked == ["a", "b", "c"] * 2
        assert sum(weight for _, weight in replies) == 1.0
        assert [name for name, weight in replies if weight] == ["b"]


def test_best_of_by_a_judge_follows_it_and_survives_its_failure() -> None:
    teachers = ensemble("best_of", "abj", judge="j")
    assert [member.name for member in teachers.members] == ["a", "b"]
    kept = []
    for verdict_text in ("the second is clearer\n2", "1"):
        _, asked, replies = answered(teachers, {"a": "x", "b": "y", "j": verdict_text})
        assert asked == ["a", "b", "j"]
        kept.append([name for name, weight in replies if weight])
    assert sorted(kept) == [["a"], ["b"]]
    outcome, _, replies = answered(teachers, {"a": "x", "b": "y", "j": DOWN})
    assert sum(weight for _, weight in replies) == 1.0
    assert not outcome.is_complete
    assert answered(teachers, {"a": "same", "b": "same", "j": DOWN})[1] == ["a", "b"], "nothing to judge"


@pytest.mark.parametrize("text", ["", "none of them", "3", "0", "answer 12345678901234567890"])
def test_a_verdict_that_names_no_answer_is_garbled(text: str) -> None:
    with pytest.raises(GarbledAnswerError):
        verdict(text, 2)
