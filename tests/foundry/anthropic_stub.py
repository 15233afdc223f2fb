"""The stub teacher with Anthropic's interface: POST .../messages, answered as a stream of its events."""

import json
from typing import Any

from aiohttp import web

from tests.foundry.stub_teacher import StubTeacher, answer_to, usage_of


def text_of(content: Any) -> str:
    """A message's words, given as a string or as blocks."""
    return content if isinstance(content, str) else "".join(block["text"] for block in content)


class AnthropicStub(StubTeacher):
    """Faults: "529" (overloaded) and "length"."""

    @property
    def anthropic_url(self) -> str:
        """Its base_url."""
        return f"http://127.0.0.1:{self.port}/anthropic/v1"

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        assert request.path == "/anthropic/v1/messages", request.path
        body = json.loads(await request.read())
        self.requests.append(body)
        self.headers.append(dict(request.headers))
        prompt = text_of(body["messages"][-1]["content"])
        fault = self.faults(prompt, self.prompts[prompt])
        self.prompts[prompt] += 1
        if request.headers.get("x-api-key") != self.key:
            error = {"type": "authentication_error", "message": "invalid x-api-key"}
            return web.json_response({"type": "error", "error": error}, status=401)
        if fault == "529":
            error = {"type": "overloaded_error", "message": "Overloaded"}
            return web.json_response({"type": "error", "error": error}, status=529)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        usage = usage_of(prompt)

        async def event(kind: str, **data: Any) -> None:
            await response.write(f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n".encode())

        message = {"id": "msg_1", "type": "message", "role": "assistant", "model": body["model"], "content": []}
        message |= {"stop_reason": None, "usage": {"input_tokens": usage["prompt_tokens"], "output_tokens": 1}}
        await event("message_start", message=message)
        await event("content_block_start", index=0, content_block={"type": "thinking", "thinking": "", "signature": ""})
        for word in ("let ", "me ", "see"):
            await event("content_block_delta", index=0, delta={"type": "thinking_delta", "thinking": word})
        await event("content_block_delta", index=0, delta={"type": "signature_delta", "signature": "abc"})
        await event("content_block_stop", index=0)
        await event("content_block_start", index=1, content_block={"type": "text", "text": ""})
        for word in answer_to(prompt).splitlines(keepends=True):
            await event("content_block_delta", index=1, delta={"type": "text_delta", "text": word})
        await event("content_block_stop", index=1)
        stop = "max_tokens" if fault == "length" else "end_turn"
        usage_end = {"output_tokens": usage["completion_tokens"]}
        await event("message_delta", delta={"stop_reason": stop, "stop_sequence": None}, usage=usage_end)
        await event("message_stop")
        await response.write_eof()
        return response
