"""The stub teacher as OpenCode wants it: answers come as a stream of server-sent events."""

import argparse
import asyncio
import json
from typing import Any

from aiohttp import web

from tests.foundry.stub_teacher import ERRORS, StubTeacher, completion

WHOLE = {"disconnect", "garbage", "half_json", "no_body", "hang", "error_200", "other_shape"}
"""Faults that strike before a stream begins; the base class has them."""


class StreamingStub(StubTeacher):
    """`StubTeacher` that streams. More faults: "cut" (the connection breaks in the stream), "unfinished" (the stream
    ends without a reason), "bad_event" (an event that is no JSON)."""

    pieces = 2
    """Events that an answer's words come in."""

    async def _respond(
        self, request: web.BaseRequest, body: dict[str, Any], prompt: str, fault: str
    ) -> web.StreamResponse:
        if not body.get("stream") or fault in ERRORS or fault in WHOLE:
            return await super()._respond(request, body, prompt, fault)
        if self.latency:
            await asyncio.sleep(self.latency)
        whole = completion(body, prompt, fault)
        (choice,) = whole.pop("choices")
        message = choice["message"]
        usage = whole.pop("usage")

        def event(delta: dict[str, Any], finish: str | None = None) -> bytes:
            chunk = {**whole, "object": "chat.completion.chunk", "created": 1, "model": body["model"]}
            chunk |= {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}
            if finish:
                chunk["usage"] = usage
            return f"data: {json.dumps(chunk)}\n\n".encode()

        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(event({"role": "assistant", "content": ""}))
        if message.get("reasoning_content"):
            await response.write(event({"reasoning_content": message["reasoning_content"]}))
        text = message["content"] or ""
        half = len(text) // 2
        for i in range(self.pieces - 1):
            begin, end = half * i // (self.pieces - 1), half * (i + 1) // (self.pieces - 1)
            await response.write(event({"content": text[begin:end]}))
        if fault == "cut":
            assert request.transport is not None
            request.transport.close()
            return response
        if fault == "bad_event":
            await response.write(b"data: {nonsense\n\n")
        if fault != "unfinished":
            await response.write(event({"content": text[half:]}))
            await response.write(event({}, choice["finish_reason"]))
            await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latency", type=float, default=0.2, help="seconds before an answer")
    parser.add_argument("--pieces", type=int, default=2, help="events that an answer comes in")
    options = parser.parse_args()
    stub = StreamingStub(latency=options.latency)
    stub.pieces = options.pieces
    stub.run()
