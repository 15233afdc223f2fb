"""llama.cpp's server behind our routes: the page, the key, the limits and OpenAI's `suffix` before its speed.

The real `llama-server` runs as a child on a loopback port of its own, with a key that only we know. Requests are
checked here by the same schema and passed on; `/v1/completions` with a suffix, which it ignores, becomes its `/infill`.
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from fastapi import Request as HttpRequest
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from smelter.base import UserError
from smelter.serving.app import new_app
from smelter.serving.bridge import gone, to_json, unless_gone
from smelter.serving.errors import ApiError
from smelter.serving.gate import Gate, Rules
from smelter.serving.prompts import pick_seed
from smelter.serving.schema import (
    ERRORS,
    ChatRequest,
    CompletionRequest,
    InfillRequest,
    LlamaCompletionRequest,
    TokenizeRequest,
)
from smelter.serving.stats import Stats

START_SECONDS = 120
DIE_WITH_US = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != int(sys.argv[1]):
        sys.exit("whoever started this is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""
"""Starts a program that the kernel ends when we die, even by SIGKILL: argv is our process id, the program, its options.

In a process of its own, since code between fork and exec is no good where threads run (preexec_fn).
"""


@dataclass(frozen=True)
class LlamaServer:
    """A llama-server that runs and is ready."""

    process: subprocess.Popen[bytes]
    url: str
    key: str
    context: int
    num_slots: int

    def stop(self) -> None:
        """End it."""
        self.process.terminate()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def find_llama_server(program: Path | None) -> str:
    """The program's path. Raises UserError where there is none."""
    path = shutil.which(str(program or "llama-server"))
    if path is None:
        raise UserError(f"{program or 'llama-server'}: no such program: install llama.cpp, or give --llama-server PATH")
    return path


def start_llama_server(program: str, gguf: Path, *, context: int, num_slots: int, threads: int | None) -> LlamaServer:
    """Start it with `context` tokens for each of `num_slots`, and wait until the model is loaded.

    Raises UserError with its last line where it ends instead.
    """
    if not gguf.is_file():
        raise UserError(f"{gguf}: no such file: make it with smelter export --format gguf, or give --gguf FILE")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    key = secrets.token_urlsafe(32)
    command = [program, "--model", str(gguf), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--ctx-size", str(context * num_slots), "--parallel", str(num_slots), "--metrics"]
    # /infill fills a batch with the code around the cursor, and leaves the rest; every slot has its token in one, too.
    batch = str(max(context // 2, num_slots))
    command += ["--batch-size", batch, "--ubatch-size", batch]
    command += ["--flash-attn", "off", "--cache-type-k", "f32", "--cache-type-v", "f32"]  # as the model computes
    command += ["--threads", str(threads)] if threads else []
    with tempfile.TemporaryFile() as log:
        # The key goes by the environment: command lines are everybody's to read.
        environment = os.environ | {"LLAMA_API_KEY": key}
        command = [sys.executable, "-c", DIE_WITH_US, str(os.getpid()), *command]
        # Ctrl+C is for us; we end it when what is in flight is done.
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + START_SECONDS
        while not _is_ready(port):
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                process.wait()
                log.seek(0)
                lines = [line for line in log.read().decode("utf-8", "replace").splitlines() if line.strip()]
                raise UserError(f"{program} does not start: {lines[-1] if lines else 'it says nothing'}")
            time.sleep(0.05)
    return LlamaServer(process, f"http://127.0.0.1:{port}", key, context, num_slots)


def _is_ready(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
            return b" 200 " in connection.recv(64)
    except OSError:
        return False


class _Passed(Response):
    """A streamed answer, passed on as it comes; when the client goes away, the connection to llama-server ends too."""

    def __init__(self, chunks: AsyncIterator[bytes], status: int, media_type: str) -> None:
        super().__init__(status_code=status, media_type=media_type)
        del self.headers["content-length"]
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the chunks."""
        await unless_gone(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for chunk in self._chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class _Upstream:
    """Asks llama-server, a limited number of requests at a time."""

    def __init__(self, server: LlamaServer, max_queue: int) -> None:
        self.server, self.max_open = server, server.num_slots + max_queue
        self.num_open = 0
        self._session: aiohttp.ClientSession | None = None

    @asynccontextmanager
    async def open(self, method: str, path: str, body: Any = None) -> AsyncIterator[aiohttp.ClientResponse]:
        """Its response. ApiError 429 for too many requests, 503 where it is gone."""
        if self.num_open >= self.max_open:
            raise ApiError(429, f"{self.num_open} requests are in work or wait", headers={"Retry-After": "1"})
        if self._session is None:  # here, inside the event loop
            self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None))
        self.num_open += 1
        try:
            headers = {"Authorization": f"Bearer {self.server.key}"}
            async with self._session.request(method, self.server.url + path, json=body, headers=headers) as response:
                yield response
        except aiohttp.ClientConnectionError as error:
            raise ApiError(503, f"llama-server is gone: {error}") from None
        finally:
            self.num_open -= 1

    async def pass_on(self, http: HttpRequest, path: str, body: Any) -> Response:
        """Ask, and give its answer as it is."""
        if isinstance(body, dict) and body.get("stream"):
            return await self._pass_stream(path, body)
        answer: list[Response] = []

        async def ask() -> None:
            async with self.open(http.method, path, body) as response:
                content = await response.read()
                answer.append(Response(content, response.status, media_type=response.content_type))

        return answer[0] if await unless_gone(http.receive, ask()) else gone()

    async def _pass_stream(self, path: str, body: Any) -> Response:
        opened = self.open("POST", path, body)
        response = await opened.__aenter__()

        async def chunks() -> AsyncIterator[bytes]:
            try:
                async for chunk in response.content.iter_any():
                    yield chunk
            finally:
                response.close()
                await opened.__aexit__(None, None, None)

        return _Passed(chunks(), response.status, response.content_type)


def _infill_body(body: CompletionRequest) -> dict[str, Any]:
    """/infill for /v1/completions with a suffix."""
    if not isinstance(body.prompt, str):
        raise ApiError(400, "suffix: needs a prompt that is one text", param="suffix")
    if (body.n or 1) > 1 or body.echo:
        raise ApiError(400, "n, echo: are not supported together with suffix by this engine", param="suffix")
    return {
        "input_prefix": body.prompt,
        "input_suffix": body.suffix,
        "n_predict": 64 if body.max_tokens is None else body.max_tokens,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "top_k": body.top_k or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "seed": pick_seed(body.seed) % 2**32,
        "stop": body.stops(),
        "stream": bool(body.stream),
        "n_probs": int(body.logprobs or 0),
    }


def _as_completion(message: dict[str, Any], name: str, identity: str, *, with_usage: bool) -> dict[str, Any]:
    """A message of /infill in OpenAI's form."""
    probabilities = message.get("completion_probabilities")
    logprobs = probabilities and {
        "tokens": [token["token"] for token in probabilities],
        "token_logprobs": [token["logprob"] for token in probabilities],
        "top_logprobs": [{top["token"]: top["logprob"] for top in token["top_logprobs"]} for token in probabilities],
        "text_offset": [],
    }
    reason = ("length" if message.get("stop_type") == "limit" else "stop") if message["stop"] else None
    choice = {"index": 0, "text": message["content"], "logprobs": logprobs or None, "finish_reason": reason}
    head = {"id": identity, "object": "text_completion", "created": int(time.time()), "model": name}
    completion: dict[str, Any] = head | {"choices": [choice]}
    if with_usage and message["stop"]:
        prompt, written = message["tokens_evaluated"], message["tokens_predicted"]
        completion["usage"] = {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}
    return completion


def make_proxy_app(server: LlamaServer, name: str, rules: Rules, max_queue: int) -> ASGIApp:
    """The same routes as `app.make_app`, answered by llama-server."""
    app, stats, upstream = new_app(), Stats(), _Upstream(server, max_queue)
    created = int(time.time())

    def sent(body: BaseModel) -> dict[str, Any]:
        """What the client set, checked, and without the model's name, which llama-server has another for."""
        return body.model_dump(exclude_unset=True, exclude_none=True, exclude={"model"})

    @app.get("/health", responses={503: ERRORS[503]})
    async def health() -> dict[str, Any]:
        """Whether llama-server runs."""
        if server.process.poll() is not None:
            raise ApiError(503, "llama-server has ended")
        active = min(upstream.num_open, server.num_slots)
        waiting = upstream.num_open - active
        return {"status": "ok", "active": active, "slots": server.num_slots, "waiting": waiting}

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        """Our figures, then llama-server's."""
        async with upstream.open("GET", "/metrics") as response:
            theirs = await response.read()
        return Response(stats.text() + theirs, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model that is here."""
        async with upstream.open("GET", "/v1/models") as response:
            meta = (await response.json())["data"][0].get("meta") or {}
        meta = {"n_ctx_train": server.context, "n_params": meta.get("n_params")}
        card = {"id": name, "object": "model", "created": created, "owned_by": "smelter", "meta": meta}
        return {"object": "list", "data": [card]}

    @app.post("/infill", response_model=None, responses=ERRORS)
    async def infill(body: InfillRequest, http: HttpRequest) -> Response:
        """What stands between `input_prefix` and `input_suffix`."""
        defaults = {"input_prefix": "", "input_suffix": "", "temperature": body.temperature}
        return await upstream.pass_on(http, "/infill", defaults | sent(body))

    @app.post("/completion", response_model=None, responses=ERRORS)
    async def completion(body: LlamaCompletionRequest, http: HttpRequest) -> Response:
        """What follows `prompt`."""
        return await upstream.pass_on(http, "/completion", {"temperature": body.temperature} | sent(body))

    @app.post("/tokenize", response_model=None, responses=ERRORS)
    async def tokenize(body: TokenizeRequest, http: HttpRequest) -> Response:
        """The token ids of a text."""
        return await upstream.pass_on(http, "/tokenize", sent(body))

    @app.post("/v1/chat/completions", response_model=None, responses=ERRORS)
    async def chat(body: ChatRequest, http: HttpRequest) -> Response:
        """The assistant's next turn."""
        return await upstream.pass_on(http, "/v1/chat/completions", sent(body))

    @app.post("/v1/completions", response_model=None, responses=ERRORS)
    async def completions(body: CompletionRequest, http: HttpRequest) -> Response:
        """Continue `prompt`, or fill in between `prompt` and `suffix`."""
        if body.suffix is None:
            request = {"max_tokens": 64} | sent(body)
            return await upstream.pass_on(http, "/v1/completions", request)
        request, identity = _infill_body(body), f"cmpl-{secrets.token_hex(12)}"
        if body.stream:
            return await _stream_infill(upstream, request, body, name, identity)
        response = await upstream.pass_on(http, "/infill", request)
        if response.status_code != 200:
            return response
        message = json.loads(bytes(response.body))
        return JSONResponse(_as_completion(message, name, identity, with_usage=True))

    return Gate(app, rules, stats)


async def _stream_infill(
    upstream: _Upstream, request: dict[str, Any], body: CompletionRequest, name: str, identity: str
) -> Response:
    """/infill's events as those of /v1/completions."""
    total = body.stream_options is not None and body.stream_options.include_usage
    opened = upstream.open("POST", "/infill", request)
    response = await opened.__aenter__()
    if response.status != 200:
        content = await response.read()
        await opened.__aexit__(None, None, None)
        return Response(content, response.status, media_type=response.content_type)

    async def events() -> AsyncIterator[bytes]:
        try:
            async for line in response.content:
                if line.startswith(b"data: {"):
                    completion = _as_completion(json.loads(line[6:]), name, identity, with_usage=total)
                    usage = completion.pop("usage", None)
                    yield f"data: {to_json(completion)}\n\n".encode()
                    if usage:
                        yield f"data: {to_json(completion | {'choices': [], 'usage': usage})}\n\n".encode()
            yield b"data: [DONE]\n\n"
        finally:
            response.close()
            await opened.__aexit__(None, None, None)

    return _Passed(events(), 200, "text/event-stream")
