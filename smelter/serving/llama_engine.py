"""llama.cpp's server as an engine: it chooses the tokens, and all else is as with our own.

The routes ask an engine for tokens, and an `Answer` makes text of them: stops, limits, what is shown when. Here the
tokens come from llama-server's `/completion`, which gets the prompt as token ids, as a stream. So the two engines
answer alike in form, and in content as far as their arithmetic agrees (llama.cpp rounds activations in blocks).

What is pending (see `decoding.healing`) is spelled by requests for one token each, in which those that spell it have a
head start. A grammar would say the same in one request. But llama.cpp tries it after its samplers, of which `infill`
ends the text where it should choose among those that fit, and it aborts where that ends inside the grammar.
"""

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import aiohttp

from smelter.decoding import Answer, Counts, EngineBusy, EngineStopped, Finish, Piece, Request, Token
from smelter.serving.errors import ApiError
from smelter.serving.llama_server import LlamaServer
from smelter.tokens import Tokenizer

_LINE_BYTES = 2**20
"""More than any event that is asked for: a token with its likeliest, or the last, of `_LAST`."""
_LAST = ["stop", "stop_type", "content", "tokens", "completion_probabilities", "timings"]
_HEAD_START = 200.0
"""Added to logits: what has it not is as good as impossible, and among those that have it nothing changes."""
_FINISH: dict[str, Finish] = {"eos": "stop", "limit": "length"}


class LlamaEngine:
    """The same as `decoding.Engine`, with llama-server behind it; lives in the event loop of who submits."""

    def __init__(self, server: LlamaServer, tokenizer: Tokenizer, *, context: int, max_queue: int) -> None:
        self.num_slots, self.max_queue, self.context = server.num_slots, max_queue, context
        self.counts = Counts()
        self.num_active = 0
        self._server, self._tokenizer = server, tokenizer
        self._bytes_of = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)]
        self._slots = asyncio.Semaphore(server.num_slots)
        self._tasks: dict[Answer, asyncio.Task[None]] = {}

    @property
    def failure(self) -> str | None:
        """Why nothing can be asked any more."""
        status = self._server.process.poll()
        return None if status is None else f"llama-server has ended with status {status}"

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._tasks) - self.num_active

    def submit(self, requests: Sequence[Request], deliver: Sequence[Callable[[Piece], None]]) -> list[Answer]:
        """As `Engine.submit`, in the event loop. ApiError for log-probabilities of a prompt, which are not told."""
        if any(request.scored_ids for request in requests):
            raise ApiError(400, "echo: has no logprobs with --engine llama.cpp: leave one of them out", param="echo")
        if self.failure is not None:
            raise EngineStopped(self.failure)
        if len(self._tasks) + len(requests) > self.max_queue + self.num_slots:
            raise EngineBusy(f"{self.num_active} requests are in work and {self.num_waiting} wait")
        answers = [Answer(request, self.context, call) for request, call in zip(requests, deliver, strict=True)]
        for answer in answers:
            self._tasks[answer] = asyncio.get_running_loop().create_task(self._serve(answer))
        return answers

    def cancel(self, answers: Sequence[Answer]) -> None:
        """Nobody waits for these any more."""
        for answer in answers:
            if answer in self._tasks:
                self._tasks[answer].cancel()

    async def _serve(self, answer: Answer) -> None:
        finish: Finish = "error"
        try:
            async with self._slots:
                self.num_active += 1
                answer.started = time.monotonic()
                try:
                    finish = await self._write(answer)
                finally:
                    self.num_active -= 1
        except asyncio.CancelledError:
            finish = "cancelled"
        except (aiohttp.ClientError, OSError, RuntimeError) as error:
            print(f"smelter serve: llama-server: {error}", file=sys.stderr, flush=True)
        finally:  # whatever happens: somebody waits for the end
            del self._tasks[answer]
            piece = answer.last_piece(finish)
            self._count(piece)
            answer.deliver(piece)

    def _count(self, piece: Piece) -> None:
        """Add an answer to the counts. How many steps it shared with others is not known here."""
        end, counts = piece.end, self.counts
        assert end is not None
        counts.requests += 1
        counts.cancelled += end.finish == "cancelled"
        counts.prompt_tokens += end.num_prompt - end.num_cached
        counts.cached_tokens += end.num_cached
        counts.tokens += end.num_tokens
        counts.prompt_seconds += end.prompt_seconds
        counts.decode_seconds += end.decode_seconds

    async def _write(self, answer: Answer) -> Finish:
        """Deliver what llama-server writes, until the answer has ended. RuntimeError where it refuses."""
        limit = answer.request.max_seconds
        while answer.pending and answer.limit:
            body = self._body(answer) | {"n_predict": 1, "stream": False, "logit_bias": self._spelling(answer.pending)}
            async for message in self._messages(body):
                self._note_first(answer, message["timings"]["cache_n"])
                finish = self._take(answer, message)
                if finish is not None:
                    return finish
                _deliver(answer)
        async for message in self._messages(self._body(answer)):
            if progress := message.get("prompt_progress"):
                self._note_first(answer, progress["cache"], is_read=progress["processed"] == progress["total"])
                continue
            if not answer.limit:  # the prompt is read; llama-server writes a token even then
                return "length"
            finish = self._take(answer, message)
            if finish is None and message["stop"]:
                finish = _FINISH[message["stop_type"]]
            if finish is not None:
                return finish
            text = _deliver(answer)
            if limit is not None and "\n" in text and time.monotonic() - answer.first > limit:
                return "time"
        raise RuntimeError("a stream without an end")

    def _note_first(self, answer: Answer, num_cached: int, *, is_read: bool = True) -> None:
        """Of the requests for an answer the first tells what was cached, and when the prompt was read."""
        if not answer.first:
            answer.num_cached = num_cached
            answer.first = time.monotonic() if is_read else 0.0

    def _take(self, answer: Answer, message: dict[str, Any]) -> Finish | None:
        for token in self._tokens(message, answer.request.num_top or 0):
            answer.take(token.id, token.raw, token.logprob, token.top)
            if answer.finish is not None:
                return answer.finish
        return "stop" if message.get("stop_type") == "eos" else None

    async def _messages(self, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """The answer, or the events of a stream."""
        headers, url = {"Authorization": f"Bearer {self._server.key}"}, f"{self._server.url}/completion"
        # A connection for each request: cutting it off is how an answer is ended.
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None), read_bufsize=_LINE_BYTES) as session,
            session.post(url, json=body, headers=headers) as response,
        ):
            if response.status != 200:
                raise RuntimeError(f"status {response.status}: {await response.text()}")
            if not body["stream"]:
                yield await response.json()
                return
            async for line in response.content:
                if line.startswith(b"data: {"):
                    message: dict[str, Any] = json.loads(line[6:])
                    if "error" in message:
                        raise RuntimeError(message["error"])
                    yield message

    def _body(self, answer: Answer) -> dict[str, Any]:
        request = answer.request
        prompt = [*request.ids, *answer.ids]
        return {
            "prompt": prompt[: self.context - 1],  # it wants room even where nothing is to be written
            "n_predict": answer.limit - len(answer.ids),
            "temperature": request.temperature,
            "top_k": request.top_k,
            "top_p": request.top_p,
            "min_p": request.min_p,
            "samplers": ["top_k", "top_p", "min_p", *["infill"] * request.infill_sampler, "temperature"],
            "seed": request.seed % (2**32 - 1),  # the highest means: another one each time
            "n_probs": 0 if request.num_top is None else max(request.num_top, 1),
            "stream": True,
            "return_tokens": True,
            "return_progress": True,
            "response_fields": _LAST,
        }

    def _spelling(self, pending: bytes) -> list[tuple[int, float]]:
        """The head start of the tokens that begin with what is pending, or with which that begins."""
        return [
            (index, _HEAD_START)
            for index, raw in enumerate(self._bytes_of)
            if raw and (raw.startswith(pending) or pending.startswith(raw))
        ]

    def _tokens(self, message: dict[str, Any], num_top: int) -> list[Token]:
        """A message's token, and those left out before it.

        llama-server tells of no token with which a character is not complete. Its bytes come with the next one, its
        log-probability does not.
        """
        tokens = []
        for token in message["tokens"]:
            raw, content = self._bytes_of[token], message["content"].encode()
            before = content.removesuffix(raw) if content.endswith(raw) else b""
            tokens += [Token(i, self._bytes_of[i], None) for i in self._tokenizer.encode_bytes(before)]
            (scores,) = message.get("completion_probabilities") or [{}]
            top = tuple((other["id"], other["logprob"]) for other in scores.get("top_logprobs", ())[:num_top])
            tokens.append(Token(token, raw, scores.get("logprob"), top))
        return tokens


def _deliver(answer: Answer) -> str:
    """What may be shown now, to who waits for it; its text."""
    piece = answer.piece()
    if piece.text or piece.tokens:
        answer.deliver(piece)
    return piece.text
