"""Strategies: who is asked, in which order, and what counts of the answers."""

import asyncio
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest

from foundry.settings import GenerateSettings, TeacherSettings
from foundry.teacher import Answer, GarbledAnswerError, Question, TeacherError, UnavailableError
from foundry.teachers.ensemble import Call, Ensemble, Outcome, verdict
from foundry.teachers.limits import Member


class Scripted:
    """A teacher that says one thing, or fails."""

    def __init__(self, name: str) -> None:
        self.name = name

    async def ask(self, question: Question) -> Answer:
        raise AssertionError("the strategies ask through `ask`, which keeps the books")

    async def close(self) -> None:
        pass


def ensemble(strategy: Any, names: str = "abc", weights: Mapping[str, float] | None = None, **more: Any) -> Ensemble:
    members = [
        Member(Scripted(name), TeacherSettings(name=name, backend="local", weight=(weights or {}).get(name, 1.0)))
        for name in names
    ]

    async def runs(text: str) -> bool:
        return text.startswith("good")

    settings = GenerateSettings(strategy=strategy, **more)
    return Ensemble(members, settings, accept=lambda call, answer: answer.text.startswith("good"), runs=runs)


def answered(
    made: Ensemble, script: Mapping[str, str | TeacherError], seed: str = "s"
) -> tuple[Outcome, list[str], list[tuple[str, float]]]:
    """The outcome, who was asked in which order, and (teacher, weight) of each reply."""
    asked: list[str] = []

    async def ask(call: Call) -> Answer:
        asked.append(call.member.name)
        said = script[call.member.name]
        if isinstance(said, TeacherError):
            raise said
        return Answer(text=said, finish="stop")

    outcome = asyncio.run(made.answer(seed, made.calls(seed, Question(prompt="p")), ask))
    return outcome, asked, [(reply.call.member.name, reply.weight) for reply in outcome.replies]


DOWN = UnavailableError("down")


def test_all_keeps_every_answer_with_its_teachers_weight() -> None:
    made = ensemble("all", weights={"b": 2.0})
    outcome, asked, replies = answered(made, {"a": "1", "b": "2", "c": "3"})
    assert (asked, replies) == (["a", "b", "c"], [("a", 1.0), ("b", 2.0), ("c", 1.0)])
    assert outcome.is_complete
    outcome, _, replies = answered(made, {"a": "1", "b": DOWN, "c": "3"})
    assert [name for name, _ in replies] == ["a", "c"]
    assert [name for name, _ in outcome.failures] == ["b"]
    assert not outcome.is_complete


def test_one_teacher_is_chosen_by_the_seed_and_by_nothing_else() -> None:
    made = ensemble("round_robin")
    chosen = [made.calls(f"seed {i}", Question(prompt="p"))[0].member.name for i in range(600)]
    assert chosen == [made.calls(f"seed {i}", Question(prompt="p"))[0].member.name for i in range(600)]
    assert min(Counter(chosen).values()) > 150
    # Without one teacher only its own seeds go elsewhere.
    fewer = ensemble("round_robin", "ab")
    for i, name in enumerate(chosen):
        assert name == "c" or fewer.calls(f"seed {i}", Question(prompt="p"))[0].member.name == name


def test_weights_are_shares() -> None:
    made = ensemble("weighted", weights={"a": 6.0, "b": 3.0, "c": 1.0})
    counts = Counter(made.calls(f"seed {i}", Question(prompt="p"))[0].member.name for i in range(3_000))
    for name, share in (("a", 0.6), ("b", 0.3), ("c", 0.1)):
        assert counts[name] / 3_000 == pytest.approx(share, abs=0.04)


def test_fallback_asks_the_next_one_only_on_failure() -> None:
    made = ensemble("fallback")
    assert answered(made, {"a": "1", "b": "2", "c": "3"})[1:] == (["a"], [("a", 1.0)])
    outcome, asked, replies = answered(made, {"a": DOWN, "b": "2", "c": "3"})
    assert (asked, replies, outcome.is_complete) == (["a", "b"], [("b", 1.0)], True)
    outcome, asked, replies = answered(made, {"a": DOWN, "b": DOWN, "c": DOWN})
    assert (asked, replies, len(outcome.failures)) == (["a", "b", "c"], [], 3)


def test_a_cascade_goes_on_until_an_answer_is_good() -> None:
    made = ensemble("cascade")
    assert answered(made, {"a": "good", "b": "good", "c": "good"})[1:] == (["a"], [("a", 1.0)])
    _, asked, replies = answered(made, {"a": "bad", "b": "good", "c": "good"})
    assert (asked, replies) == (["a", "b"], [("a", 0.0), ("b", 1.0)])
    _, asked, replies = answered(made, {"a": "bad", "b": DOWN, "c": "bad"})
    assert (asked, replies) == (["a", "b", "c"], [("a", 0.0), ("c", 0.0)])


def test_best_of_by_execution_keeps_one_whose_code_runs() -> None:
    made = ensemble("best_of", samples=2)
    for seed in "stuv":
        _, asked, replies = answered(made, {"a": "bad", "b": "good", "c": "bad"}, seed)
        assert asked == ["a", "b", "c"] * 2
        assert sum(weight for _, weight in replies) == 1.0
        assert [name for name, weight in replies if weight] == ["b"]


def test_best_of_by_a_judge_follows_it_and_survives_its_failure() -> None:
    made = ensemble("best_of", "abj", judge="j")
    assert [member.name for member in made.members] == ["a", "b"]
    kept = []
    for verdict_text in ("the second is clearer\n2", "1"):
        _, asked, replies = answered(made, {"a": "x", "b": "y", "j": verdict_text})
        assert asked == ["a", "b", "j"]
        kept.append([name for name, weight in replies if weight])
    assert sorted(kept) == [["a"], ["b"]]
    outcome, _, replies = answered(made, {"a": "x", "b": "y", "j": DOWN})
    assert sum(weight for _, weight in replies) == 1.0
    assert not outcome.is_complete
    assert answered(made, {"a": "same", "b": "same", "j": DOWN})[1] == ["a", "b"], "nothing to judge"


@pytest.mark.parametrize("text", ["", "none of them", "3", "0", "answer 12345678901234567890"])
def test_a_verdict_that_names_no_answer_is_garbled(text: str) -> None:
    with pytest.raises(GarbledAnswerError):
        verdict(text, 2)
