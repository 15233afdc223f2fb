"""The OpenCode client and teacher against a server of our own that answers, fails and hangs as OpenCode does."""

import asyncio
import json
import logging
from typing import Any

import pytest
from aiohttp import web

from foundry import opencode_client
from foundry.opencode import Prompt
from foundry.opencode_client import MAX_IN_FLIGHT, OpenCodeClient
from foundry.teacher import (
    GarbledAnswerError,
    Question,
    RateLimitedError,
    RefusedKeyError,
    RejectedQuestionError,
    UnavailableError,
)
from smelter.base.errors import UserError
from tests.foundry.fake_opencode import (
    PASSWORD,
    PROMPT,
    FakeOpenCode,
    answer,
    failed,
    hangs,
    opencode_teacher,
    says,
    serving,
)


def test_a_question_has_a_session_of_its_own_that_is_deleted() -> None:
    async def body() -> None:
        server = FakeOpenCode(says(answer()))
        async with serving(server) as url, OpenCodeClient(url, password=PASSWORD) as client:
            assert await client.health() == "1.0"
            reply = await client.ask(PROMPT, timeout=30)
        assert (reply.text, reply.reasoning, reply.finish, reply.cost) == ("Because.", "hm", "stop", 0.25)
        assert reply.usage == {"input": 7, "output": 3, "reasoning": 2, "cache_read": 5}
        assert server.calls == ["delete ses_1"]
        assert not server.sessions
        (sent,) = server.bodies
        assert sent["parts"] == [{"type": "text", "text": "Why?"}]
        assert sent["model"] == {"providerID": "teacher", "modelID": "stub-1"}
        settings = {"system": "", "options": {}, "temperature": 0.5, "max_tokens": 64}
        assert json.loads(sent["system"]) == {"foundry": settings}

    asyncio.run(body())


def test_a_slash_in_the_models_name_stays_there() -> None:
    body = Prompt(text="x", model="router/zai/glm").body()
    assert body["model"] == {"providerID": "router", "modelID": "zai/glm"}


@pytest.mark.parametrize("how", ["timeout", "cancel", "cancel twice"])
def test_an_answer_that_is_not_awaited_is_aborted_then_deleted(how: str) -> None:
    async def body() -> None:
        asked = asyncio.Event()
        server = FakeOpenCode(hangs(asked))
        async with serving(server) as url, OpenCodeClient(url, password=PASSWORD) as client:
            if how == "timeout":
                with pytest.raises(UnavailableError, match=r"no answer within 0\.2 s"):
                    await client.ask(PROMPT, timeout=0.2)
            else:
                task = asyncio.create_task(client.ask(PROMPT, timeout=3_600))
                await asked.wait()
                task.cancel()
                if how == "cancel twice":
                    await asyncio.sleep(0)
                    task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            if how != "cancel twice":
                assert not server.sessions  # before `ask` is over
        session = "ses_1"
        assert server.calls == [f"abort {session}", f"delete {session}"]
        assert not server.sessions

    asyncio.run(body())


def test_a_session_that_is_made_while_we_are_cancelled_is_deleted_too() -> None:
    async def body() -> None:
        server = FakeOpenCode(hangs())
        server.slow_create = 0.2
        async with serving(server) as url, OpenCodeClient(url, password=PASSWORD) as client:
            task = asyncio.create_task(client.ask(PROMPT, timeout=3_600))
            while not server.sessions:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert not server.sessions

    asyncio.run(body())


def test_no_more_than_the_limit_in_flight_for_all_clients_of_a_server() -> None:
    async def body() -> None:
        async def behave(session: str, body: dict[str, Any]) -> Any:
            await asyncio.sleep(0.02)
            return answer()

        server = FakeOpenCode(behave)
        async with (
            serving(server) as url,
            OpenCodeClient(url, password=PASSWORD) as one,
            OpenCodeClient(f"{url}/", password=PASSWORD) as other,
        ):
            replies = await asyncio.gather(*(c.ask(PROMPT, timeout=30) for c in (one, other) for _ in range(60)))
        assert len(replies) == 120
        assert server.most_in_flight == MAX_IN_FLIGHT
        assert not server.sessions

    asyncio.run(body())


def test_a_broken_stream_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenCode would try again by itself, for more than a minute."""
    monkeypatch.setattr(opencode_client, "_WATCH_SECONDS", 0.01)

    async def body() -> None:
        async def behave(session: str, body: dict[str, Any]) -> Any:
            server.retrying[session] = {"type": "retry", "attempt": 1, "message": "socket closed", "next": 0}
            await asyncio.sleep(3_600)

        server = FakeOpenCode(behave)
        async with serving(server) as url, OpenCodeClient(url, password=PASSWORD) as client:
            with pytest.raises(UnavailableError, match="the answer broke off: socket closed"):
                await client.ask(PROMPT, timeout=3_600)
        assert server.calls == ["abort ses_1", "delete ses_1"]

    asyncio.run(body())


def test_sessions_of_a_server_that_went_away_are_deleted_when_it_is_back() -> None:
    async def body() -> None:
        asked = asyncio.Event()
        server = FakeOpenCode(hangs(asked))
        client = OpenCodeClient("http://127.0.0.1:1", password=PASSWORD)
        async with serving(server) as url:
            port = int(url.rpartition(":")[2])
            client = OpenCodeClient(url, password=PASSWORD)
            task = asyncio.create_task(client.ask(PROMPT, timeout=3_600))
            await asked.wait()
        with pytest.raises(UnavailableError, match=r"is the server running\? scripts/start_server.sh"):
            await task
        assert client.sessions_left == {"ses_1"}
        with pytest.raises(UnavailableError):
            await client.ask(PROMPT, timeout=30)
        server.behave = says(answer())
        async with serving(server, port):
            assert (await client.ask(PROMPT, timeout=30)).text == "Because."
            await client.close()
        assert not server.sessions
        assert not client.sessions_left

    asyncio.run(body())


@pytest.mark.parametrize(
    ("said", "error", "words"),
    [
        (b"<html>", GarbledAnswerError, "not JSON: <html>"),
        (b"[]", GarbledAnswerError, "another shape"),
        ({"info": {}, "parts": [{"type": "text"}]}, GarbledAnswerError, "another shape"),
        (web.Response(status=500, text="UnknownError"), UnavailableError, "HTTP 500: UnknownError"),
        (failed("APIError", message="no", statusCode=429), RateLimitedError, "HTTP 429: no"),
        (failed("UnknownError"), GarbledAnswerError, "UnknownError"),
    ],
)
def test_errors_say_what_happened(said: Any, error: type[Exception], words: str) -> None:
    async def body() -> None:
        server = FakeOpenCode(says(said))
        async with serving(server) as url, OpenCodeClient(url, password=PASSWORD) as client:
            with pytest.raises(error, match=words) as caught:
                await client.ask(PROMPT, timeout=30)
        assert "\n" not in str(caught.value)
        assert not server.sessions

    asyncio.run(body())


def test_what_the_server_lacks_is_said_before_a_question() -> None:
    async def body() -> None:
        server = FakeOpenCode(says(answer()))
        async with serving(server) as url, OpenCodeClient(url, password=PASSWORD) as client:
            with pytest.raises(
                RejectedQuestionError, match=r"no model 'teacher/stub-2': did you mean 'teacher/stub-1'\?"
            ):
                await client.check(agent="foundry", models=("teacher/stub-2",))
            with pytest.raises(RejectedQuestionError, match="no agent 'foundr'"):
                await client.check(agent="foundr", models=())
            server.agents = [{"name": "foundry", "description": "somebody else's"}]
            teacher = opencode_teacher(url)
            with pytest.raises(RejectedQuestionError, match=r"scripts/start_server\.sh"):
                await teacher.ask(Question(prompt="Why?"))
            await teacher.close()
        assert not server.bodies

    asyncio.run(body())


def test_the_password_is_shown_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    async def body() -> None:
        server = FakeOpenCode(says(answer()))
        async with serving(server) as url:
            right = OpenCodeClient(url, password=PASSWORD)
            wrong = OpenCodeClient(url, password="hunter2-hunter2")
            teacher = opencode_teacher(url, password="hunter2-hunter2")
            with pytest.raises(RefusedKeyError) as first:
                await wrong.health()
            with pytest.raises(RefusedKeyError) as second:
                await teacher.ask(Question(prompt="Why?"))
            assert await right.models() == {"teacher": ("stub-1",)}
            shown = f"{first.value!r} {second.value!r} {right!r} {wrong!r} {teacher!r} {caplog.text}"
            for one in (right, wrong, teacher):
                await one.close()
        assert PASSWORD not in shown
        assert "hunter2" not in shown
        assert "sk-secret" not in shown

    asyncio.run(body())


@pytest.mark.parametrize("url", ["", "127.0.0.1:4096", "ftp://x", "http://opencode:hunter2@127.0.0.1:1"])
def test_an_unusable_address_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="server_url") as caught:
        OpenCodeClient(url)
    assert "hunter2" not in str(caught.value)
