"""Writing code with a trained model: KV cache, sampling, batches of unequal prompts, infilling prompts.

Prompts are padded on the right and each row of the cache is filled without holes, so one rule makes the
mask of prefill and decoding alike: a query at position p sees the cached keys 0..p of its own row. What
a row writes does not depend on the rows beside it; rows that are done are dropped from the batch. The
random numbers of a row come from (seed, row) alone. Keys stay where they were written: a context that is
full ends the text rather than being shifted.
"""

import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from smelter.base import UserError
from smelter.decoding.healing import Healing
from smelter.decoding.kv_cache import KVCache
from smelter.decoding.sampling import MIN_TEMPERATURE, sample, uniforms_of
from smelter.model import Model


@dataclass(frozen=True)
class Generation:
    """What one row wrote: token ids without the stop token, and their log-probabilities where they were asked for.

    `finish` is "stop" where one of the stop ids (`stop_id`) ended it, "length" where max_tokens or the end of
    the context did.
    """

    ids: list[int]
    logprobs: list[float]
    finish: Literal["stop", "length"]
    stop_id: int | None = None


def _check_options(prompts: Sequence[Sequence[int]], context: int, sampling: dict[str, float]) -> None:
    limits: dict[str, tuple[bool, str]] = {
        "max_tokens": (sampling["max_tokens"] >= 1, "must be at least 1"),
        "temperature": (0 <= sampling["temperature"] < float("inf"), "must be 0 (greedy) or positive"),
        "top_k": (sampling["top_k"] >= 0, "must be positive, or 0 for all tokens"),
        "top_p": (0 < sampling["top_p"] <= 1, "must lie above 0 and not above 1"),
    }
    for name, (fine, message) in limits.items():
        if not fine:
            raise UserError(f"{name} = {sampling[name]}: {message}")
    for row, prompt in enumerate(prompts):
        if not 1 <= len(prompt) < context:
            raise UserError(
                f"prompt {row} has {len(prompt)} tokens: the model's context of {context} takes 1 to {context - 1}"
            )


def _eager() -> contextlib.AbstractContextManager[Any]:
    """Run compiled blocks uncompiled: each new length of the cache would compile them again."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()


@torch.inference_mode()
def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Sequence[int] = (),
    healing: Healing | None = None,
    until: Callable[[int, int], bool] | None = None,
    with_logprobs: bool = True,
) -> list[Generation]:
    """Continue every prompt (token ids, of any lengths) in one batch; results in the prompts' order.

    `healing` holds what the rows must spell first; it is used up. `until(row, token)` is asked after each token;
    true ends the row, with finish "stop". Each row ends at the first of: a stop id, `until`, `max_tokens` new
    tokens, the end of the model's context. Without log-probabilities greedy decoding need not compute all logits.
    Raises UserError for an empty prompt, one that leaves no room, or options out of range.
    """
    options = {"max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    context = model.config.max_seq_len
    _check_options(prompts, context, options)
    if not prompts:
        return []
    device, stops = model.embed_tokens.weight.device, frozenset(stop_ids)
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths)
    limits = [min(max_tokens, context - length) for length in lengths]
    cache_len = max(length + limit for length, limit in zip(lengths, limits, strict=True))
    cache = KVCache(model.config, len(prompts), cache_len, model.compute_dtype, device)
    uniforms = torch.stack([uniforms_of(seed + row, max_tokens) for row in range(len(prompts))]).to(device)
    tokens = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=device)
    positions = torch.arange(longest, device=device).expand(len(prompts), -1)
    new: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    stopped: list[int | None] = [None] * len(prompts)
    rows = list(range(len(prompts)))  # of the prompts, in the order of the batch
    done: set[int] = set()
    ended: set[int] = set()  # by `until`
    with _eager():
        hidden = model(tokens, positions=positions, cache=cache, mask=cache.advance(positions, longest))
        hidden = hidden[torch.arange(len(prompts)), torch.tensor(lengths) - 1]  # [B, C]
        for step in range(max(limits)):
            is_spelling = healing is not None and any(healing.is_pending(row) for row in rows)
            if temperature < MIN_TEMPERATURE and not with_logprobs and not is_spelling:
                chosen = model.likeliest(hidden, model.config.vocab_size)  # [B]
            else:
                logits = model.logits(hidden)
                possible = logits if healing is None else healing.restrict(logits, rows)
                chosen = sample(possible, uniforms[:, step], temperature, top_k, top_p)
            told: Sequence[float | None] = [None] * len(rows)
            if with_logprobs:
                told = logits.log_softmax(dim=-1).gather(-1, chosen[:, None]).squeeze(-1).tolist()
            for row, token, logprob in zip(rows, chosen.tolist(), told, strict=True):
                if row in done:
                    continue
                if healing is not None and healing.is_pending(row):
                    healing.advance(row, token)
                elif token in stops:
                    stopped[row] = token
                    done.add(row)
                    continue
                new[row].append(token)
                if logprob is not None:
                    logprobs[row].append(logprob)
                if until is not None and until(row, token):
                    ended.add(row)
                    done.add(row)
                if len(new[row]) == limits[row]:
                    done.add(row)
            if len(done) == len(prompts):
                break
            active = [index for index, row in enumerate(rows) if row not in done]
            if 2 * len(active) <= len(rows):
                rows = [rows[index] for index in active]
                keep = torch.tensor(active, device=device)
                cache.select(keep)
                uniforms, chosen = uniforms[keep], chosen[keep]
            # A row that is done goes on writing to its last slot until it is dropped.
            where = [min(lengths[row] + step, cache_len - 1) for row in rows]
            positions = torch.tensor(where, device=device)[:, None]
            mask = cache.advance(positions, max(where) + 1)
            hidden = model(chosen[:, None], positions=positions, cache=cache, mask=mask)[:, 0]
    finishes: list[Literal["stop", "length"]] = [
        "length" if stopped[row] is None and row not in ended else "stop" for row in range(len(prompts))
    ]
    return [Generation(*each) for each in zip(new, logprobs, finishes, stopped, strict=True)]
