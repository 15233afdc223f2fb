"""The OpenAI-compatible backend: each way in which an endpoint can answer or fail, over real HTTP."""

import asyncio
import socket

import pytest

from foundry.teacher import (
    Answer,
    AnswerTimeoutError,
    GarbledAnswerError,
    OnlyReasonedError,
    Question,
    RateLimitedError,
    RefusedKeyError,
    RejectedQuestionError,
    TeacherError,
    UnavailableError,
)
from foundry.teachers.openai import OpenAITeacher
from tests.foundry.stub_teacher import StubTeacher, answer_to


def ask(
    fault: str = "", *, question: Question | None = None, stub: StubTeacher | None = None, **options: object
) -> Answer:
    async def run(url: str) -> Answer:
        teacher = OpenAITeacher("stub/one", model="stub-1", base_url=url, **options)  # type: ignore[arg-type]
        try:
            return await teacher.ask(question or Question(prompt="Hello."))
        finally:
            await teacher.close()

    with stub or StubTeacher(faults=lambda prompt, number: fault) as server:
        return asyncio.run(run(server.url))


def test_the_question_arrives_as_it_is() -> None:
    stub = StubTeacher(key="k3y")
    question = Question(prompt="Grüße \u2028", system="Be brief.", max_tokens=7, temperature=0.1, top_p=0.5, seed=3)
    answer = ask(question=question, stub=stub, key="k3y", omit=("temperature",), extra={"effort": "low"})
    assert (answer.text, answer.finish) == (answer_to(question.prompt), "stop")
    assert stub.requests == [
        {
            "model": "stub-1",
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question.prompt}],
            "max_tokens": 7,
            "top_p": 0.5,
            "seed": 3,
            "effort": "low",
        }
    ]


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("400", RejectedQuestionError),
        ("401", RefusedKeyError),
        ("402", RefusedKeyError),
        ("403", RefusedKeyError),
        ("404", RejectedQuestionError),
        ("408", AnswerTimeoutError),
        ("429", RateLimitedError),
        ("500", UnavailableError),
        ("529", RateLimitedError),
        ("hang", AnswerTimeoutError),
        ("disconnect", UnavailableError),
        ("half", GarbledAnswerError),
        ("half_json", GarbledAnswerError),
        ("garbage", GarbledAnswerError),
        ("no_body", GarbledAnswerError),
        ("empty", GarbledAnswerError),
        ("other_shape", GarbledAnswerError),
        ("error_200", UnavailableError),
        ("filter", RejectedQuestionError),
        ("only_reasoning", OnlyReasonedError),
    ],
)
def test_each_failure_has_its_error(fault: str, kind: type[TeacherError]) -> None:
    with pytest.raises(TeacherError) as caught:
        ask(fault, key="swordfish", timeout_seconds=0.5 if fault == "hang" else 30.0)
    assert type(caught.value) is kind
    assert str(caught.value).startswith("stub/one: ")
    assert "swordfish" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.retry_after == (0.2 if fault == "429" else None)


def test_nobody_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: refuses

        async def run() -> None:
            teacher = OpenAITeacher("a/b", model="m", base_url=f"http://127.0.0.1:{taken.getsockname()[1]}/v1")
            with pytest.raises(UnavailableError, match="cannot connect to 127"):
                await teacher.ask(Question(prompt="Hello."))
            await teacher.close()

        asyncio.run(run())


def test_reasoning_is_told_apart() -> None:
    think = ask("think")
    assert (think.text, think.reasoning) == (answer_to("Hello."), "let me see")
    field = ask("reasoning")
    assert (field.text, field.reasoning) == (answer_to("Hello."), "let me see")
    assert (field.usage["reasoning"], field.usage["cache_read"]) == (3, 5)


def test_a_cut_answer_says_so_and_logprobs_come_if_asked() -> None:
    answer = ask("length", logprobs=True)
    assert answer.finish == "length"
    assert answer.logprobs == (("a", -0.5), ("b", -1.5))
    assert ask().logprobs is None
