"""One token out of logits: greedy, or by the random numbers that a seed alone decides."""

import math

import torch
from torch import Tensor

MIN_TEMPERATURE = 1e-5
"""Below it the likeliest token is taken: nothing can be divided by it."""

NUCLEUS_TOKENS = 256
"""The likeliest tokens that top_p looks at first; where they do not reach it, all are sorted, for 20 times as long."""


def sample(
    logits: Tensor, uniforms: Tensor, temperature: float, top_k: int, top_p: float, min_p: float = 0.0
) -> Tensor:
    """One token id [B] per row of logits [B, V]; `uniforms` [B] in [0, 1) decide.

    temperature 0, or too little to divide by, takes the likeliest. Otherwise the top_k likeliest (0: all) are kept, of
    them the fewest whose share reaches top_p (nucleus sampling, arXiv 1904.09751), of those the ones that have min_p
    times the likeliest's probability, and the inverse of their cumulative distribution is read at the uniform number:
    the same number gives the same token in any batch.

    top_k and top_p see the tempered probabilities, as in Transformers. min_p means those before temperature, which
    llama.cpp applies last: what is unlikely does not come in because it is hot.
    """
    if temperature < MIN_TEMPERATURE:
        return logits.argmax(dim=-1)
    probs = (logits / temperature).softmax(dim=-1)
    least = min_p ** (1 / temperature)  # of the tempered likeliest's
    if not top_k and top_p >= 1:  # nothing is left out, so nothing need be sorted
        if min_p:
            probs = probs.masked_fill(probs < least * probs.amax(dim=-1, keepdim=True), 0.0)
        return _inverse(probs.cumsum(dim=-1, dtype=torch.double), uniforms)
    count = min(top_k or NUCLEUS_TOKENS, probs.shape[-1])
    kept, ids = probs.topk(count)
    chosen = _from_sorted(kept, ids, uniforms, top_p, least, whole=bool(top_k))
    if not top_k and count < probs.shape[-1]:
        flat = (kept.sum(dim=-1, dtype=torch.double) < top_p).nonzero().flatten()
        if len(flat):
            ordered = probs[flat].sort(dim=-1, descending=True)
            chosen[flat] = _from_sorted(*ordered, uniforms[flat], top_p, least, whole=False)
    return chosen


def candidates(logits: Tensor, top_k: int, top_p: float, min_p: float) -> tuple[list[int], list[float]]:
    """The tokens that top_k, top_p and min_p leave of logits [V], in this order and before any temperature.

    By falling probability; those sum to 1.
    """
    most = logits.shape[-1]
    highest, ids = logits.topk(min(top_k or most, most))
    probs = _left(highest.double().softmax(dim=-1), top_p if top_p < 1 else math.inf, min_p)
    probs = probs[: max(1, int((probs > 0).sum()))]  # of logits that are no numbers one is left, too
    return ids[: len(probs)].tolist(), (probs / probs.sum()).tolist()


def _left(probs: Tensor, top_p: float, least: float) -> Tensor:
    """Falling probabilities [..., K] with 0 for what top_p leaves out, or has not `least` times the first."""
    before = probs.cumsum(dim=-1) - probs  # share of all likelier tokens
    return probs.masked_fill((before >= top_p) | (probs < least * probs[..., :1]), 0.0)


def _from_sorted(probs: Tensor, ids: Tensor, uniforms: Tensor, top_p: float, least: float, *, whole: bool) -> Tensor:
    """One of `ids` [B, K] by falling probabilities [B, K], whose sum counts as 1 if they are the `whole`."""
    probs = probs.double()
    if whole:
        probs = probs / probs.sum(dim=-1, keepdim=True)
    kept = _left(probs, top_p, least)
    return ids.gather(-1, _inverse(kept.cumsum(dim=-1), uniforms)[:, None]).squeeze(-1)


def _inverse(cumulative: Tensor, uniforms: Tensor) -> Tensor:
    """Where each row [B, K] of sums, divided by the last, exceeds its uniform number [B]: [B].

    That is in range also where the sums are no numbers: one broken row must not end its neighbours'.
    """
    total = cumulative[:, -1:].contiguous()
    index = torch.searchsorted(cumulative, uniforms.to(cumulative)[:, None] * total, right=True)
    return index.minimum(torch.searchsorted(cumulative, total)).clamp_max(cumulative.shape[-1] - 1).squeeze(-1)


def uniforms_of(seed: int, count: int) -> Tensor:
    """The `count` random numbers of a row, float64 in [0, 1); nothing but the seed decides them."""
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
