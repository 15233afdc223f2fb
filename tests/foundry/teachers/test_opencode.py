"""The OpenCode teacher: what the server's failures mean to it, and what they may have cost."""

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web

from foundry.teacher import (
    GarbledAnswerError,
    Question,
    RateLimitedError,
    RefusedKeyError,
    RejectedQuestionError,
    TeacherError,
    UnavailableError,
)
from tests.foundry.fake_opencode import FakeOpenCode, answer, failed, hangs, opencode_teacher, says, serving, told


@pytest.mark.parametrize(
    ("said", "error", "cause"),
    [
        (told(429, **{"retry-after": "7"}), RateLimitedError, "rate limit"),
        (told(529), RateLimitedError, "rate limit"),
        (told(429, "insufficient_quota"), RefusedKeyError, "key refused"),
        (told(500), UnavailableError, "unavailable"),
        (told(0, "ECONNREFUSED"), UnavailableError, "unavailable"),
        (told(401), RefusedKeyError, "key refused"),
        (told(402), RefusedKeyError, "key refused"),
        (told(403), RefusedKeyError, "key refused"),
        (told(408), UnavailableError, "timeout"),
        (told(504), UnavailableError, "timeout"),
        (told(400), RejectedQuestionError, "rejected"),
        (told(404), RejectedQuestionError, "rejected"),
        (failed("ProviderAuthError", message="no key"), RefusedKeyError, "key refused"),
        (failed("ContextOverflowError", message="too long"), RejectedQuestionError, "rejected"),
        (failed("MessageAbortedError", message="stopped"), UnavailableError, "unavailable"),
        (failed("UnknownError", message="not JSON"), GarbledAnswerError, "garbled"),
        (answer("  "), GarbledAnswerError, "garbled"),
        (answer("", finish="length"), GarbledAnswerError, "only reasoning"),
        (answer("", finish="content-filter"), GarbledAnswerError, "rejected"),
        (answer("def f(", finish="unknown"), GarbledAnswerError, "garbled"),
        (b"{", GarbledAnswerError, "garbled"),
        (web.Response(status=500, text="oops"), UnavailableError, "unavailable"),
    ],
)
def test_what_a_failure_means_to_the_teacher(said: Any, error: type[TeacherError], cause: str) -> None:
    async def body() -> None:
        server = FakeOpenCode(says(said))
        async with serving(server) as url:
            teacher = opencode_teacher(url)
            with pytest.raises(TeacherError) as caught:
                await teacher.ask(Question(prompt="Why?"))
            await teacher.close()
        assert type(caught.value) is error
        assert caught.value.cause == cause
        assert caught.value.retry_after == (7 if "retry-after" in str(said) else None)
        assert not server.sessions

    asyncio.run(body())


@pytest.mark.parametrize(
    ("said", "is_free", "usage"),
    [
        (told(500), True, {}),
        (told(0, "ECONNREFUSED"), True, {}),
        (told(0, "the answer broke off: socket closed"), False, {}),
        (told(504), False, {}),
        (failed("MessageAbortedError", message="stopped"), False, {}),
        (answer("  "), False, {"input": 12, "output": 5, "reasoning": 2, "cache_read": 5}),
        (answer("", finish="length"), False, {"input": 12, "output": 5, "reasoning": 2, "cache_read": 5}),
        (answer("def f(", finish="unknown"), False, {"input": 12, "output": 5, "reasoning": 2, "cache_read": 5}),
        (b"{", False, {}),
        (web.Response(status=500, text="oops"), False, {}),
    ],
)
def test_what_a_failure_may_cost(said: Any, is_free: bool, usage: dict[str, int]) -> None:
    async def body() -> None:
        server = FakeOpenCode(says(said))
        async with serving(server) as url:
            teacher = opencode_teacher(url)
            with pytest.raises(TeacherError) as caught:
                await teacher.ask(Question(prompt="Why?"))
            await teacher.close()
        assert caught.value.is_free == is_free
        assert caught.value.usage == usage

    asyncio.run(body())


def test_what_fails_before_the_question_is_free() -> None:
    async def body() -> None:
        server = FakeOpenCode(hangs())
        async with serving(server) as url:
            teacher = opencode_teacher(url, timeout_seconds=0.2)
            with pytest.raises(UnavailableError) as caught:
                await teacher.ask(Question(prompt="Why?"))
            assert not caught.value.is_free  # the model may have begun
            server.slow_create = 0.5
            with pytest.raises(UnavailableError) as caught:
                await teacher.ask(Question(prompt="Why?"))
            assert caught.value.is_free  # there was no session yet
            server.agents = []
            other = opencode_teacher(url)
            with pytest.raises(RejectedQuestionError) as rejected:
                await other.ask(Question(prompt="Why?"))
            assert rejected.value.is_free
            await other.close()
            await teacher.close()
        other = opencode_teacher(url)
        with pytest.raises(UnavailableError, match="is the server running") as caught:
            await other.ask(Question(prompt="Why?"))
        assert caught.value.is_free
        await other.close()

    asyncio.run(body())


def test_the_teacher_asks_as_the_question_says() -> None:
    async def body() -> None:
        server = FakeOpenCode(says(answer(finish="content-filter")))
        async with serving(server) as url:
            teacher = opencode_teacher(url, omit=("temperature",), extra={"k": 1})
            first = await teacher.ask(Question(prompt="Why?", system="Be brief.", top_p=0.9, max_tokens=9, seed=4))
            await teacher.ask(Question(prompt="Why?"))
            await teacher.close()
        assert (first.text, first.reasoning, first.finish, first.cost) == ("Because.", "hm", "filter", None)
        # As the contract has it: what was cached is part of the input, reasoning part of the output.
        assert first.usage == {"input": 12, "output": 5, "reasoning": 2, "cache_read": 5}
        settings, without = (json.loads(sent["system"])["foundry"] for sent in server.bodies)
        assert settings == {"system": "Be brief.", "top_p": 0.9, "max_tokens": 9, "options": {"seed": 4, "k": 1}}
        assert without == {"system": "", "max_tokens": 2_048, "options": {"k": 1}}

    asyncio.run(body())


def test_an_answer_after_the_time_is_a_timeout_to_the_teacher() -> None:
    async def body() -> None:
        server = FakeOpenCode(hangs())
        async with serving(server) as url:
            teacher = opencode_teacher(url, timeout_seconds=0.1)
            with pytest.raises(UnavailableError, match=r"no answer within 0\.1 s") as caught:
                await teacher.ask(Question(prompt="Why?"))
            assert caught.value.cause == "timeout"
            await teacher.close()

    asyncio.run(body())
