"""What both interfaces make of a body: a request to the engine whose prompt fits, or an error that says why not."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from smelter.decoding import Request
from smelter.serving.errors import ApiError
from smelter.serving.schema import MAX_SEED
from smelter.tokens import Tokenizer

DEFAULT_MAX_TOKENS = 64


@dataclass(frozen=True)
class Prepared:
    """A request to the engine, the text of its prompt, and how many tokens of that did not fit."""

    request: Request
    text: str
    num_tokens: int
    num_dropped: int = 0


def pick_seed(seed: int | None) -> int:
    """The seed, or where there is none (or -1) another one each time."""
    return secrets.randbelow(MAX_SEED) if seed in (None, -1) else int(seed or 0)


def check_model(asked: str | None, name: str) -> None:
    """404 for another model than `name`."""
    if asked not in (None, "", name):
        message = f"model {asked!r} is not here: this server has {name!r}"
        raise ApiError(404, message, param="model", code="model_not_found")


def check_max_tokens(max_tokens: int, context: int, name: str = "max_tokens") -> None:
    """400 for more tokens than the model's context holds beside a prompt."""
    if max_tokens >= context:
        raise ApiError(
            400,
            f"{name} = {max_tokens}: the model's context is {context} tokens, the prompt's included: "
            f"ask for at most {context - 1}",
            param=name,
            code="context_length_exceeded",
        )


def check_ids(ids: Sequence[int], tokenizer: Tokenizer, context: int, max_tokens: int) -> None:
    """400 for a prompt of token ids that are none, or too many."""
    if not ids:
        raise ApiError(400, "prompt: an empty list of token ids", param="prompt")
    if max(ids) >= tokenizer.vocab_size:
        raise ApiError(400, f"prompt: token id {max(ids)} is none of {tokenizer.vocab_size}", param="prompt")
    if len(ids) + max_tokens > context:
        raise ApiError(
            400,
            f"prompt: {len(ids)} tokens and max_tokens = {max_tokens} are more than the context of {context}",
            param="prompt",
            code="context_length_exceeded",
        )
