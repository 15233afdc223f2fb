"""What clients of llama.cpp's server ask about a server: its model, its slots, and what text is in tokens."""

import asyncio
from typing import Any

from fastapi import APIRouter

from smelter import __version__
from smelter.base import DataError
from smelter.decoding import Request
from smelter.serving.bridge import Service
from smelter.serving.errors import ApiError
from smelter.serving.llama_routes import settings
from smelter.serving.openai_routes import chat_ids
from smelter.serving.prompts import sampling
from smelter.serving.schema import (
    ERRORS,
    DetokenizeRequest,
    LlamaSampling,
    Piece,
    TemplateRequest,
    TokenizeRequest,
)
from smelter.tokens import TEMPLATE, Tokenizer


def _tokenize(body: TokenizeRequest, tokenizer: Tokenizer) -> list[Any]:
    encode = tokenizer.parse if body.parse_special else tokenizer.encode
    pieces: list[Piece] = [body.content] if isinstance(body.content, str) else body.content
    ids = [i for piece in pieces for i in (encode(piece) if isinstance(piece, str) else [piece])]
    return [{"id": i, "piece": _piece(i, tokenizer)} for i in ids] if body.with_pieces else ids


def _piece(index: int, tokenizer: Tokenizer) -> str | list[int]:
    """A token's text, or its bytes where they are no text on their own."""
    raw = tokenizer.decode_bytes([index])
    try:
        return raw.decode() or tokenizer.decode([index], skip_special_tokens=False)
    except UnicodeDecodeError:
        return list(raw)


def make_router(service: Service) -> APIRouter:
    """The routes at which nothing is written."""
    router = APIRouter(tags=["llama.cpp"], responses=ERRORS)
    tokenizer, engine = service.tokenizer, service.engine

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        """The token ids of a text."""
        try:
            return {"tokens": await asyncio.to_thread(_tokenize, body, tokenizer)}
        except DataError as error:
            raise ApiError(400, f"content: {error}", param="content") from None

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        """The text of token ids, special tokens by their names."""
        try:
            return {"content": tokenizer.decode(body.tokens, skip_special_tokens=False)}
        except DataError as error:
            raise ApiError(400, f"tokens: {error}", param="tokens") from None

    @router.post("/apply-template")
    async def apply_template(body: TemplateRequest) -> dict[str, str]:
        """A conversation as one text, up to where the assistant speaks."""
        return {"prompt": tokenizer.decode(chat_ids(body, tokenizer), skip_special_tokens=False)}

    @router.get("/props")
    async def props() -> dict[str, Any]:
        """What clients ask before the first request."""
        has_chat = tokenizer.im_start_id is not None
        defaults = LlamaSampling.model_validate({})
        request = Request([], max_tokens=-1, **sampling(defaults) | {"seed": defaults.seed})
        return {
            "default_generation_settings": {"params": settings(request), "n_ctx": engine.context},
            "total_slots": engine.num_slots,
            "model_alias": service.name,
            "model_path": service.name,
            "modalities": {"vision": False, "video": False, "audio": False},
            "endpoint_slots": True,
            "endpoint_props": False,
            "endpoint_metrics": True,
            "chat_template": TEMPLATE if has_chat else "",
            "bos_token": "",
            "eos_token": tokenizer.special.eos,
            "build_info": f"smelter {__version__}",
            "is_sleeping": False,
        }

    @router.get("/slots")
    async def slots(fail_on_no_slot: str = "") -> list[dict[str, Any]]:
        """Which slots are in work; with `fail_on_no_slot`, 503 where all are."""
        active = engine.num_active
        if fail_on_no_slot and active >= engine.num_slots:
            raise ApiError(503, "no slot is free", headers={"Retry-After": "1"})
        return [
            {"id": i, "n_ctx": engine.context, "speculative": False, "is_processing": i < active}
            for i in range(engine.num_slots)
        ]

    return router
