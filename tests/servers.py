"""Servers for tests: one inside the test's process, and the real command as a process of its own."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from smelter.decoding.engine import Engine
from smelter.serving.app import make_app
from smelter.serving.bridge import Service
from smelter.serving.connections import Connection
from smelter.serving.gate import Rules
from smelter.serving.serve import listen
from smelter.serving.stats import Stats
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def running(
    rules: Rules | None = None, model: Any = None, tokens: Any = None, **options: Any
) -> Iterator[tuple[str, Service]]:
    """A server with a tiny model in this process: its URL, and what its routes share."""
    made, tokenizer = model or tiny.model(), tokens or tiny.tokenizer()
    engine = Engine(made, tokenizer, **{"num_slots": 4} | options)
    count = sum(parameter.numel() for parameter in made.parameters())
    service = Service(engine, tokenizer, "tiny", 1_700_000_000, count, Stats(engine))
    listener = listen("127.0.0.1", 0)
    app = make_app(service, rules or Rules())
    config = uvicorn.Config(app, log_level="error", ws="none", lifespan="off", http=Connection)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    engine.start()
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", service
    finally:
        server.should_exit = server.force_exit = True
        thread.join()
        engine.stop()


@contextmanager
def command(
    folder: Path, *options: str, environment: dict[str, str] | None = None
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`smelter serve FOLDER --port 0 OPTIONS` as a process, ready, and its URL."""
    process = subprocess.Popen(
        [sys.executable, "-m", "smelter", "serve", str(folder), "--port", "0", *options],
        cwd=ROOT,
        env=os.environ | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert " at http://" in line, process.stderr.read() if process.stderr else ""
        yield process, line.split()[-1]
    finally:
        process.terminate()  # gently: a llama-server behind it is ended by it
        try:
            process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def wait_until(condition: Any, seconds: float = 20.0) -> float:
    """Wait for a condition; the seconds that took. AssertionError if it takes longer."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds
        time.sleep(0.005)
    return time.monotonic() - start


def raw_request(url: str, body: bytes) -> socket.socket:
    """A connection on which a request to /v1/completions was sent, and nothing read."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=60)
    lines = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    head = "\r\n".join([*lines, f"Content-Length: {len(body)}", "Connection: close", "", ""])
    connection.sendall(head.encode() + body)
    return connection
