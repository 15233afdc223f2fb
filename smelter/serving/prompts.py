"""What both interfaces make of a body: a request to the engine whose prompt fits, or an error that says why not."""

import secrets
from dataclasses import dataclass, replace
from typing import Any

from smelter.decoding import Request, read_prompt
from smelter.serving.errors import ApiError
from smelter.serving.schema import MAX_CHOICES, MAX_SEED, Piece, Prompt, Sampling
from smelter.tokens import Tokenizer

DEFAULT_MAX_TOKENS = 64
SAMPLERS = {
    "top_k": ("top_k", "topk", "k"),
    "top_p": ("top_p", "topp", "nucleus", "p"),
    "min_p": ("min_p", "minp", "m"),
    "temperature": ("temperature", "temp", "t"),
    "infill": ("infill", "i"),
}
"""llama.cpp's names of the samplers that we have; those of others may be listed, since their parameters are neutral."""
OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 1.0}
"""What a sampler is that `samplers` does not list."""


@dataclass(frozen=True)
class Prepared:
    """A request to the engine, the text of its prompt, and how many tokens of that did not fit."""

    request: Request
    text: str
    num_tokens: int
    num_dropped: int = 0


def pick_seed(seed: int | None) -> int:
    """The seed, or where there is none (or -1) another one each time."""
    return secrets.randbelow(MAX_SEED) if seed in (None, -1) else int(seed or 0) % MAX_SEED


def sampling(body: Sampling) -> dict[str, Any]:
    """The fields of a `Request` that say how to sample.

    `samplers` switches off what it does not list, but temperature 0 remains: who sends that wants the likeliest.
    """
    values: dict[str, Any] = {name: getattr(body, name) for name in OFF}
    if body.samplers is not None:
        asked = {str(name).lower().replace("-", "_") for name in body.samplers}
        listed = {name for name, others in SAMPLERS.items() if asked.intersection(others)}
        values |= {name: OFF[name] for name in OFF if name not in listed and (name, values[name]) != ("temperature", 0)}
        values["infill_sampler"] = "infill" in listed
    return values | {"seed": pick_seed(body.seed), "stops": body.stops(), "n_indent": body.n_indent}


def room_for(limit: int, context: int) -> int:
    """Tokens that a prompt leaves for the answer, when it is cut: what was asked for, or a quarter for all that fit."""
    return limit if 0 <= limit < context else context // 4


def num_to_write(limit: int, num_read: int, context: int) -> int:
    """`max_tokens` of a request: the limit, or what the context has room for (-1, or more than that)."""
    room = context - num_read
    return room if limit < 0 else min(limit, room)


def prompts_of(prompt: Prompt) -> list[str | list[Piece]]:
    """The prompts as a list, whichever form they came in: what holds an id is one prompt."""
    if isinstance(prompt, str):
        return [prompt]
    pieces = [item for item in prompt if not isinstance(item, list)]
    if any(isinstance(item, int) for item in pieces):
        if len(pieces) < len(prompt):
            raise ApiError(400, "prompt: a list of prompts holds no token ids of its own", param="prompt")
        return [pieces]
    return [item for item in prompt if not isinstance(item, int)]


def check_num_answers(num_prompts: int, num_choices: int) -> None:
    """400 for no prompt, and for more answers to one request than there may be."""
    if not 1 <= num_prompts * num_choices <= MAX_CHOICES:
        message = f"prompt: 1 to {MAX_CHOICES} prompts times n, and not {num_prompts * num_choices}"
        raise ApiError(400, message, param="prompt")


def exact_ids(prompt: str | list[Piece], tokenizer: Tokenizer, context: int, limit: int) -> list[int]:
    """The ids of a prompt as it stands, neither cut nor healed; 400 for ids that are none, or too many."""
    pieces = [prompt] if isinstance(prompt, str) else prompt
    if not pieces:
        raise ApiError(400, "prompt: an empty list of token ids", param="prompt")
    unknown = [item for item in pieces if isinstance(item, int) and item >= tokenizer.vocab_size]
    if unknown:
        raise ApiError(400, f"prompt: token id {unknown[0]} is none of {tokenizer.vocab_size}", param="prompt")
    ids = [i for item in pieces for i in (tokenizer.parse(item) if isinstance(item, str) else [item])]
    ids = ids or [tokenizer.eos_id]
    check_fits(len(ids), limit, context, "prompt")
    return ids


def check_fits(num_tokens: int, limit: int, context: int, name: str) -> None:
    """400 for a prompt after which the context has no room for a token, where any is asked for."""
    if num_tokens + (limit != 0) > context:
        message = f"{name}: {num_tokens} tokens are too many for the context of {context}, with at least one to write"
        raise ApiError(400, message, param=name, code="context_length_exceeded")


def prepare_prompt(
    prompt: str | list[Piece], tokenizer: Tokenizer, context: int, limit: int, *, scored: bool = False
) -> Prepared:
    """A prompt to continue: a text is cut to the context and healed, of ids neither is done.

    With `scored` the log-probabilities of all its tokens are told, too; what is written stays the same.
    """
    exact = exact_ids(prompt, tokenizer, context, limit) if scored or not isinstance(prompt, str) else []
    scored_ids = exact if scored else []
    if isinstance(prompt, str):
        encoded = read_prompt(tokenizer, context, prompt, max_tokens=room_for(limit, context))
        request = Request(encoded.ids, encoded.pending, line_end=encoded.line_end, scored_ids=scored_ids)
        return Prepared(request, prompt, encoded.num_tokens, encoded.num_dropped)
    return Prepared(Request(exact, scored_ids=scored_ids), tokenizer.decode(exact), len(exact))


def complete_request(prepared: Prepared, body: Sampling, limit: int, context: int, **others: Any) -> Prepared:
    """The prompt with all else that was asked for; `others` are fields of `Request`."""
    options = sampling(body) | {"max_tokens": num_to_write(limit, len(prepared.request.ids), context)}
    options["max_seconds"] = max(body.t_max_predict_ms, 0) / 1_000 or None
    return replace(prepared, request=replace(prepared.request, **options | others))
