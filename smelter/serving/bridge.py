"""From the event loop to the engine's thread and back: ask, stream, and let go when the client does."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from smelter.decoding import Answer, End, EngineBusy, EngineStopped, Piece, Request, Token
from smelter.serving.engines import AnyEngine
from smelter.serving.errors import ApiError
from smelter.serving.stats import Stats
from smelter.tokens import Tokenizer

RETRY_SECONDS = 1
_LINE_ENDS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}
CLIENT_GONE = 499
"""Nobody reads this status: it is for the log and the figures."""


@dataclass(frozen=True)
class Service:
    """What the routes share."""

    engine: AnyEngine
    tokenizer: Tokenizer
    name: str
    created: int
    num_params: int
    stats: Stats


@dataclass
class Result:
    """One answer, collected."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    prompt: list[Token] = field(default_factory=list)
    end: End | None = None

    def add(self, piece: Piece) -> None:
        """Take what came."""
        self.text += piece.text
        self.tokens += piece.tokens
        self.prompt += piece.prompt
        self.end = piece.end or self.end


class Stream:
    """The pieces of several answers, as they come or, where nobody reads them before the end, all at once then.

    Each handing over interrupts the engine: two threads share one interpreter.
    """

    def __init__(self, service: Service, requests: Sequence[Request], *, at_end: bool = False) -> None:
        self._service, self._open = service, len(requests)
        self._queue: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver_to(index: int) -> Callable[[Piece], None]:
            waiting: list[Piece] = []

            def deliver(piece: Piece) -> None:
                waiting.append(piece)
                if piece.end is not None or not at_end:
                    loop.call_soon_threadsafe(self._put, index, tuple(waiting))
                    waiting.clear()

            return deliver

        try:
            self._answers: list[Answer] = service.engine.submit(requests, [deliver_to(i) for i in range(len(requests))])
        except EngineBusy as error:
            headers = {"Retry-After": str(RETRY_SECONDS)}
            raise ApiError(429, f"the queue is full: {error}: try again later", headers=headers) from None
        except EngineStopped as error:
            raise ApiError(503, str(error), headers={"Retry-After": "5"}) from None

    def _put(self, index: int, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            self._queue.put_nowait((index, piece))

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        """(index of the request, piece), until each has ended. ApiError if the engine fails."""
        while self._open:
            index, piece = await self._queue.get()
            if piece.end is not None:
                self._open -= 1
                self._service.stats.note_end(piece.end)
                if piece.end.finish == "error":
                    raise ApiError(500, "the engine failed; the server's log says more")
                if piece.end.finish == "cancelled":
                    raise ApiError(503, "the server is shutting down", headers={"Retry-After": "5"})
            yield index, piece

    def cancel(self) -> None:
        """Nobody waits any more."""
        if self._open:
            self._service.engine.cancel(self._answers)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(receive: Receive, work: Awaitable[Any]) -> bool:
    """Do `work` while the client is there; False where it went away."""
    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        watching.cancel()
        if not working.done():
            working.cancel()
    if not working.cancelled() and working.done():
        working.result()
        return True
    return False


async def collect(service: Service, http: HttpRequest, requests: Sequence[Request]) -> list[Result] | None:
    """Every answer whole; None where the client went away meanwhile."""
    stream = Stream(service, requests, at_end=True)
    results = [Result() for _ in requests]

    async def read() -> None:
        async for index, piece in stream:
            results[index].add(piece)

    try:
        return results if await unless_gone(http.receive, read()) else None
    finally:
        stream.cancel()


def gone() -> Response:
    """The answer to a client that is not there."""
    return Response(status_code=CLIENT_GONE)


class EventStream(Response):
    """Server-sent events of a stream's pieces; the answers are cancelled when the client goes away."""

    media_type = "text/event-stream"

    def __init__(self, stream: Stream, events: AsyncIterator[str]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._stream, self._events = stream, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await unless_gone(receive, self._send(send))
        finally:
            self._stream.cancel()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for event in self._events:
                await send({"type": "http.response.body", "body": f"data: {event}\n\n".encode(), "more_body": True})
        except ApiError as error:  # the status is gone out already
            body = f"data: {to_json(error.body())}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def to_json(value: Any) -> str:
    """As compact as a stream wants it, on one line for whoever splits a stream at all that Unicode calls a line end."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).translate(_LINE_ENDS)


def answer(value: Any) -> JSONResponse:
    """A whole answer. Checked by the tests against the schema rather than for each request."""
    return JSONResponse(value)


def token_text(token: Token) -> str:
    """A token as text; a part of a character becomes U+FFFD."""
    return token.raw.decode("utf-8", "replace")
