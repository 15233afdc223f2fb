"""A small OpenAI-compatible server of the tests' own: real HTTP on 127.0.0.1, the same answer to the same prompt.

It writes down what it received, bills every answer that it began to give, waits as long as it is told, and fails as it
is told: `faults` maps (prompt, how often that prompt came before) to the name of a fault. In a test's own process it
runs on a thread (`StubTeacher`); as a program it prints its port and serves until it is ended (benchmarks).
"""

import argparse
import asyncio
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from aiohttp import web

PRICE_INPUT = 1.0
PRICE_OUTPUT = 10.0
"""US dollars per million tokens, what `billed` counts by."""

ERRORS = {str(status): status for status in (400, 401, 402, 403, 404, 408, 429, 500, 502, 503, 504, 529)}
BILLED_ERRORS = ("408", "502", "504")
"""Behind them the answer was written, and nobody waited for it."""

Faults = Callable[[str, int], str]


def answer_to(prompt: str) -> str:
    """What the stub says to a prompt: a function of the prompt alone."""
    digest = hashlib.sha256(prompt.encode()).hexdigest()
    return f"```python\ndef f_{digest[:8]}(x: int) -> int:\n    return x + {int(digest[:6], 16)}\n```\n" + digest * 8


def usage_of(prompt: str) -> dict[str, int]:
    """What the stub bills for a prompt."""
    return {"prompt_tokens": len(prompt) // 4 + 8, "completion_tokens": len(answer_to(prompt)) // 4}


def cost_of(prompt: str) -> float:
    """The same in US dollars."""
    usage = usage_of(prompt)
    return (usage["prompt_tokens"] * PRICE_INPUT + usage["completion_tokens"] * PRICE_OUTPUT) / 1e6


class StubTeacher:
    """The server on a thread. `url` is its base_url."""

    def __init__(self, *, latency: float = 0.0, faults: Faults | None = None, key: str = "") -> None:
        self.latency = latency
        self.faults = faults or (lambda prompt, number: "")
        self.key = key
        self.requests: list[dict[str, Any]] = []
        """Bodies, as they came."""
        self.headers: list[dict[str, str]] = []
        self.prompts: Counter[str] = Counter()
        self.billed = 0.0
        """US dollars."""
        self.in_flight = 0
        self.most_in_flight = 0
        self.num_cut = 0
        """Requests whose client went away before the answer."""
        self.url = ""
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._stop: asyncio.Event
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(30), "the stub teacher did not start"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)
        self._loop.close()

    def run(self) -> None:
        """Serve in this thread until the process is ended; prints the port first."""
        self._loop.run_until_complete(self._serve(say=True))

    async def _serve(self, *, say: bool = False) -> None:
        self._stop = asyncio.Event()
        server = web.Server(self._handle, access_log=None, handler_cancellation=True)
        runner = web.ServerRunner(server, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self.port, backlog=1_024)
        await site.start()
        self.port = runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        if say:
            print(self.port, flush=True)
        self._ready.set()
        await self._stop.wait()
        await site.stop()
        # Calls that hang would hold the clean-up for ever.
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.wait(others or {asyncio.create_task(asyncio.sleep(0))}, timeout=5)
        await asyncio.wait_for(runner.cleanup(), 5)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.path != "/v1/chat/completions":
            return web.json_response({"error": {"message": f"no such path: {request.path}"}}, status=404)
        body = json.loads(await request.read())
        self.requests.append(body)
        self.headers.append(dict(request.headers))
        prompt = body["messages"][-1]["content"]
        fault = self.faults(prompt, self.prompts[prompt])
        self.prompts[prompt] += 1
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            fault = "401"
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            if fault not in ERRORS or fault in BILLED_ERRORS:
                self.billed += cost_of(prompt)
            return await self._respond(request, body, prompt, fault)
        except asyncio.CancelledError:
            self.num_cut += 1
            raise
        finally:
            self.in_flight -= 1

    async def _respond(
        self, request: web.BaseRequest, body: dict[str, Any], prompt: str, fault: str
    ) -> web.StreamResponse:
        if fault in ERRORS:
            headers = {"retry-after": "0.2"} if fault == "429" else {}
            message = f"you get {fault} for {request.headers.get('Authorization')}"
            return web.json_response({"error": {"message": message}}, status=ERRORS[fault], headers=headers)
        if self.latency:
            await asyncio.sleep(self.latency)
        if fault == "hang":
            await asyncio.sleep(3_600)
        if fault == "disconnect":
            assert request.transport is not None
            request.transport.close()
            return web.Response()
        data = json.dumps(completion(body, prompt, fault)).encode()
        if fault == "half":  # announced whole, then the connection breaks
            response = web.StreamResponse(headers={"Content-Length": str(len(data))})
            await response.prepare(request)
            await response.write(data[: len(data) // 2])
            assert request.transport is not None
            request.transport.close()
            return response
        data = {"garbage": b"<html>Bad gateway</html>", "half_json": data[:-9], "no_body": b""}.get(fault, data)
        return web.Response(body=data, content_type="application/json")


def completion(body: dict[str, Any], prompt: str, fault: str) -> dict[str, Any]:
    """A chat completion, or what a fault makes of it."""
    if fault == "other_shape":
        return {"choices": []}
    if fault == "error_200":
        return {"error": {"message": "upstream says no", "code": 503}}
    message: dict[str, Any] = {"role": "assistant", "content": answer_to(prompt)}
    choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": "stop"}
    match fault:
        case "length":
            message["content"], choice["finish_reason"] = message["content"][:40], "length"
        case "empty":
            message["content"] = " "
        case "filter":
            message["content"], choice["finish_reason"] = None, "content_filter"
        case "only_reasoning":
            message |= {"content": "", "reasoning_content": "hm"}
            choice["finish_reason"] = "length"
        case "think":
            message["content"] = f"<think>\nlet me see\n</think>\n\n{message['content']}"
        case "reasoning":
            message["reasoning_content"] = "let me see"
        case "broken":
            message["content"] = "```python\ndef f(:\n```"
        case "crashes":
            message["content"] = "```python\nraise ValueError\n```"
        case "surrogate":
            message["content"] = "\ud800"
        case "judge":
            message["content"] = "Both work.\n\n2"
    if body.get("logprobs"):
        choice["logprobs"] = {"content": [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -1.5}]}
    usage: dict[str, Any] = usage_of(prompt)
    if fault == "reasoning":
        usage["completion_tokens_details"] = {"reasoning_tokens": 3}
        usage["prompt_tokens_details"] = {"cached_tokens": 5}
    return {"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latency", type=float, default=0.2, help="seconds before an answer")
    StubTeacher(latency=parser.parse_args().latency).run()
