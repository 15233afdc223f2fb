"""OpenAI's interface: /v1/models, /v1/completions (with `suffix` for infilling) and /v1/chat/completions."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

from smelter.base import DataError
from smelter.decoding import End, Request, Token, make_prompt
from smelter.serving.bridge import EventStream, Service, Stream, answer, collect, gone, to_json, token_text
from smelter.serving.errors import ApiError
from smelter.serving.prompts import (
    DEFAULT_MAX_TOKENS,
    Prepared,
    check_fits,
    check_num_answers,
    complete_request,
    prepare_prompt,
    prompts_of,
    room_for,
)
from smelter.serving.schema import (
    ERRORS,
    ChatRequest,
    ChatResponse,
    CompletionRequest,
    CompletionResponse,
    TemplateRequest,
)
from smelter.tokens import ChatFormat, Tokenizer, stop_ids


def _prepare(body: CompletionRequest, service: Service) -> list[Prepared]:
    """One for each prompt, with the seed of its first answer."""
    tokenizer, context = service.tokenizer, service.engine.context
    limit = DEFAULT_MAX_TOKENS if body.limit is None else body.limit
    prompts = prompts_of(body.prompt)
    num_top = None if body.logprobs is None or body.logprobs is False else int(body.logprobs)
    check_num_answers(len(prompts), body.num_choices)
    if body.best_of not in (None, body.num_choices):
        raise ApiError(400, "best_of: is not supported: ask for n answers and choose", param="best_of")
    if body.echo and body.suffix is not None:
        raise ApiError(400, "echo: makes no sense together with suffix", param="echo")
    others = {"stop_ids": [tokenizer.eos_id], "num_top": num_top}
    prepared = []
    for prompt in prompts:
        if body.suffix is None:
            item = prepare_prompt(prompt, tokenizer, context, limit, scored=body.echo and num_top is not None)
        elif isinstance(prompt, str):
            encoded = make_prompt(tokenizer, context, prompt, body.suffix, max_tokens=room_for(limit, context))
            item = Prepared(
                Request(encoded.ids, encoded.pending, line_end=encoded.line_end),
                prompt,
                encoded.num_tokens,
                encoded.num_dropped,
            )
        else:
            raise ApiError(400, "suffix: needs a prompt that is text", param="suffix")
        prepared.append(complete_request(item, body, limit, context, **others))
    return prepared


def usage(prepared: Sequence[Prepared], ends: Sequence[End]) -> dict[str, Any]:
    """OpenAI's usage; `dropped_tokens` of the context did not fit."""
    prompt, written = sum(item.num_tokens for item in prepared), sum(end.num_tokens for end in ends)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {
            "cached_tokens": sum(end.num_cached for end in ends),
            "dropped_tokens": sum(item.num_dropped for item in prepared),
        },
    }


def finish_reason(end: End) -> str:
    """OpenAI knows two."""
    return "stop" if end.finish == "stop" else "length"


def _logprobs(tokens: Sequence[Token], tokenizer: Tokenizer, offset: int) -> dict[str, Any]:
    """The older form, of /v1/completions; `offset` characters stand before the first of the tokens."""
    offsets, raw = [], b""
    for token in tokens:
        offsets.append(offset + len(raw.decode("utf-8", "ignore")))
        raw += token.raw
    return {
        "tokens": [_name(token.raw) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [None if token.logprob is None else _likeliest(token, tokenizer) for token in tokens],
        "text_offset": offsets,
    }


def _name(raw: bytes) -> str:
    """What a token is called in the older form, as by OpenAI: its text, or a part of a character as its bytes."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return _bytes_name(raw)


def _bytes_name(raw: bytes) -> str:
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _likeliest(token: Token, tokenizer: Tokenizer) -> dict[str, float]:
    """The likeliest tokens by their names: one for each, where two spell the same the less likely one's bytes."""
    told: dict[str, float] = {}
    for index, value in token.top:
        raw = tokenizer.decode_bytes([index])
        name = _name(raw) if raw else tokenizer.decode([index], skip_special_tokens=False)
        told[_bytes_name(raw) if name in told else name] = value
    return told


def _chat_logprobs(tokens: Sequence[Token], tokenizer: Tokenizer) -> dict[str, Any]:
    def one(text: str, raw: bytes, logprob: float | None) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(raw)}

    return {
        "content": [
            {
                **one(token_text(token), token.raw, token.logprob),
                "top_logprobs": [
                    one(tokenizer.decode([i], skip_special_tokens=False), tokenizer.decode_bytes([i]), value)
                    for i, value in token.top
                ],
            }
            for token in tokens
        ],
        "refusal": None,
    }


Choice = Callable[[int, str, Sequence[Token], str | None], dict[str, Any]]
"""(index, text, tokens, finish_reason) -> a choice of a chunk, or of the whole."""


async def _answer(
    body: CompletionRequest | ChatRequest,
    http: HttpRequest,
    service: Service,
    prepared: Sequence[Prepared],
    head: dict[str, Any],
    choice: Choice,
    openings: Sequence[dict[str, Any]],
) -> Response:
    """The answer of both interfaces: chunks, of which the first have `openings` as their choices, or all in one."""
    # Answers to the same prompt differ in their seeds as the rows of `generate` do.
    requests = [replace(item.request, seed=item.request.seed + i) for item in prepared for i in range(body.num_choices)]

    async def events(stream: Stream) -> AsyncIterator[str]:
        ends = []
        for opening in openings:
            yield to_json({**head, "choices": [opening]})
        async for index, piece in stream:
            reason = None if piece.end is None else finish_reason(piece.end)
            tokens: Sequence[Token] = [*piece.prompt, *piece.tokens]
            if piece.text or tokens or reason:
                yield to_json({**head, "choices": [choice(index, piece.text, tokens, reason)]})
            if piece.end is not None:
                ends.append(piece.end)
        if body.stream_options.include_usage:
            yield to_json({**head, "choices": [], "usage": usage(prepared, ends)})
        yield "[DONE]"

    if body.stream:
        stream = Stream(service, requests)
        return EventStream(stream, events(stream))
    results = await collect(service, http, requests)
    if results is None:
        return gone()
    ends = [result.end for result in results if result.end is not None]
    choices = [
        choice(index, result.text, [*result.prompt, *result.tokens], finish_reason(end))
        for index, (result, end) in enumerate(zip(results, ends, strict=True))
    ]
    return answer(head | {"choices": choices, "usage": usage(prepared, ends)})


def _head(service: Service, kind: str, prefix: str) -> dict[str, Any]:
    return {"id": prefix + secrets.token_hex(12), "object": kind, "created": int(time.time()), "model": service.name}


def chat_ids(body: TemplateRequest, tokenizer: Tokenizer) -> list[int]:
    """The conversation as token ids, up to where the assistant speaks, or goes on with its last message."""
    try:
        layout = ChatFormat(tokenizer)
    except DataError as error:
        message = f"messages: {error}; /v1/completions and /infill need none"
        raise ApiError(400, message, param="messages", code="chat_not_supported") from None
    roles = {"developer": "system", "function": "tool"}
    return layout.prompt(
        [{"role": roles.get(message.role, message.role), "content": message.text()} for message in body.messages]
    )


def _check_tools(body: ChatRequest) -> None:
    """400 where a tool may or must be called; one that is forbidden to be changes nothing."""
    wanted = body.tool_choice not in (None, "none", "auto")
    if wanted or (body.tools and body.tool_choice != "none"):
        name = "tools" if body.tools else "tool_choice"
        message = f"{name}: is not supported by this server, whose model calls no tools: leave it out"
        raise ApiError(400, message, param=name, code="tools_not_supported")


def _prepare_chat(body: ChatRequest, service: Service) -> Prepared:
    tokenizer, context = service.tokenizer, service.engine.context
    _check_tools(body)
    ids = chat_ids(body, tokenizer)
    limit = -1 if body.limit is None else body.limit
    check_fits(len(ids), limit, context, "messages")
    others = {"stop_ids": stop_ids(tokenizer), "num_top": body.top_logprobs if body.logprobs else None}
    return complete_request(Prepared(Request(ids), "", len(ids)), body, limit, context, **others)


def make_router(service: Service) -> APIRouter:
    """OpenAI's routes; those that llama.cpp's server has without /v1 too are here without it too."""
    router = APIRouter(tags=["OpenAI"], responses=ERRORS)
    card = {"id": service.name, "object": "model", "created": service.created, "owned_by": "smelter"}

    @router.get("/models")
    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model that is here."""
        context, vocab_size = service.engine.context, service.tokenizer.vocab_size
        meta = {"n_vocab": vocab_size, "n_ctx": context, "n_ctx_train": context, "n_params": service.num_params}
        return {"object": "list", "data": [card | {"meta": meta}]}

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """A model by its name."""
        if name != service.name:
            message = f"model {name!r} is not here: this server has {service.name!r}, and answers by any name"
            raise ApiError(404, message, param="model", code="model_not_found")
        return card

    @router.post("/v1/completions", response_model=None, responses={200: {"model": CompletionResponse}})
    async def completions(body: CompletionRequest, http: HttpRequest) -> Response:
        """Continue `prompt`, or fill in between `prompt` and `suffix`."""
        prepared = await asyncio.to_thread(_prepare, body, service)
        echoes = [item.text if body.echo else "" for item in prepared for _ in range(body.num_choices)]
        wants_logprobs = body.logprobs is not None and body.logprobs is not False
        num_shown = [len(echo) for echo in echoes]  # characters of each answer so far

        def choice(index: int, text: str, tokens: Sequence[Token], reason: str | None) -> dict[str, Any]:
            has_prompt = bool(tokens) and tokens[0].logprob is None
            offset = 0 if has_prompt else num_shown[index]
            num_shown[index] += len(text)
            logprobs = _logprobs(tokens, service.tokenizer, offset) if wants_logprobs else None
            shown = text if body.stream else echoes[index] + text  # a stream opens with the echo
            return {"index": index, "text": shown, "logprobs": logprobs, "finish_reason": reason}

        openings = [
            {"index": i, "text": echo, "logprobs": None, "finish_reason": None} for i, echo in enumerate(echoes) if echo
        ]
        head = _head(service, "text_completion", "cmpl-")
        return await _answer(body, http, service, prepared, head, choice, openings)

    @router.post("/chat/completions", response_model=None, responses={200: {"model": ChatResponse}})
    @router.post("/v1/chat/completions", response_model=None, responses={200: {"model": ChatResponse}})
    async def chat(body: ChatRequest, http: HttpRequest) -> Response:
        """The assistant's next turn (ChatML)."""
        prepared = [await asyncio.to_thread(_prepare_chat, body, service)]
        key, kind = ("delta", "chat.completion.chunk") if body.stream else ("message", "chat.completion")

        def choice(index: int, text: str, tokens: Sequence[Token], reason: str | None) -> dict[str, Any]:
            logprobs = _chat_logprobs(tokens, service.tokenizer) if body.logprobs else None
            content = {"role": "assistant", "content": text} if key == "message" else {"content": text} if text else {}
            return {"index": index, key: content, "logprobs": logprobs, "finish_reason": reason}

        turn = {"role": "assistant", "content": ""}
        openings = [{"index": i, key: turn, "logprobs": None, "finish_reason": None} for i in range(body.num_choices)]
        return await _answer(body, http, service, prepared, _head(service, kind, "chatcmpl-"), choice, openings)

    return router
