"""Cross-entropy with hard and soft targets, whose gradient takes the place of the logits.

The gradient of a cross-entropy to the logits is softmax minus target. Where the target has few entries (the next token;
a sparse teacher's probabilities of forward KL at temperature 1) two passes over the logits suffice, one for the sum
of exponentials and one in place, and nothing else of their size exists; the entries are then put in.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smelter.kernels import COMPILER_OPTIONS, capped, capped_exp, is_bounded
from smelter.losses.targets import SparseTarget, mass_of_same_id, places

MAX_RATIO = 1e30
"""Bound of teacher's tail / student's tail, so that it stays finite where the latter underflows."""


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same, fused by torch.compile; made at its first use, since the compiler takes a second to import."""
    return torch.compile(function, dynamic=False, options=COMPILER_OPTIONS)


def _log_sum_exp(logits: Tensor, soft_cap: float, skips: bool) -> Tensor:
    """lse [n, 1] of the capped logits [n, V]; `skips`: without those that are -inf, which a cap would make finite."""
    scores, _ = capped(logits, soft_cap)
    if is_bounded(soft_cap):
        exponentials = capped_exp(scores, soft_cap, logits.dtype)
        if skips:
            exponentials = torch.where(logits == float("-inf"), 0.0, exponentials)
        return exponentials.sum(-1, keepdim=True).log()
    if skips:
        scores = torch.where(logits == float("-inf"), float("-inf"), scores)
    return torch.logsumexp(scores, dim=-1, keepdim=True)


def _replace_by_softmax_grad(logits: Tensor, shift: Tensor | None, factor: Tensor, soft_cap: float) -> None:
    """Replaces logits [n, V] by factor [n, 1] times exp(capped - shift [n, 1]) times the cap's slope."""
    scores, slope = capped(logits, soft_cap)
    exponentials = capped_exp(scores, soft_cap, logits.dtype) if shift is None else torch.exp(scores - shift)
    logits.copy_(exponentials * slope * factor)


def _replace(logits: Tensor, lse: Tensor, factor: Tensor, soft_cap: float, use_compile: bool) -> None:
    """Replaces logits [n, V] by factor [n, 1] times their softmax times the cap's slope."""
    replace = compiled(_replace_by_softmax_grad) if use_compile else _replace_by_softmax_grad
    if is_bounded(soft_cap):
        replace(logits, None, factor * (-lse).exp(), soft_cap)
    else:
        replace(logits, lse, factor, soft_cap)


def target_log_prob(
    logits: Tensor, targets: Tensor, soft_cap: float, use_compile: bool
) -> tuple[Tensor, Tensor, Tensor | float]:
    """Capped logit at the target [n, 1] of logits [n, V], log-sum-exp [n, 1], and the cap's slope at the target.

    The log-probability is the first less the second. Below 0 a target is taken for 0.
    """
    sums = compiled(_log_sum_exp) if use_compile else _log_sum_exp
    at_target, slope = capped(logits.gather(-1, targets.clamp_min(0).unsqueeze(-1)), soft_cap)
    return at_target, sums(logits, soft_cap, False), slope


def cross_entropy_and_grad(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    ce_scale: Tensor,
    soft_cap: float,
    z_loss: float,
    use_compile: bool,
) -> tuple[Tensor, Tensor]:
    """Weighted sums [4] of total, CE, squared lse, and no KL; `logits` [n, V] become the gradient to themselves.

    The total is ce_scale CE + z_loss lse^2, with a scale [n] for each token.
    """
    share, scale = weights.unsqueeze(-1), ce_scale.unsqueeze(-1)
    index = targets.clamp_min(0).unsqueeze(-1)
    at_target, lse, slope = target_log_prob(logits, targets, soft_cap, use_compile)
    factor = (scale + 2.0 * z_loss * lse) * share
    _replace(logits, lse, factor, soft_cap, use_compile)
    grad_at_target = ((at_target - lse).exp() * factor - scale * share) * slope
    logits.index_put_(places(index), grad_at_target.to(logits.dtype))
    ce, z = (lse - at_target) * share, (lse.square() * share).sum()
    total = (scale * ce).sum() + z_loss * z
    return torch.stack((total, ce.sum(), z, torch.zeros_like(total))), logits


def soft_cross_entropy_and_grad(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    ce_scale: Tensor,
    soft: SparseTarget,
    kl_weight: float,
    soft_cap: float,
    z_loss: float,
    use_compile: bool,
) -> tuple[Tensor, Tensor]:
    """The same with forward KL: the total is (s - a) CE + z_loss lse^2 + a KL, a = kl_weight where a teacher is.

    With P the teacher's entries, t its tail and Q the student's, a token's KL is (sum P + t) lse - sum P logit
    - t (lse + log Q) - entropy: one factor of the softmax at the entries, another in the tail.
    """
    sums = compiled(_log_sum_exp) if use_compile else _log_sum_exp
    share, a = weights.unsqueeze(-1), kl_weight * soft.present
    scale = ce_scale.unsqueeze(-1)
    index = targets.clamp_min(0).unsqueeze(-1)
    ids = torch.cat((index, soft.ids), dim=-1)  # [n, 1 + K]
    raw = logits.gather(-1, ids)
    at_ids, slope = capped(raw, soft_cap)
    at_target, at_soft = at_ids[:, :1], at_ids[:, 1:]
    mass = mass_of_same_id(ids, F.pad(soft.probs, (1, 0)))
    mass_sum = soft.probs.sum(-1, keepdim=True)
    kl = -(soft.probs * at_soft).sum(-1, keepdim=True) - soft.entropy
    ratio = torch.zeros_like(mass_sum)  # teacher's tail / student's
    if soft.tail is None:
        lse = sums(logits, soft_cap, False)
    else:
        # The student's tail is summed by itself: as a difference it would be lost where the student is sure.
        logits.index_put_(places(ids), raw.masked_fill(mass > 0, float("-inf")))
        rest = sums(logits, soft_cap, True)
        top = torch.logsumexp(at_soft.masked_fill(soft.probs <= 0, float("-inf")), dim=-1, keepdim=True)
        lse = torch.logaddexp(rest, top)
        has_rest = rest > float("-inf")
        tail, rest = torch.where(has_rest, soft.tail, 0.0), torch.where(has_rest, rest, lse)
        ratio = (tail * (lse - rest).exp()).clamp_max(MAX_RATIO)
        mass_sum, kl = mass_sum + tail, kl - tail * rest
    kl = (kl + mass_sum * lse) * soft.present
    at_entries = scale - a + 2 * z_loss * lse + a * mass_sum
    elsewhere = at_entries - a * ratio
    _replace(logits, lse, elsewhere * share, soft_cap, use_compile)
    # All places of an id hold one and the same number, computed whole in float32, whichever is written last.
    grad = (at_ids - lse).exp() * torch.where(mass > 0, at_entries, elsewhere) - a * mass - (scale - a) * (ids == index)
    logits.index_put_(places(ids), (grad * slope * share).to(logits.dtype))
    ce, z = lse - at_target, lse.square()
    parts = torch.cat(((scale - a) * ce + z_loss * z + a * kl, ce, z, kl), dim=-1)
    return (parts * share).sum(0), logits
