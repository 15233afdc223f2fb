"""Many prompts written to their ends, on the caller's thread: for one answer, for thousands, in batches."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from smelter.base import UserError
from smelter.decoding.batch import Batch, Row
from smelter.decoding.prompts import FimOrder, make_prompt
from smelter.decoding.request import Request
from smelter.decoding.text import Stop
from smelter.model import Model
from smelter.tokens import Tokenizer

SCORES_AT_ONCE = 2**23
"""Numbers in a prefill's [B, T, T]: with the heads, a few hundred megabytes."""
MAX_BATCH_SIZE = 64


def _check(requests: Sequence[Request], context: int) -> None:
    for number, request in enumerate(requests):
        limits: dict[str, tuple[bool, str]] = {
            "max_tokens": (request.max_tokens >= 1, "must be at least 1"),
            "temperature": (0 <= request.temperature < float("inf"), "must be 0 (greedy) or positive"),
            "top_k": (request.top_k >= 0, "must be positive, or 0 for all tokens"),
            "top_p": (0 < request.top_p <= 1, "must lie above 0 and not above 1"),
            "min_p": (0 <= request.min_p <= 1, "must lie between 0 and 1"),
            "n_indent": (request.n_indent >= 0, "must not be negative"),
        }
        for name, (is_fine, message) in limits.items():
            if not is_fine:
                raise UserError(f"{name} = {getattr(request, name)}: {message}")
        length, most = len(request.ids), context - 1
        if not 1 <= length <= most:
            raise UserError(f"prompt {number} has {length} tokens: the model's context of {context} takes 1 to {most}")


def _eager() -> contextlib.AbstractContextManager[Any]:
    """Run compiled blocks uncompiled: each new length of the cache would compile them again."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()


@torch.inference_mode()
def generate(model: Model, tokenizer: Tokenizer, requests: Sequence[Request]) -> list[Row]:
    """Continue every prompt, of any lengths, in one batch; the rows that have ended, in the requests' order.

    Raises UserError for an empty prompt, one that leaves no room, or options out of range.
    """
    context = model.config.max_seq_len
    _check(requests, context)
    if not requests:
        return []
    rows = [Row(request, context) for request in requests]
    assert not any(row.reads_twice for row in rows), "the engine does that"
    max_len = max(len(row.request.ids) + row.limit for row in rows)
    batch = Batch[Row](model, tokenizer, len(rows), max_len)
    for slot, row in enumerate(rows):
        batch.add(row, slot)
    with _eager():
        batch.read(max_len)
        while True:
            for row in batch.writing[::-1]:  # the last first: nothing is moved that ends as well
                if row.finish:
                    batch.remove(row)
            if not batch.writing:
                return rows
            batch.step()


@dataclass(frozen=True)
class Prompt:
    """Text to continue or, with a suffix (even ""), a gap to fill in; the first of `stops` ends it and is cut off."""

    prefix: str
    suffix: str | None = None
    stops: Sequence[Stop] = ()


def complete_many(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    order: FimOrder = "spm",
    progress: Callable[[int], None] | None = None,
    on_text: Callable[[int, str], None] | None = None,
) -> list[str]:
    """What the model writes for every prompt, in their order; texts are the same for every batch size.

    Context that does not fit beside `max_tokens` (or half the model's context, if that is more) is left out, the
    farthest first. Row i samples with seed `seed + i`. `on_text(i, text)` is called as soon as a batch is done,
    `progress` with the number that is.
    """
    requests: list[Request] = []
    for index, prompt in enumerate(prompts):
        encoded = make_prompt(
            tokenizer, model.config.max_seq_len, prompt.prefix, prompt.suffix, max_tokens=max_tokens, order=order
        )
        request = Request(
            encoded.ids,
            encoded.pending,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed + index,
            stops=prompt.stops,
            stop_ids=[tokenizer.eos_id],
            line_end=encoded.line_end,
        )
        requests.append(request)
    texts: list[str] = []
    for row in generate_in_batches(model, tokenizer, requests, progress):
        texts.append(row.text.close())
        if on_text is not None:
            on_text(len(texts) - 1, texts[-1])
    return texts


def generate_in_batches(
    model: Model, tokenizer: Tokenizer, requests: Sequence[Request], progress: Callable[[int], None] | None = None
) -> Iterator[Row]:
    """`generate` for any number of requests; `progress` is called with the number that is done after each batch."""
    longest = max((len(request.ids) for request in requests), default=1)
    batch_size = max(1, min(MAX_BATCH_SIZE, SCORES_AT_ONCE // longest**2))
    for start in range(0, len(requests), batch_size):
        yield from generate(model, tokenizer, requests[start : start + batch_size])
        if progress is not None:
            progress(min(start + batch_size, len(requests)))
