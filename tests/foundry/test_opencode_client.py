"""The OpenCode client and teacher against a server of our own that answers, fails and hangs as OpenCode does."""

import asyncio
import base64
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from foundry import opencode_client
from foundry.opencode import Prompt
from foundry.opencode_client import MAX_IN_FLIGHT, PLUGIN_MARK, OpenCodeClient
from foundry.settings import TeacherSettings
from foundry.teacher import (
    GarbledAnswerError,
    Question,
    RateLimitedError,
    RefusedKeyError,
    RejectedQuestionError,
    TeacherError,
    UnavailableError,
)
from foundry.teachers.opencode import OpenCodeTeacher
from smelter.base.errors import UserError

PASSWORD = "correct-horse-battery"
PROMPT = Prompt(text="Why?", model="teacher/stub-1", temperature=0.5, max_tokens=64)

Behaviour = Callable[[str, dict[str, Any]], Awaitable[Any]]


def answer(text: str = "Because.", **info: Any) -> dict[str, Any]:
    tokens = {"input": 7, "output": 3, "reasoning": 2, "cache": {"read": 5, "write": 0}}
    parts = [{"type": "step-start"}, {"type": "reasoning", "text": "hm"}, {"type": "text", "text": text}]
    return {"info": {"role": "assistant", "finish": "stop", "cost": 0.25, "tokens": tokens} | info, "parts": parts}


def failed(name: str, **data: Any) -> dict[str, Any]:
    return {"info": {"error": {"name": name, "data": data}}, "parts": []}


class FakeOpenCode:
    """The calls that we use. `behave` makes the answer to a message; a bytes answer is sent as it is."""

    def __init__(self, behave: Behaviour) -> None:
        self.behave = behave
        self.sessions: set[str] = set()
        self.aborted: set[str] = set()
        self.calls: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.retrying: dict[str, Any] = {}
        self.agents = [{"name": "foundry", "description": PLUGIN_MARK}, {"name": "build"}]
        self.in_flight = self.most_in_flight = 0
        self.slow_create = 0.0
        self.url = ""
        self._created = 0

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        name, _, password = base64.b64decode(request.headers.get("Authorization", "")[6:]).decode().partition(":")
        if (name, password) != ("opencode", PASSWORD):
            return web.Response(status=401)
        match request.path.strip("/").split("/"):
            case ["global", "health"]:
                return web.json_response({"healthy": True, "version": "1.0"})
            case ["agent"]:
                return web.json_response(self.agents)
            case ["config", "providers"]:
                provider = {"id": "teacher", "key": "sk-secret", "models": {"stub-1": {}}}
                return web.json_response({"providers": [provider]})
            case ["session", "status"]:
                return web.json_response(self.retrying)
            case ["session"] if request.method == "POST":
                self._created += 1
                session = f"ses_{self._created}"
                self.sessions.add(session)
                await asyncio.sleep(self.slow_create)
                return web.json_response({"id": session})
            case ["session"]:
                return web.json_response([{"id": session} for session in self.sessions])
            case ["session", session, "abort"]:
                self.calls.append(f"abort {session}")
                self.aborted.add(session)
                return web.json_response(True)
            case ["session", session] if request.method == "DELETE":
                self.calls.append(f"delete {session}")
                if session not in self.sessions:
                    return web.json_response({"name": "NotFoundError"}, status=404)
                self.sessions.discard(session)
                return web.json_response(True)
            case ["session", session, "message"]:
                self.bodies.append(json.loads(await request.read()))
                self.in_flight += 1
                self.most_in_flight = max(self.most_in_flight, self.in_flight)
                try:
                    said = await self.behave(session, self.bodies[-1])
                finally:
                    self.in_flight -= 1
                if isinstance(said, web.Response):
                    return said
                return web.Response(body=said if isinstance(said, bytes) else json.dumps(said).encode())
        return web.Response(status=404, text=f"no such path: {request.path}")


@asynccontextmanager
async def serving(server: FakeOpenCode, port: int = 0) -> AsyncIterator[str]:
    runner = web.ServerRunner(web.Server(server.handle, access_log=None), shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield server.url
    finally:
        await runner.cleanup()


def opencode_teacher(url: str, password: str = PASSWORD, **options: Any) -> OpenCodeTeacher:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENCODE_SERVER_PASSWORD", password)
        return OpenCodeTeacher(
            TeacherSettings(name="a/b", backend="opencode", model="teacher/stub-1", server_url=url, **options)
        )


def says(value: Any) -> Behaviour:
    async def behave(session: str, body: dict[str, Any]) -> Any:
        return value

    return behave


def hangs(asked: asyncio.Event | None = None) -> Behaviour:
    async def behave(session: str, body: dict[str, Any]) -> Any:
        if asked:
            asked.set()
        await asyncio.sleep(3_600)

    return behave


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


def told(status: int, message: str = "no", **headers: str) -> dict[str, Any]:
    """An error as our plugin passes it on."""
    headers |= {"x-foundry-status": str(status), "x-foundry-message": message}
    return failed("APIError", message="see the header", statusCode=400, responseHeaders=headers)


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
