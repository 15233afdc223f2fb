"""A server of the tests' own that answers, fails and hangs as OpenCode does."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from foundry.opencode import Prompt
from foundry.opencode_client import PLUGIN_MARK
from foundry.settings import TeacherSettings
from foundry.teachers.opencode import OpenCodeTeacher

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


def told(status: int, message: str = "no", **headers: str) -> dict[str, Any]:
    """An error as our plugin passes it on."""
    headers |= {"x-foundry-status": str(status), "x-foundry-message": message}
    return failed("APIError", message="see the header", statusCode=400, responseHeaders=headers)
