"""Connections as the network has them: silent, half-sent, trickling, slow to read, too many; on real sockets."""

import asyncio
import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from smelter.serving.connections import WAIT_SECONDS, Connection
from smelter.serving.gate import Gate, Rules
from smelter.serving.serve import listen
from smelter.serving.stats import Stats
from tests import tiny
from tests.servers import command, wait_until

WAIT = 0.3
"""Seconds that these tests let a client owe its request."""
HEAD = b"POST /now HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n"
GET = b"GET /%s HTTP/1.1\r\nHost: localhost\r\n\r\n"
CHUNK, NUM_CHUNKS = b"x" * 1_000_000, 20
"""More than the buffers between two sockets hold."""


class App:
    """Answers /now at once, /later after a while, /much with many bytes, /endless for ever."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.num_gone = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        message = await receive()
        self.bodies.append(message.get("body", b""))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if scope["path"] == "/later":
            await asyncio.sleep(3 * WAIT)
        if scope["path"] == "/much":
            for _ in range(NUM_CHUNKS):
                await send({"type": "http.response.body", "body": CHUNK, "more_body": True})
        if scope["path"] == "/endless":
            sending = asyncio.ensure_future(self._send_for_ever(send))
            while (await receive())["type"] != "http.disconnect":
                pass
            sending.cancel()
            self.num_gone += 1
        await send({"type": "http.response.body", "body": b"end", "more_body": False})

    async def _send_for_ever(self, send: Send) -> None:
        while True:
            await send({"type": "http.response.body", "body": CHUNK, "more_body": True})


@contextmanager
def serving(app: Any, **limits: Any) -> Iterator[tuple[str, int]]:
    """The address of a server whose connections have other limits."""
    kind = type("Limited", (Connection,), {"wait_seconds": WAIT} | limits)
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none", lifespan="off", http=kind))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield listener.getsockname()
    finally:
        server.should_exit = server.force_exit = True
        thread.join()


def connect(address: tuple[str, int], first: bytes = b"") -> socket.socket:
    connection = socket.create_connection(address, timeout=60)
    connection.sendall(first)
    return connection


def is_open(connection: socket.socket) -> bool:
    """Whether the server has not closed it; what it sent is read and dropped."""
    connection.setblocking(False)
    try:
        while connection.recv(65_536):
            pass
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def read_answer(connection: socket.socket) -> bytes:
    """One answer, which is in chunks."""
    connection.setblocking(True)
    answer = b""
    while not answer.endswith(b"\r\n0\r\n\r\n"):
        received = connection.recv(65_536)
        assert received, "the server has closed the connection"
        answer += received
    return answer


def read_to_end(connection: socket.socket) -> bytes:
    with connection, connection.makefile("rb") as file:
        return file.read()


# --- who owes a request ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "first",
    [
        b"",
        b"POST /now HTTP/1.1\r\nHost: local",
        HEAD,
        HEAD + b'{"pro',
        GET % b"now",  # answered, and then idle
        GET % b"now" + HEAD,  # the next has come in part before the answer
    ],
    ids=["silent", "half a header", "no body", "half a body", "idle", "half of the next"],
)
def test_who_owes_a_request_is_closed_in_time(first: bytes) -> None:
    with serving(Gate(App(), Rules(), Stats())) as address, connect(address, first) as connection:
        start = time.monotonic()
        time.sleep(WAIT / 2)
        assert is_open(connection)
        wait_until(lambda: not is_open(connection))
        assert 0.9 * WAIT < time.monotonic() - start < WAIT + 2


@pytest.mark.parametrize("head", [b"", HEAD, GET % b"now" + HEAD], ids=["header", "body", "the next one's body"])
def test_trickling_does_not_put_it_off(head: bytes) -> None:
    with serving(Gate(App(), Rules(), Stats())) as address, connect(address, head) as connection:
        start = time.monotonic()
        for byte in HEAD[:30]:
            if not is_open(connection):
                break
            connection.setblocking(True)
            connection.sendall(bytes([byte]))
            time.sleep(WAIT / 10)
        assert not is_open(connection)
        assert time.monotonic() - start > 0.9 * WAIT


def test_a_next_request_has_its_own_time() -> None:
    with serving(App(), wait_seconds=1.0) as address, connect(address) as connection:
        for _ in range(2):
            connection.sendall((GET % b"now")[:9])
            time.sleep(0.6)
            connection.sendall((GET % b"now")[9:])
            assert b"end" in read_answer(connection)
            time.sleep(0.6)


def test_half_a_body_is_no_request() -> None:
    app, stats = App(), Stats()
    with serving(Gate(app, Rules(), stats)) as address:
        connect(address, HEAD + b'{"prompt": "a"}').close()
        wait_until(lambda: b'smelter_requests_total{route="other",status="0"} 1.0' in stats.text())
        assert app.bodies == []


# --- who waits for an answer -----------------------------------------------------------------------


def test_a_long_answer_is_not_cut_off() -> None:
    with serving(App()) as address, connect(address, GET % b"later") as connection:
        time.sleep(2 * WAIT)
        assert is_open(connection)
        assert b"end" in read_answer(connection)


def test_a_slow_reader_is_not_cut_off() -> None:
    with serving(App(), stalled_seconds=8 * WAIT) as address, connect(address, GET % b"much") as connection:
        num_read = 0
        for pause in [3 * WAIT, *[0.5 * WAIT] * 8, *[0.0] * 10_000]:
            time.sleep(pause)
            received = connection.recv(500_000)
            num_read += len(received)
            if received.endswith(b"end\r\n0\r\n\r\n"):
                break
        assert num_read > NUM_CHUNKS * len(CHUNK)


@pytest.mark.skipif(sys.platform != "linux", reason="TCP_USER_TIMEOUT is Linux's")
def test_who_reads_nothing_is_given_up() -> None:
    app = App()
    with serving(app, stalled_seconds=1.0) as address, connect(address, GET % b"endless"):
        wait_until(lambda: app.num_gone == 1)


# --- too many --------------------------------------------------------------------------------------


def test_the_silent_give_way() -> None:
    app = App()
    with serving(app, max_connections=8, wait_seconds=60.0) as address, ExitStack() as stack:
        busy = [stack.enter_context(connect(address, GET % b"later")) for _ in range(4)]
        wait_until(lambda: len(app.bodies) == 4)
        others = [stack.enter_context(connect(address, first)) for _ in range(15) for first in (b"", HEAD)]
        for _ in range(5):  # whoever asks gets through
            assert httpx.get(f"http://{address[0]}:{address[1]}/now").text == "end"
        still_open = [is_open(connection) for connection in others]
        num_left = sum(still_open)
        assert 0 < num_left < 4  # beside the busy ones and one that asked
        assert still_open == [False] * (30 - num_left) + [True] * num_left  # who has owed for longest went first
        for connection in busy:
            assert b"end" in read_answer(connection)


def test_where_everybody_waits_for_an_answer_more_are_refused() -> None:
    app = App()
    with serving(app, max_connections=4) as address, ExitStack() as stack:
        busy = [stack.enter_context(connect(address, GET % b"later")) for _ in range(4)]
        wait_until(lambda: len(app.bodies) == 4)
        for _ in range(3):
            head, _, body = read_to_end(connect(address, GET % b"now")).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 503 ")
            assert b"retry-after: 1" in head.lower()
            assert json.loads(body)["error"]["type"] == "server_error"
            assert b"\n" not in body
        for connection in busy:
            assert b"end" in read_answer(connection)
        assert httpx.get(f"http://{address[0]}:{address[1]}/now").text == "end"


@pytest.mark.slow
def test_smelter_serve_closes_three_hundred(tmp_path: Path) -> None:
    run = tiny.checkpoint(tmp_path / "small", tiny.model())
    with command(run) as (_, url), ExitStack() as stack:
        host, port = url.removeprefix("http://").split(":")
        firsts = [b"", HEAD[:20], HEAD] * 100
        connections = [stack.enter_context(connect((host, int(port)), first)) for first in firsts]
        start = time.monotonic()
        assert httpx.get(f"{url}/health").json()["status"] == "ok"
        time.sleep(WAIT_SECONDS / 2)
        assert all(map(is_open, connections))
        wait_until(lambda: not any(map(is_open, connections)), WAIT_SECONDS)
        assert WAIT_SECONDS - 2 < time.monotonic() - start < WAIT_SECONDS + 8
