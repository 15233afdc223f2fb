"""llama.cpp's interface, which editor plug-ins for local models speak: /infill, /completion, /tokenize, /props."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

from smelter.decoding import End, Request, Token, make_prompt
from smelter.serving.bridge import EventStream, Service, Stream, answer, collect, gone, to_json, token_text
from smelter.serving.prompts import Prepared, check_ids, check_max_tokens, pick_seed
from smelter.serving.schema import ERRORS, InfillRequest, LlamaCompletionRequest, TokenizeRequest
from smelter.tokens import Tokenizer


def _request(
    body: InfillRequest | LlamaCompletionRequest, service: Service, ids: Sequence[int], pending: bytes
) -> Request:
    context = service.engine.context
    return Request(
        ids=ids,
        pending=pending,
        max_tokens=context - len(ids) if body.n_predict < 0 else body.n_predict,
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
        seed=pick_seed(body.seed),
        stops=body.stop,
        stop_ids=[service.tokenizer.eos_id],
        num_top=body.n_probs or None,
        max_seconds=body.t_max_predict_ms / 1_000 or None,
    )


def _prepare(body: InfillRequest | LlamaCompletionRequest, service: Service) -> Prepared:
    tokenizer, context = service.tokenizer, service.engine.context
    check_max_tokens(body.n_predict, context, "n_predict")
    room = context // 4 if body.n_predict < 0 else body.n_predict
    if isinstance(body, InfillRequest):
        text: str = body.input_prefix + body.prompt
        suffix: str | None = body.input_suffix
        extra = tuple(file.text for file in body.input_extra)
    elif isinstance(body.prompt, str):
        text, suffix, extra = body.prompt, None, ()
    else:
        check_ids(body.prompt, tokenizer, context, max(body.n_predict, 1))
        return Prepared(_request(body, service, body.prompt, b""), tokenizer.decode(body.prompt), len(body.prompt))
    encoded = make_prompt(tokenizer, context, text, suffix, max_tokens=room, extra=extra)
    return Prepared(
        _request(body, service, encoded.ids, encoded.pending), text, encoded.num_tokens, encoded.num_dropped
    )


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
    kinds = {"stop": "word" if word else "eos", "length": "limit", "time": "limit"}
    return {
        "index": 0,
        "content": content,
        "tokens": [],
        "id_slot": 0,
        "stop": True,
        "model": service.name,
        "tokens_predicted": end.num_tokens,
        "tokens_evaluated": end.num_prompt,
        "tokens_cached": end.num_prompt + end.num_tokens,
        "generation_settings": {
            "seed": request.seed,
            "temperature": request.temperature,
            "top_k": request.top_k,
            "top_p": request.top_p,
            "n_predict": request.max_tokens,
            "stop": list(request.stops),
            "n_probs": request.num_top or 0,
        },
        "has_new_line": "\n" in text,
        "truncated": prepared.num_dropped > 0,
        "stop_type": kinds.get(end.finish, "none"),
        "stopping_word": end.stop or "",
        "timings": _timings(end),
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
    prepared = await asyncio.to_thread(_prepare, body, service)

    async def events(stream: Stream) -> AsyncIterator[str]:
        text, count = "", 0
        async for _, piece in stream:
            text += piece.text
            count += len(piece.tokens)
            message: dict[str, Any] = {
                "index": 0,
                "content": piece.text,
                "tokens": [token.id for token in piece.tokens],
                "stop": False,
                "id_slot": 0,
                "tokens_predicted": count,
                "tokens_evaluated": len(prepared.request.ids),
            }
            if piece.end is not None:
                message = _final(service, prepared, piece.text, text, piece.end)
            if body.n_probs:
                message["completion_probabilities"] = _probabilities(piece.tokens, service.tokenizer)
            yield to_json(_chosen(message, body.response_fields))

    if body.stream:
        stream = Stream(service, [prepared.request])
        return EventStream(stream, events(stream))
    results = await collect(service, http, [prepared.request])
    if results is None:
        return gone()
    (result,) = results
    assert result.end is not None
    message = _final(service, prepared, result.text, result.text, result.end)
    message["tokens"] = [token.id for token in result.tokens]
    if body.n_probs:
        message["completion_probabilities"] = _probabilities(result.tokens, service.tokenizer)
    return answer(_chosen(message, body.response_fields))


def make_router(service: Service) -> APIRouter:
    """The routes of llama.cpp's server."""
    router = APIRouter(tags=["llama.cpp"], responses=ERRORS)

    @router.post("/infill", response_model=None)
    async def infill(body: InfillRequest, http: HttpRequest) -> Response:
        """What stands between `input_prefix` and `input_suffix`."""
        return await _answer(body, http, service)

    @router.post("/completion", response_model=None)
    async def completion(body: LlamaCompletionRequest, http: HttpRequest) -> Response:
        """What follows `prompt`."""
        return await _answer(body, http, service)

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, list[int]]:
        """The token ids of a text."""
        return {"tokens": await asyncio.to_thread(service.tokenizer.encode, body.content)}

    @router.get("/props")
    async def props() -> dict[str, Any]:
        """What clients ask before the first request."""
        return {
            "default_generation_settings": {"n_ctx": service.engine.context},
            "total_slots": service.engine.num_slots,
            "model_alias": service.name,
            "model_path": service.name,
        }

    return router
