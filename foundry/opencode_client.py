"""Async client of an OpenCode server: one question, one session, always deleted.

OpenCode (https://opencode.ai, MIT) is an agent with an HTTP server that speaks to many vendors. Its published Python
client misreads today's answers, so this is the handful of calls that we need, over aiohttp. What the server does that
a caller would not expect is dealt with here:

- What goes wrong behind the server comes back as HTTP 200 with `info.error`: raised as if we had asked the vendor.
- Closing the connection does not stop a generation, and deleting a busy session leaves its request hanging: after a
  time-out or a cancellation the session is aborted first and then deleted, whatever happens to the caller meanwhile.
- It repeats a broken request for minutes by itself. Our plugin (`opencode/plugin.js`) keeps it from that; a stream that
  breaks off half-way gets past the plugin, so the state of the sessions is looked at every second.
- Beyond 32 requests in flight a server gets slower, not faster: that is the limit, for all clients of one server.

All that fails is one of `teacher`'s errors. The password is in no error, log or repr.
"""

import asyncio
import base64
import contextlib
import json
import logging
import weakref
from collections.abc import AsyncIterator, Collection, Mapping
from typing import Any, Self
from urllib.parse import unquote, urlsplit

import aiohttp

from foundry.opencode import Prompt, Reply
from foundry.teacher import (
    GarbledAnswerError,
    RefusedKeyError,
    RejectedQuestionError,
    TeacherError,
    UnavailableError,
    http_error,
    read_body,
    short,
)
from smelter.base import UserError, nearest

PLUGIN_AGENT = "foundry"
"""The agent that our plugin adds: where it is listed, the plugin is at work."""
PLUGIN_MARK = "Foundry: the question and nothing else (2)"
"""That agent's description, with the version of what client and plugin say to each other."""
MAX_IN_FLIGHT = 32
"""Requests in flight at one server."""
_WATCH_SECONDS = 1.0
_HEALTH_SECONDS = 5.0

_log = logging.getLogger(__name__)
_slots: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, asyncio.Semaphore]] = weakref.WeakKeyDictionary()


class OpenCodeClient:
    """One OpenCode server. Use it as `async with`, or call `close`.

    `timeout` (seconds) is for the server's own calls; an answer's time is `ask`'s. Raises UserError for an address
    that is none.
    """

    def __init__(self, server_url: str, *, password: str = "", user: str = "opencode", timeout: float = 30.0) -> None:
        parts = urlsplit(server_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError('server_url is no address: give one such as "http://127.0.0.1:4096"')
        if parts.username or parts.password:
            raise UserError("server_url holds a password: give it in the environment instead (password_env)")
        self.server_url = server_url.rstrip("/")
        self.sessions_left: set[str] = set()
        """Sessions that could not be deleted yet, because the server went away; tried again with every answer."""
        token = base64.b64encode(f"{user}:{password}".encode()).decode()
        self._headers = {"Authorization": f"Basic {token}"} if password else {}
        self._timeout = timeout
        self._http: aiohttp.ClientSession | None = None
        self._waiting: dict[str, asyncio.Future[Reply]] = {}
        self._watcher: asyncio.Task[None] | None = None
        self._cleaners: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"OpenCodeClient({self.server_url!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def health(self, *, wait: float = 0.0) -> str:
        """The server's version; `wait` seconds are given to a server that starts."""
        end = asyncio.get_running_loop().time() + wait
        while True:
            try:
                # A request that comes while the server starts may never be answered: not worth the whole time-out.
                answer = await self._call("GET", "/global/health", timeout=min(_HEALTH_SECONDS, self._timeout))
                break
            except UnavailableError:
                if asyncio.get_running_loop().time() >= end:
                    raise
                await asyncio.sleep(0.1)
        if not isinstance(answer, dict) or answer.get("healthy") is not True:
            raise GarbledAnswerError(f"{self.server_url}: not healthy, or no OpenCode server: look at its log")
        return str(answer.get("version", ""))

    async def models(self) -> dict[str, tuple[str, ...]]:
        """Configured models of each provider. (The server's answer holds keys: nothing else of it is kept.)"""
        answer = await self._call("GET", "/config/providers")
        try:
            return {str(provider["id"]): tuple(provider["models"]) for provider in answer["providers"]}
        except (KeyError, TypeError):
            raise GarbledAnswerError(f"{self.server_url}: /config/providers has another shape") from None

    async def agents(self) -> dict[str, str]:
        """Agents and their descriptions."""
        answer = await self._call("GET", "/agent")
        try:
            return {str(agent["name"]): str(agent.get("description") or "") for agent in answer}
        except (KeyError, TypeError, AttributeError):
            raise GarbledAnswerError(f"{self.server_url}: /agent has another shape") from None

    async def check(self, *, agent: str, models: Collection[str]) -> None:
        """Raises RejectedQuestionError if plugin, agent or a model is missing: a question would get a bare HTTP 500."""
        await self.health()
        agents = await self.agents()
        if agents.get(PLUGIN_AGENT) != PLUGIN_MARK:
            raise RejectedQuestionError(
                f"{self.server_url} has no agent {PLUGIN_AGENT!r} of Foundry's plugin, or of another version of it:"
                f" start the server with scripts/start_server.sh"
            )
        if agent not in agents:
            raise RejectedQuestionError(f"{self.server_url} has no agent {agent!r}: {nearest(agent, agents)}")
        known = [f"{provider}/{model}" for provider, names in (await self.models()).items() for model in names]
        for model in models:
            if model not in known:
                raise RejectedQuestionError(f"{self.server_url} has no model {model!r}: {nearest(model, known)}")

    async def create(self, title: str = "foundry") -> str:
        """A new session's id. (Without a title, the server would ask a model for one.)"""
        answer = await self._call("POST", "/session", {"title": title})
        if not isinstance(answer, dict) or not isinstance(answer.get("id"), str):
            raise GarbledAnswerError(f"{self.server_url}: /session has another shape")
        return str(answer["id"])

    async def sessions(self) -> tuple[str, ...]:
        """Ids of the sessions that there are (the server lists the newest 100)."""
        return tuple(session["id"] for session in await self._call("GET", "/session"))

    async def send(self, session: str, prompt: Prompt) -> Reply:
        """Put a question and wait for the answer, as long as it takes; only `abort` stops the model."""
        return _reply(await self._call("POST", f"/session/{session}/message", prompt.body(), timeout=None))

    async def send_async(self, session: str, prompt: Prompt) -> AsyncIterator[dict[str, Any]]:
        """Put a question and yield the session's events ({"type", "properties"}) until the model is done.

        Raises the error that the session reports.
        """
        async with self._open("GET", "/event", None, None) as response:
            asked = False
            async for line in response.content:
                if not line.startswith(b"data:"):
                    continue
                event = _json(line[5:], "/event")
                if not asked:  # the first event says that we are connected: nothing can be missed from here on
                    await self._call("POST", f"/session/{session}/prompt_async", prompt.body())
                    asked = True
                properties = event.get("properties", {})
                if properties.get("sessionID", properties.get("info", {}).get("sessionID")) != session:
                    continue
                yield event
                if event["type"] == "session.error":
                    raise _vendor_error(properties.get("error") or {})
                if event["type"] == "session.idle":
                    return
        raise UnavailableError(f"{self.server_url}: the events ended before the answer did")

    async def statuses(self) -> dict[str, dict[str, Any]]:
        """State of the sessions that are at work: {id: {"type": "busy" | "retry", ...}}."""
        answer = await self._call("GET", "/session/status")
        return answer if isinstance(answer, dict) else {}

    async def abort(self, session: str) -> None:
        """Stop the generation, at the vendor too."""
        await self._call("POST", f"/session/{session}/abort")

    async def delete(self, session: str) -> None:
        """Delete a session; one that is gone already is no error."""
        await self._call("DELETE", f"/session/{session}", may_be_gone=True)

    async def ask(self, prompt: Prompt, *, timeout: float) -> Reply:
        """One question in a session of its own: `timeout` seconds from when the server has room for it.

        When this raises or is cancelled, the generation has been stopped. The session is deleted in any case, after an
        answer without making it wait.
        """
        slots = _slots.setdefault(asyncio.get_running_loop(), {})
        slot = slots.setdefault(self.server_url, asyncio.Semaphore(MAX_IN_FLIGHT))
        await slot.acquire()
        session, answered, left = "", False, None
        try:
            async with asyncio.timeout(timeout):
                session = await self._create_shielded()
                reply = await self._send_watched(session, prompt)
            answered = True
            return reply
        except TimeoutError:
            message = f"{self.server_url}: no answer within {timeout:g} s"
            raise UnavailableError(message, cause="timeout", is_free=not session) from None
        except TeacherError as error:
            error.is_free |= not session  # without one nothing was asked
            raise
        finally:
            left = asyncio.ensure_future(self._clean(session, slot, abort=not answered))
            self._cleaners.add(left)
            left.add_done_callback(self._cleaners.discard)
            if not answered:
                await asyncio.shield(left)

    async def close(self) -> None:
        """Wait until every session is deleted, then close the connections."""
        while self._cleaners:
            await asyncio.gather(*self._cleaners, return_exceptions=True)
        await self._delete_left()
        if self.sessions_left:
            _log.warning("%s: %d sessions could not be deleted", self.server_url, len(self.sessions_left))
        if self._watcher:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
        if self._http:
            await self._http.close()

    async def _create_shielded(self) -> str:
        """A session that is known to us even if the caller is cancelled while the server makes it."""
        creation = asyncio.ensure_future(self.create())
        try:
            return await asyncio.shield(creation)
        except asyncio.CancelledError:
            with contextlib.suppress(TeacherError):
                self.sessions_left.add(await creation)
            raise

    async def _send_watched(self, session: str, prompt: Prompt) -> Reply:
        """`send`, broken off when the server would begin to try again by itself."""
        sending = asyncio.ensure_future(self.send(session, prompt))
        verdict: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting[session] = verdict
        if self._watcher is None or self._watcher.done():
            self._watcher = asyncio.ensure_future(self._watch())
        try:
            await asyncio.wait((sending, verdict), return_when=asyncio.FIRST_COMPLETED)
            return (sending if sending.done() else verdict).result()
        finally:
            del self._waiting[session]
            verdict.cancel()
            if not sending.done():
                sending.cancel()
                await asyncio.wait((sending,))

    async def _watch(self) -> None:
        while self._waiting:
            await asyncio.sleep(_WATCH_SECONDS)
            with contextlib.suppress(TeacherError):  # the requests themselves will tell
                for session, status in (await self.statuses()).items():
                    verdict = self._waiting.get(session)
                    if verdict and not verdict.done() and status.get("type") == "retry":
                        text = f"the answer broke off: {short(str(status.get('message', '')))}"
                        verdict.set_exception(UnavailableError(text))

    async def _clean(self, session: str, slot: asyncio.Semaphore, *, abort: bool) -> None:
        try:
            if session and abort:
                await self.abort(session)
            if session:
                await self.delete(session)
            if not abort:
                await self._delete_left()
        except TeacherError:
            self.sessions_left.add(session)
        finally:
            slot.release()

    async def _delete_left(self) -> None:
        for session in tuple(self.sessions_left):
            self.sessions_left.discard(session)
            try:
                await self.abort(session)
                await self.delete(session)
            except TeacherError:
                self.sessions_left.add(session)
                return

    def _open(self, method: str, path: str, body: Any, timeout: float | None) -> Any:
        if self._http is None:
            self._http = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0), headers=self._headers, read_bufsize=2**20
            )
        return self._http.request(
            method, self.server_url + path, json=body, timeout=aiohttp.ClientTimeout(total=timeout, sock_connect=10)
        )

    async def _call(
        self, method: str, path: str, body: Any = None, *, timeout: float | None = 0, may_be_gone: bool = False
    ) -> Any:
        where = f"{self.server_url}{path}"
        try:
            async with self._open(method, path, body, self._timeout if timeout == 0 else timeout) as response:
                status, data = response.status, await read_body(response)
        except TimeoutError:
            raise UnavailableError(f"{where}: the server does not react: is it overloaded?") from None
        except (aiohttp.ClientError, OSError) as error:
            text = f"{where}: no answer ({type(error).__name__}): is the server running? scripts/start_server.sh"
            raise UnavailableError(text, is_free=isinstance(error, aiohttp.ClientConnectorError)) from None
        if status == 401:
            raise RefusedKeyError(f"{self.server_url}: the server does not take the password: check password_env")
        if status >= 400 and not (status == 404 and may_be_gone):
            text = f"{where}: HTTP {status}: {short(data.decode(errors='replace'))}"
            raise RejectedQuestionError(text) if status in (400, 413, 422) else UnavailableError(text)
        return _json(data, path) if data else None


def _json(data: bytes, path: str) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        raise GarbledAnswerError(f"{path}: not JSON: {short(data.decode(errors='replace'))}") from None


def _reply(answer: Any) -> Reply:
    try:
        if error := answer["info"].get("error"):
            raise _vendor_error(error)
        return Reply.read(answer)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, TeacherError):
            raise
        raise GarbledAnswerError(f"the message has another shape ({type(error).__name__}: {error})") from None


def _vendor_error(error: Mapping[str, Any]) -> TeacherError:
    """What a session's error means, as far as possible by what the vendor said (our plugin passes that on)."""
    name = str(error.get("name") or "UnknownError")
    data = error.get("data") or {}
    headers = data.get("responseHeaders") or {}
    text, status = str(data.get("message") or ""), data.get("statusCode")
    if "x-foundry-status" in headers:
        status, text = int(headers["x-foundry-status"]), unquote(headers.get("x-foundry-message", ""))
    about = name if status is None else f"HTTP {status}" if status else "no connection"
    message = f"{about}: {short(text)}"
    match name:
        case "ProviderAuthError":
            return RefusedKeyError(message)
        case "ContextOverflowError":
            return RejectedQuestionError(message)
        case "MessageAbortedError":
            return UnavailableError(message)
    if status is None or 0 < status < 400:
        return GarbledAnswerError(message)
    return http_error(message, status, headers)
