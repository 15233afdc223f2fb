"""llama.cpp's interface, which editor plug-ins for local models speak: /infill and /completion."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

from smelter.decoding import End, Request, Token, make_prompt
from smelter.serving.bridge import EventStream, Service, Stream, answer, collect, gone, to_json, token_text
from smelter.serving.prompts import (
    Prepared,
    check_num_answers,
    complete_request,
    prepare_prompt,
    prompts_of,
    room_for,
)
from smelter.serving.schema import ERRORS, InfillRequest, LlamaCompletionRequest
from smelter.tokens import Tokenizer


def _prepare(body: InfillRequest | LlamaCompletionRequest, service: Service) -> list[Prepared]:
    """One for each prompt, with the seed of its first answer."""
    tokenizer, context = service.tokenizer, service.engine.context
    limit = -1 if body.limit is None else body.limit
    if isinstance(body, InfillRequest):
        # What is typed is text, whatever it holds: `prompt` is the line at the cursor.
        text = body.input_prefix + body.prompt
        extra = tuple(file.text for file in body.input_extra)
        room = room_for(limit, context)
        encoded = make_prompt(tokenizer, context, text, body.input_suffix, max_tokens=room, extra=extra)
        request = Request(encoded.ids, encoded.pending, line_end=encoded.line_end)
        prepared = [Prepared(request, text, encoded.num_tokens, encoded.num_dropped)]
    else:
        prepared = [prepare_prompt(prompt, tokenizer, context, limit) for prompt in prompts_of(body.prompt)]
    check_num_answers(len(prepared), body.num_choices)
    num_top = body.logprobs if body.n_probs is None else body.n_probs
    others = {"stop_ids": [tokenizer.eos_id], "num_top": num_top or None}
    return [complete_request(item, body, limit, context, **others) for item in prepared]


def _timings(end: End) -> dict[str, Any]:
    read = end.num_prompt - end.num_cached

    def part(name: str, count: int, seconds: float) -> dict[str, Any]:
        return {
            f"{name}_n": count,
            f"{name}_ms": seconds * 1_000,
            f"{name}_per_token_ms": seconds * 1_000 / count if count else 0.0,
            f"{name}_per_second": count / seconds if seconds else 0.0,
        }

    return {
        "cache_n": end.num_cached,
        **part("prompt", read, end.prompt_seconds),
        **part("predicted", end.num_tokens, end.decode_seconds),
    }


def _probabilities(tokens: Sequence[Token], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    def one(index: int, text: str, raw: bytes, logprob: float | None) -> dict[str, Any]:
        return {"id": index, "token": text, "bytes": list(raw), "logprob": logprob}

    return [
        {
            **one(token.id, token_text(token), token.raw, token.logprob),
            "top_logprobs": [
                one(i, tokenizer.decode([i], skip_special_tokens=False), tokenizer.decode_bytes([i]), value)
                for i, value in token.top
            ],
        }
        for token in tokens
    ]


def _final(service: Service, prepared: Prepared, content: str, text: str, end: End) -> dict[str, Any]:
    """The last message: all that llama.cpp's clients look at. `content` is what was not sent yet of `text`."""
    request = prepared.request
    word = end.stop is not None
    is_full = end.finish == "length" and end.num_prompt + end.num_tokens >= service.engine.context
    kinds = {"stop": "word" if word else "eos", "length": "limit", "time": "limit"}
    return {
        "content": content,
        "tokens": [],
        "id_slot": 0,
        "stop": True,
        "model": service.name,
        "tokens_predicted": end.num_tokens,
        "tokens_evaluated": end.num_prompt,
        "tokens_cached": end.num_prompt + end.num_tokens,
        "generation_settings": settings(request),
        "prompt": service.tokenizer.decode(request.ids, skip_special_tokens=False)
        + request.pending.decode("utf-8", "replace"),
        "has_new_line": "\n" in text,
        "truncated": prepared.num_dropped > 0 or is_full,
        "stop_type": kinds.get(end.finish, "none"),
        "stopping_word": end.stop or "",
        "timings": _timings(end),
    }


def settings(request: Request) -> dict[str, Any]:
    """How an answer is written, by llama.cpp's names."""
    return {
        "seed": request.seed,
        "temperature": request.temperature,
        "top_k": request.top_k,
        "top_p": request.top_p,
        "min_p": request.min_p,
        "n_predict": request.max_tokens,
        "n_indent": request.n_indent,
        "stop": list(request.stops),
        "n_probs": request.num_top or 0,
    }


def _chosen(message: dict[str, Any], fields: Sequence[str] | None) -> dict[str, Any]:
    """Only the fields prepared for; "timings/prompt_n" is one inside another, and keeps that name."""
    if not fields:
        return message
    chosen: dict[str, Any] = {}
    for path in fields:
        value: Any = message
        for key in path.split("/"):
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            chosen[path] = value
    return chosen


async def _answer(body: InfillRequest | LlamaCompletionRequest, http: HttpRequest, service: Service) -> Response:
    """A message, a list of them where there are several answers, or a stream of the messages of all."""
    prompts = await asyncio.to_thread(_prepare, body, service)
    # Answers to the same prompt differ in their seeds as the rows of `generate` do.
    prepared = [
        replace(item, request=replace(item.request, seed=item.request.seed + i))
        for item in prompts
        for i in range(body.num_choices)
    ]
    requests = [item.request for item in prepared]

    def chosen(index: int, message: dict[str, Any], tokens: Sequence[Token]) -> dict[str, Any]:
        if requests[index].num_top is not None:
            message["completion_probabilities"] = _probabilities(tokens, service.tokenizer)
        return _chosen({"index": index, **message}, body.response_fields)

    async def events(stream: Stream) -> AsyncIterator[str]:
        texts, counts = [""] * len(requests), [0] * len(requests)
        async for index, piece in stream:
            texts[index] += piece.text
            counts[index] += len(piece.tokens)
            message: dict[str, Any] = {
                "content": piece.text,
                "tokens": [token.id for token in piece.tokens],
                "stop": False,
                "id_slot": 0,
                "tokens_predicted": counts[index],
                "tokens_evaluated": len(requests[index].ids),
            }
            if piece.end is not None:
                message = _final(service, prepared[index], piece.text, texts[index], piece.end)
            yield to_json(chosen(index, message, piece.tokens))

    if body.stream:
        stream = Stream(service, requests)
        return EventStream(stream, events(stream))
    results = await collect(service, http, requests)
    if results is None:
        return gone()
    messages = []
    for index, result in enumerate(results):
        assert result.end is not None
        message = _final(service, prepared[index], result.text, result.text, result.end)
        message["tokens"] = [token.id for token in result.tokens]
        messages.append(chosen(index, message, result.tokens))
    return answer(messages if len(messages) > 1 else messages[0])


def make_router(service: Service) -> APIRouter:
    """The routes of llama.cpp's server at which a model writes."""
    router = APIRouter(tags=["llama.cpp"], responses=ERRORS)

    @router.post("/infill", response_model=None)
    async def infill(body: InfillRequest, http: HttpRequest) -> Response:
        """What stands between `input_prefix` and `input_suffix`."""
        return await _answer(body, http, service)

    @router.post("/completions", response_model=None)
    @router.post("/completion", response_model=None)
    async def completion(body: LlamaCompletionRequest, http: HttpRequest) -> Response:
        """What follows `prompt`."""
        return await _answer(body, http, service)

    return router
