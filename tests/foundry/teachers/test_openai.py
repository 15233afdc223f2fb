"""The OpenAI-compatible backend: each way in which an endpoint can answer or fail, over real HTTP."""

import asyncio
import socket
from typing import Any

import pytest

from foundry.settings import TeacherSettings
from foundry.teacher import (
    Answer,
    GarbledAnswerError,
    Question,
    RateLimitedError,
    RefusedKeyError,
    RejectedQuestionError,
    TeacherError,
    UnavailableError,
    http_error,
)
from foundry.teachers.openai import OpenAITeacher
from tests.foundry.stub_teacher import StubTeacher, answer_to, usage_of


def ask(
    fault: str = "", *, question: Question | None = None, stub: StubTeacher | None = None, key: str = "", **options: Any
) -> Answer:
    async def run(url: str) -> Answer:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("STUB_KEY", key)
            key_env = "STUB_KEY" if key else ""
            settings = TeacherSettings(name="stub/one", model="stub-1", base_url=url, key_env=key_env, **options)
            teacher = OpenAITeacher(settings)
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
    ("fault", "kind", "cause"),
    [
        ("400", RejectedQuestionError, "rejected"),
        ("401", RefusedKeyError, "key refused"),
        ("402", RefusedKeyError, "key refused"),
        ("403", RefusedKeyError, "key refused"),
        ("404", RejectedQuestionError, "rejected"),
        ("408", UnavailableError, "timeout"),
        ("429", RateLimitedError, "rate limit"),
        ("500", UnavailableError, "unavailable"),
        ("502", UnavailableError, "unavailable"),
        ("503", UnavailableError, "unavailable"),
        ("504", UnavailableError, "timeout"),
        ("529", RateLimitedError, "rate limit"),
        ("hang", UnavailableError, "timeout"),
        ("disconnect", UnavailableError, "unavailable"),
        ("half", GarbledAnswerError, "garbled"),
        ("half_json", GarbledAnswerError, "garbled"),
        ("garbage", GarbledAnswerError, "garbled"),
        ("no_body", GarbledAnswerError, "garbled"),
        ("empty", GarbledAnswerError, "garbled"),
        ("other_shape", GarbledAnswerError, "garbled"),
        ("error_200", UnavailableError, "unavailable"),
        ("filter", GarbledAnswerError, "rejected"),
        ("only_reasoning", GarbledAnswerError, "only reasoning"),
    ],
)
def test_each_failure_has_its_error(fault: str, kind: type[TeacherError], cause: str) -> None:
    with pytest.raises(TeacherError) as caught:
        ask(fault, key="swordfish", timeout_seconds=0.5 if fault == "hang" else 30.0)
    assert type(caught.value) is kind
    assert caught.value.cause == cause
    assert caught.value.is_worth_retrying == (cause not in ("rejected", "key refused", "only reasoning"))
    assert caught.value.is_free == (
        kind in (RejectedQuestionError, RefusedKeyError, RateLimitedError) or fault in ("500", "503")
    )
    is_bill = fault in ("empty", "filter", "only_reasoning")
    billed = usage_of("Hello.")
    expected = {"input": billed["prompt_tokens"], "output": billed["completion_tokens"]} if is_bill else {}
    assert caught.value.usage == expected
    assert "swordfish" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.retry_after == (0.2 if fault == "429" else None)


def test_nobody_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: refuses

        async def run() -> None:
            url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
            teacher = OpenAITeacher(TeacherSettings(name="a/b", model="m", base_url=url))
            with pytest.raises(UnavailableError, match="cannot connect to 127") as caught:
                await teacher.ask(Question(prompt="Hello."))
            assert caught.value.is_free
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


@pytest.mark.parametrize(
    ("status", "message", "is_free"),
    [
        (400, "HTTP 400: maximum context length is 8192 tokens", True),
        (400, "HTTP 400: The response was filtered (content_filter)", False),  # Azure bills the prompt
        (422, "HTTP 422: what is this?", True),
        (524, "HTTP 524: a time-out occurred", False),
        (0, "no connection: connect ECONNREFUSED 127.0.0.1:9", True),
        (0, "no connection: Unable to connect. Is the computer able to access the url?", True),
        (0, "no connection: socket hang up", False),
        (0, "no connection: the answer broke off: ECONNREFUSED", False),
    ],
)
def test_what_is_certainly_free(status: int, message: str, is_free: bool) -> None:
    assert http_error(message, status, {}).is_free == is_free
