"""Language-model losses from hidden states: cross-entropy, KL to teachers, z-loss, chunked over tokens.

The [tokens x vocabulary] logits of a whole batch would dwarf the model (2 GB for 16k tokens at 32k
entries). Here they exist for `chunk_size` tokens at a time, and the gradient is made in the same pass,
so nothing is recomputed backward. `dense_loss` is the same in plain autograd: the specification.

With logits c = soft_cap(u), student p, teacher mixture t, weight w per token and temperature T:

    loss = sum_i w_i [ (1 - a) CE_i + z lse_i^2 + a T^2 KL_i ] / normalizer

Labels below 0 carry no loss of any kind. Sources: z-loss PaLM (2204.02311), KL with temperature
Hinton et al. (1503.02531).
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from smelter.kernels import reference
from smelter.kernels.soft_cap import COMPILER_OPTIONS, capped, capped_exp, is_bounded

Direction = Literal["forward", "reverse"]


@dataclass(frozen=True)
class LossConfig:
    """What is summed: soft-cap of the logits, weight of z-loss and KL, temperature and direction of the KL."""

    soft_cap: float = 0.0
    z_loss: float = 0.0
    kl_weight: float = 0.0
    temperature: float = 1.0
    direction: Direction = "forward"


@dataclass(frozen=True)
class TeacherHead:
    """A teacher's hidden states [N, C'], head [V, C'], soft-cap and weight in the mixture of probabilities."""

    hidden: Tensor
    head: Tensor
    soft_cap: float
    weight: float = 1.0


@dataclass(frozen=True)
class SparseTeacher:
    """A teacher's distribution at every token in few entries: ids [N, K] int64 and probs [N, K] float32.

    kind "sampled": counts of draws / draws, an unbiased estimate of the distribution (RS-KD, 2503.16870); places not
    used have probability 0. `entropy` [N] float32 is the teacher's true entropy in nats: with it the KL that is
    reported is unbiased as well; without it the estimate's own entropy stands in.
    kind "top_k": the exact probabilities of the K likeliest; the rest, 1 - sum, is one more category, the tail.

    A row of zeros has no teacher: its token gets plain cross-entropy and no KL. `temperature` is what the teacher's
    logits were divided by; it must be the loss's. `weight` is its weight in the mixture.
    """

    ids: Tensor
    probs: Tensor
    kind: Literal["sampled", "top_k"]
    entropy: Tensor | None = None
    weight: float = 1.0
    temperature: float = 1.0


Teacher = TeacherHead | SparseTeacher


@dataclass(frozen=True)
class Loss:
    """`total` is differentiable; the parts are detached. All are divided by the normalizer.

    `total` = (1 - kl_weight) * ce + z_loss * z + kl_weight * kl.
    """

    total: Tensor
    ce: Tensor
    z: Tensor
    kl: Tensor


def teacher_log_probs(teachers: Sequence[TeacherHead], rows: slice, temperature: float) -> Tensor:
    """Log-probabilities [n, V] of the weighted mixture of the teachers' softened distributions."""
    total = sum(teacher.weight for teacher in teachers)
    parts = []
    for teacher in teachers:
        logits = F.linear(teacher.hidden[rows], teacher.head.to(teacher.hidden.dtype)).float()
        log_probs = F.log_softmax(reference.soft_cap(logits, teacher.soft_cap) / temperature, dim=-1)
        if len(teachers) == 1:
            return log_probs
        if teacher.weight:
            parts.append(log_probs + torch.tensor(teacher.weight / total, device=log_probs.device).log())
    return torch.logsumexp(torch.stack(parts), dim=0)


def _token_weights(targets: Tensor, weights: Tensor | None) -> Tensor:
    valid = (targets >= 0).float()
    return valid if weights is None else valid * weights


def _log_sum_exp(logits: Tensor, soft_cap: float) -> Tensor:
    """lse [n, 1] of the capped logits [n, V]."""
    values, _ = capped(logits, soft_cap)
    if is_bounded(soft_cap):
        return capped_exp(values, soft_cap, logits.dtype).sum(-1, keepdim=True).log()
    return torch.logsumexp(values, dim=-1, keepdim=True)


def _replace_by_softmax_grad(logits: Tensor, shift: Tensor | None, factor: Tensor, soft_cap: float) -> None:
    """Replaces logits [n, V] by factor [n, 1] times exp(capped - shift [n, 1]) times the cap's slope."""
    values, slope = capped(logits, soft_cap)
    exponentials = capped_exp(values, soft_cap, logits.dtype) if shift is None else torch.exp(values - shift)
    logits.copy_(exponentials * slope * factor)


def _cross_entropy_and_grad(
    logits: Tensor, targets: Tensor, weights: Tensor, config: LossConfig, use_compile: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sums of CE and squared lse; `logits` [n, V] become the gradient to themselves, uncapped.

    Two passes over the logits, one for the sums and one in place, and nothing else of their size.
    """
    sums = _compiled(_log_sum_exp) if use_compile else _log_sum_exp
    replace = _compiled(_replace_by_softmax_grad) if use_compile else _replace_by_softmax_grad
    index = targets.clamp_min(0).unsqueeze(-1)
    at_target, slope = capped(logits.gather(-1, index), config.soft_cap)  # [n, 1]
    lse = sums(logits, config.soft_cap)
    share = weights.unsqueeze(-1)
    factor = (1.0 + 2.0 * config.z_loss * lse) * share
    if is_bounded(config.soft_cap):
        replace(logits, None, factor * (-lse).exp(), config.soft_cap)
    else:
        replace(logits, lse, factor, config.soft_cap)
    grad_at_target = (((at_target - lse).exp() * factor - share) * slope).to(logits.dtype)
    # index_put_, as scatter_ copies the whole tensor twice on a CPU.
    logits.index_put_((torch.arange(len(index), device=index.device), index.squeeze(-1)), grad_at_target.squeeze(-1))
    return ((lse - at_target) * share).sum(), (lse.square() * share).sum(), logits


def _distillation_and_grad(
    logits: Tensor, targets: Tensor, weights: Tensor, teacher: Tensor, config: LossConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weighted sums of CE, squared lse and KL, and the gradient of the total to the uncapped logits [n, V].

    Computed in float32; the gradient comes in the logits' dtype.
    """
    values, slope = capped(logits, config.soft_cap)
    lse = torch.logsumexp(values, dim=-1, keepdim=True)
    index = targets.clamp_min(0).unsqueeze(-1)
    ce = ((lse - values.gather(-1, index)).squeeze(-1) * weights).sum()
    z = (lse.squeeze(-1).square() * weights).sum()
    ce_share = 1.0 - config.kl_weight
    grad = (values - lse).exp_().mul_(ce_share + 2.0 * config.z_loss * lse)
    temperature = config.temperature
    student = F.log_softmax(values / temperature, dim=-1)
    if config.direction == "forward":
        # 0 * -inf where a teacher gives no probability at all: that term of the sum is 0.
        terms = torch.where(teacher > float("-inf"), teacher.exp() * (teacher - student), 0.0)
        token_kl = terms.sum(-1)
        kl_grad = student.exp() - teacher.exp()
    else:
        difference = student - teacher
        token_kl = (student.exp() * difference).sum(-1)
        kl_grad = student.exp() * (difference - token_kl.unsqueeze(-1))
    kl = (token_kl * weights).sum() * temperature**2
    grad.add_(kl_grad, alpha=config.kl_weight * temperature)
    # The target's own entry is put in afterwards: one comparison a token instead of one a logit.
    grad.scatter_add_(-1, index, grad.new_full(index.shape, -ce_share))
    factor = weights.unsqueeze(-1)
    return ce, z, kl, (grad * (slope * factor)).to(logits.dtype)


class _ChunkedLoss(torch.autograd.Function):
    """Forward makes loss and gradients chunk by chunk; backward only scales them.

    Until backward the gradients are those of the sum over tokens: divided by the normalizer before the loss
    scale multiplies them, most of them would be 0 in fp16.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        weights: Tensor,
        normalizer: Tensor,
        teachers: Sequence[TeacherHead],
        config: LossConfig,
        chunk_size: int,
        use_compile: bool,
        needs_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        matrix = head.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_head: Tensor | None = None
        distill = _compiled(_distillation_and_grad) if use_compile else _distillation_and_grad
        add = _compiled(Tensor.add_) if use_compile else Tensor.add_
        sums = torch.zeros(3, device=hidden.device)
        for start in range(0, hidden.shape[0], chunk_size):
            rows = slice(start, min(start + chunk_size, hidden.shape[0]))
            logits = F.linear(hidden[rows], matrix)
            if teachers:
                teacher = teacher_log_probs(teachers, rows, config.temperature)
                ce, z, kl, grad = distill(logits, targets[rows], weights[rows], teacher, config)
            else:
                ce, z, grad = _cross_entropy_and_grad(logits, targets[rows], weights[rows], config, use_compile)
                kl = torch.zeros_like(ce)
            sums += torch.stack((ce, z, kl))
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ matrix
                share = grad.T @ hidden[rows]
                if grad_head is None:
                    grad_head = share.float()
                else:
                    add(grad_head, share)
                del share
            del logits, grad  # else they would still be there while the next chunk's are made
        sums = sums / normalizer
        ce_share = 1.0 - config.kl_weight if teachers else 1.0
        total = ce_share * sums[0] + config.z_loss * sums[1] + config.kl_weight * sums[2]
        if grad_hidden is not None and grad_head is not None:
            ctx.save_for_backward(grad_hidden, grad_head, normalizer)
            ctx.head_dtype = head.dtype
        parts = sums[0].clone(), sums[1].clone(), sums[2].clone()
        ctx.mark_non_differentiable(*parts)
        return total, *parts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head, normalizer = ctx.saved_tensors
        factor = grads[0] / normalizer  # float32: a loss scale of 2**16 is infinite in fp16
        grad_hidden = (grad_hidden.float() * factor).to(grad_hidden.dtype)
        # In place, as a copy would cost the size of the head; a second backward pass is an error.
        return grad_hidden, grad_head.mul_(factor).to(ctx.head_dtype), *(None,) * 8


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same, fused by torch.compile; made at its first use, since the compiler takes a second to import."""
    return torch.compile(function, dynamic=False, options=COMPILER_OPTIONS)


def chunked_loss(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    config: LossConfig,
    *,
    weights: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    teachers: Sequence[TeacherHead] = (),
    chunk_size: int = 1_024,
    use_compile: bool = False,
) -> Loss:
    """Loss of hidden states [N, C] under head [V, C] and targets [N] (below 0: masked).

    weights [N] multiply each token's loss. `normalizer` is the divisor, by default the sum of the weights
    of unmasked tokens in this call; a trainer passes the sum over the whole optimizer step, so that
    accumulation, ranks and padding never change the loss. At most chunk_size x V logits exist at once.
    """
    token_weights = _token_weights(targets, weights)
    if normalizer is None:
        normalizer = token_weights.sum().clamp_min(1e-8)
    divisor = torch.as_tensor(normalizer, dtype=torch.float32, device=hidden.device)
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad)
    parts = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        hidden, head, targets, token_weights, divisor, tuple(teachers), config, chunk_size, use_compile, needs_grad
    )
    return Loss(*parts)


def dense_loss(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    config: LossConfig,
    *,
    weights: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    teachers: Sequence[TeacherHead] = (),
) -> Loss:
    """The specification of `chunked_loss`: all logits at once, gradients by autograd."""
    token_weights = _token_weights(targets, weights)
    divisor = token_weights.sum().clamp_min(1e-8) if normalizer is None else normalizer
    capped = reference.soft_cap(F.linear(hidden, head.to(hidden.dtype)).float(), config.soft_cap)
    ce = (F.cross_entropy(capped, targets.clamp_min(0), reduction="none") * token_weights).sum() / divisor
    z = (torch.logsumexp(capped, dim=-1).square() * token_weights).sum() / divisor
    kl = torch.zeros_like(ce)
    if teachers:
        teacher = teacher_log_probs(teachers, slice(None), config.temperature)
        student = F.log_softmax(capped / config.temperature, dim=-1)
        if config.direction == "forward":
            # A teacher's probability of 0 adds nothing: 0 * log 0 is 0, and its logarithm must not meet the 0.
            certain = teacher.clamp_min(torch.finfo(teacher.dtype).min)
            token_kl = (teacher.exp() * (certain - student)).sum(-1)
        else:
            token_kl = (student.exp() * (student - teacher)).sum(-1)
        kl = (token_kl * token_weights).sum() * config.temperature**2 / divisor
    ce_share = 1.0 - config.kl_weight if teachers else 1.0
    total = ce_share * ce + config.z_loss * z + config.kl_weight * kl
    return Loss(total, ce.detach(), z.detach(), kl.detach())
