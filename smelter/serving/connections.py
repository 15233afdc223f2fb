"""Who may stay connected: whoever waits for an answer, and for a while whoever owes us a request.

Uvicorn closes a connection that is idle between two requests, and waits for ever for a first byte, the rest of a
header, or a body. Here a whole request must come within `WAIT_SECONDS`, however it trickles. From then on nothing runs
out while an answer is written, be it that the model thinks or that the client reads slowly; only one that takes nothing
at all of what was sent is given up, by TCP itself.

At `MAX_CONNECTIONS` a newcomer takes the place of who has owed a request for longest. So whoever asks at once gets
through, however many others are silent. Only where everybody waits for an answer the newcomer's is 503.
"""

import asyncio
import socket
from typing import Any

from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from smelter.serving.errors import ApiError

WAIT_SECONDS = 20.0
"""From the connection, the last answer or a request's first byte to the whole request."""
STALLED_SECONDS = 300.0
"""How long a client may take nothing of an answer (Linux)."""
MAX_CONNECTIONS = 512
"""Far fewer than the files that a process may open, far more than slots and queue hold."""


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    headers = {"Retry-After": "1", "Connection": "close"}
    error = ApiError(503, "too many connections: close those that are not needed, or try again later", headers=headers)
    await error.response()(scope, receive, send)


class Connection(H11Protocol):
    """One connection; see the module."""

    wait_seconds = WAIT_SECONDS
    stalled_seconds = STALLED_SECONDS
    max_connections = MAX_CONNECTIONS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.timeout_keep_alive = self.wait_seconds  # type: ignore[assignment]  # uvicorn's own, between two requests
        self.owing_since = self.loop.time()
        self._deadline: asyncio.TimerHandle | None = None

    @property
    def is_owing(self) -> bool:
        """Whether the client is to send something, and not we."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait, where there is room."""
        super().connection_made(transport)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            milliseconds = round(self.stalled_seconds * 1_000)
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        if len(self.connections) > self.max_connections:
            self._make_room()
        self._watch()

    def data_received(self, data: bytes) -> None:
        """A part of a request does not put its deadline off."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """The client owes the next request, if it wants one."""
        self.owing_since = self.loop.time()
        super().on_response_complete()
        if not self.cycle.response_complete:  # the next one is here already, or a part of it
            self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody is owing any more."""
        super().connection_lost(exc)
        self._set_deadline(None)

    def _make_room(self) -> None:
        others = [other for other in self.connections if isinstance(other, Connection) and other is not self]
        owing = [other for other in others if other.is_owing]
        if not owing:
            self.app = _refuse
            return
        first = min(owing, key=lambda other: other.owing_since)
        first.transport.abort()
        self.connections.discard(first)  # at once: many may come before its `connection_lost` is called

    def _watch(self) -> None:
        if not self.is_owing:
            self._set_deadline(None)
        elif self._deadline is None:
            self._set_deadline(self.loop.call_later(self.wait_seconds, self.transport.abort))

    def _set_deadline(self, deadline: asyncio.TimerHandle | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = deadline
