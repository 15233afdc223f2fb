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
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from smelter.base.errors import CheckpointError, ConfigError, UserError
from smelter.decoding.healing import Healing, take_back
from smelter.decoding.kv_cache import KVCache
from smelter.evaluation.gaps import fit_context
from smelter.model import Model
from smelter.run.checkpoint import Checkpoint, load_checkpoint
from smelter.run.packed import is_packed, load_packed
from smelter.tokens.tokenizer import Tokenizer

FimOrder = Literal["spm", "psm"]

MIN_TEMPERATURE = 1e-5
NUCLEUS_TOKENS = 256
"""The likeliest tokens that top_p looks at first; where they do not reach it, all are sorted, for 20 times as long."""


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


@dataclass(frozen=True)
class Completion:
    """A completed text; `num_dropped` tokens of the given context did not fit and were left out."""

    text: str
    finish: Literal["stop", "length"]
    num_prompt_tokens: int
    num_dropped: int


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the GPU if there is one. Raises ConfigError for a name that is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device {name!r}: unknown: use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name!r}: there are {torch.cuda.device_count()} CUDA devices here: use auto or cpu")
    return device


def default_dtype(device: torch.device) -> torch.dtype:
    """float32 on the CPU, where it is exact and no slower at small batches; bf16 or, before Ampere, fp16 on CUDA."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def load_model(
    path: Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, with_state: bool = False
) -> tuple[Model, Tokenizer, Checkpoint]:
    """A run folder's newest checkpoint, a checkpoint or a packed model, ready to use: trits made, in evaluation mode.

    `dtype` is the compute dtype, by default `default_dtype`. Raises CheckpointError or DataError.
    """
    checkpoint = load_packed(path) if is_packed(path) else load_checkpoint(path, with_state=with_state)
    where = torch.device(device)
    with torch.random.fork_rng(devices=[]):  # the initial weights are overwritten: leave the caller's numbers alone
        model = Model(checkpoint.config.model, dtype or default_dtype(where))
    try:
        model.load_state_dict(checkpoint.tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{checkpoint.path}: the weights are of another model: {reason}") from None
    model = model.to(where).eval()
    model.quantize_weights()
    model.freeze()
    tokenizer = Tokenizer.load(checkpoint.tokenizer_file)
    if tokenizer.vocab_size > checkpoint.config.model.vocab_size:
        raise CheckpointError(
            f"{checkpoint.tokenizer_file}: has {tokenizer.vocab_size} tokens, the model's embedding "
            f"{checkpoint.config.model.vocab_size}: copy the checkpoint again, with its own tokenizer"
        )
    return model, tokenizer, checkpoint


def sample(logits: Tensor, uniforms: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """One token id [B] per row of logits [B, V]; `uniforms` [B] in [0, 1) decide.

    temperature 0, or too little to divide by, takes the likeliest. Otherwise the top_k likeliest (0: all) are kept, of
    them the fewest whose share reaches top_p (nucleus sampling, arXiv 1904.09751), and the inverse of their cumulative
    distribution is read at the uniform number: the same number gives the same token in any batch.
    """
    if temperature < MIN_TEMPERATURE:
        return logits.argmax(dim=-1)
    probs = (logits / temperature).softmax(dim=-1)
    if not top_k and top_p >= 1:  # nothing is left out, so nothing need be sorted
        return _inverse(probs.cumsum(dim=-1, dtype=torch.double), uniforms)
    count = min(top_k or NUCLEUS_TOKENS, probs.shape[-1])
    kept, ids = probs.topk(count)
    chosen = _from_sorted(kept, ids, uniforms, top_p, whole=bool(top_k))
    if not top_k and count < probs.shape[-1]:
        flat = (kept.sum(dim=-1, dtype=torch.double) < top_p).nonzero().flatten()
        if len(flat):
            ordered = probs[flat].sort(dim=-1, descending=True)
            chosen[flat] = _from_sorted(*ordered, uniforms[flat], top_p, whole=False)
    return chosen


def _from_sorted(probs: Tensor, ids: Tensor, uniforms: Tensor, top_p: float, *, whole: bool) -> Tensor:
    """One of `ids` [B, K] by falling probabilities [B, K], whose sum counts as 1 if they are the `whole`."""
    probs = probs.double()
    if whole:
        probs = probs / probs.sum(dim=-1, keepdim=True)
    before = probs.cumsum(dim=-1) - probs  # share of all likelier tokens
    kept = probs.masked_fill(before >= top_p, 0.0)
    return ids.gather(-1, _inverse(kept.cumsum(dim=-1), uniforms)[:, None]).squeeze(-1)


def _inverse(cumulative: Tensor, uniforms: Tensor) -> Tensor:
    """Where each row [B, K] of sums, divided by the last, exceeds its uniform number [B]: [B]."""
    total = cumulative[:, -1:].contiguous()
    index = torch.searchsorted(cumulative, uniforms.to(cumulative)[:, None] * total, right=True)
    return index.minimum(torch.searchsorted(cumulative, total)).squeeze(-1)


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


def uniforms_of(seed: int, count: int) -> Tensor:
    """The `count` random numbers of a row, float64 in [0, 1); nothing but the seed decides them."""
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def fim_prompt(
    tokenizer: Tokenizer, prefix: str, suffix: str, *, order: FimOrder = "spm", budget: int | None = None
) -> list[int]:
    """Token ids that ask for what stands between prefix and suffix, in either order that training shows.

    spm: [fim_prefix][fim_suffix] suffix [fim_middle] prefix, and the model goes on with the prefix (to be healed).
    psm: [fim_prefix] prefix [fim_suffix] suffix [fim_middle], and the model goes on with the middle.
    Either ends with eos. With `budget` (tokens, at least 3) only the context nearest to the gap is kept.
    """
    if budget is None:
        return tokenizer.fim_prompt(prefix, suffix, use_spm=order == "spm")
    before, after = fit_context(tokenizer.encode(prefix), tokenizer.encode(suffix), budget - 3)
    if order == "spm":
        return [tokenizer.fim_prefix_id, tokenizer.fim_suffix_id, *after, tokenizer.fim_middle_id, *before]
    return [tokenizer.fim_prefix_id, *before, tokenizer.fim_suffix_id, *after, tokenizer.fim_middle_id]


def _prompt_budget(context: int, max_tokens: int) -> int:
    """Tokens of the context that a prompt may fill: all but the answer's, and never less than half."""
    return max(context - max_tokens, context // 2)


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt's tokens, and the bytes that the first new ones spell again; `num_dropped` tokens did not fit."""

    ids: list[int]
    pending: bytes
    num_tokens: int
    num_dropped: int


def make_prompt(
    tokenizer: Tokenizer, context: int, prompt: str, suffix: str | None, *, max_tokens: int, order: FimOrder = "spm"
) -> EncodedPrompt:
    """How to ask for what follows `prompt`, or where a suffix (even "") is given, for what stands between the two.

    A context longer than the model's `context` is cut to what is nearest to the place of writing. The cursor may stand
    inside a word (see `healing`).
    """
    budget = _prompt_budget(context, max_tokens)
    if suffix is None:
        whole = tokenizer.encode(prompt)
        used = whole[-budget:]
    else:
        whole = fim_prompt(tokenizer, prompt, suffix, order=order)
        used = fim_prompt(tokenizer, prompt, suffix, order=order, budget=budget) if len(whole) > budget else whole
    ids, pending = take_back(tokenizer, used)
    # Nothing: as at the beginning of a document.
    return EncodedPrompt(ids or [tokenizer.eos_id], pending, len(used), len(whole) - len(used))


def complete_text(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str,
    suffix: str | None = None,
    *,
    max_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    order: FimOrder = "spm",
) -> Completion:
    """Continue `prompt`, or fill in between `prompt` and `suffix`: see `make_prompt`."""
    asked = make_prompt(tokenizer, model.config.max_seq_len, prompt, suffix, max_tokens=max_tokens, order=order)
    sampling: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    (result,) = generate(
        model,
        [asked.ids],
        max_tokens=max_tokens,
        stop_ids=[tokenizer.eos_id],
        healing=Healing(tokenizer, [asked.pending]),
        with_logprobs=False,
        **sampling,
    )
    text = tokenizer.decode_bytes(result.ids)[len(asked.pending) :].decode("utf-8", "replace")
    return Completion(text, result.finish, asked.num_tokens, asked.num_dropped)
