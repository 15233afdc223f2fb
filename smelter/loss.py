"""Language-model losses from hidden states: cross-entropy, divergence to teachers, z-loss, chunked over tokens.

The [tokens x vocabulary] logits of a whole batch would dwarf the model (2 GB for 16k tokens at 32k
entries). Here they exist for `chunk_size` tokens at a time, and the gradient is made in the same pass,
so nothing is recomputed backward. `dense_loss` is the same in plain autograd: the specification.

With logits c = soft_cap(u), weight w per token and temperature T, a token's D is the divergence (`losses.divergence`)
of softmax(c / T) from the mixture of its teachers (`losses.targets`), and a is kl_weight, or 0 where no teacher is:

    loss = sum_i w_i [ (1 - a_i) CE_i + z lse_i^2 + a_i T^2 D_i ] / normalizer

Labels below 0 carry no loss of any kind. Sources: z-loss PaLM (2204.02311), KL with temperature
Hinton et al. (1503.02531).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from smelter.kernels import capped, reference
from smelter.losses import (
    Direction,
    Divergence,
    Mixture,
    SparseTeacher,
    Teacher,
    checked_teachers,
    compiled,
    cross_entropy_and_grad,
    divergence,
    divergence_and_grad,
    mixture,
    needs_no_rows,
    soft_cross_entropy_and_grad,
    sparse_target,
)


@dataclass(frozen=True)
class LossConfig:
    """What is summed: soft-cap of the logits, weight of z-loss and of the divergence, and which divergence.

    `skew_alpha` and `js_beta` are the parameters of those directions. `use_confidence` multiplies each teacher's
    weight in the mixture by exp(-its entropy) at every token.
    """

    soft_cap: float = 0.0
    z_loss: float = 0.0
    kl_weight: float = 0.0
    temperature: float = 1.0
    direction: Direction = "forward"
    skew_alpha: float = 0.1
    js_beta: float = 0.5
    use_confidence: bool = False

    @property
    def divergence(self) -> Divergence:
        """Which divergence, with its parameters."""
        return Divergence(self.direction, self.skew_alpha, self.js_beta)


class Loss(NamedTuple):
    """`total` is differentiable; the parts are detached. All are divided by the normalizer.

    `total` = (1 - kl_weight) * ce + z_loss * z + kl_weight * kl where every token has a teacher. A token without
    one adds its whole cross-entropy to `total` and nothing to `kl`. `kl` is the divergence of any direction.
    """

    total: Tensor
    ce: Tensor
    z: Tensor
    kl: Tensor
    chunk: Tensor
    """Divergence to teachers with other tokenizers: 0 but where `distillation.Objective` has some."""


def _token_weights(targets: Tensor, weights: Tensor | None) -> Tensor:
    valid = (targets >= 0).float()
    return valid if weights is None else valid * weights


def _log_student(logits: Tensor, soft_cap: float, temperature: float) -> Tensor:
    """Log-probabilities [n, V] of the student, softened."""
    scores, _ = capped(logits, soft_cap)
    return F.log_softmax(scores / temperature, dim=-1)


def _distillation_and_grad(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    ce_scale: Tensor,
    kl_share: Tensor,
    teacher: Mixture,
    config: LossConfig,
) -> tuple[Tensor, Tensor]:
    """Weighted sums [4] of total, CE, squared lse and divergence, and the total's gradient to the logits [n, V].

    kl_share [n] is each token's share of the divergence; it comes as a tensor and config.kl_weight is not read, so
    that a weight that changes compiles nothing anew. Computed in float32; the gradient comes in the logits' dtype.
    """
    scores, slope = capped(logits, config.soft_cap)
    lse = torch.logsumexp(scores, dim=-1, keepdim=True)
    index = targets.clamp_min(0).unsqueeze(-1)
    ce = (lse - scores.gather(-1, index)).squeeze(-1)
    z = lse.squeeze(-1).square()
    share = kl_share.unsqueeze(-1)
    ce_share = ce_scale.unsqueeze(-1) - share
    grad = (scores - lse).exp_().mul_(ce_share + 2.0 * config.z_loss * lse)
    student = F.log_softmax(scores / config.temperature, dim=-1)
    token, token_grad = divergence_and_grad(teacher.log_probs, student, config.divergence)
    kl = _stated(token, teacher) * config.temperature**2
    grad.add_(token_grad * (share * config.temperature))
    # The target's own entry is put in afterwards: one comparison a token instead of one a logit.
    grad.scatter_add_(-1, index, -ce_share)
    total = (ce_scale - kl_share) * ce + config.z_loss * z + kl_share * kl
    parts = torch.stack((total, ce, z, kl))
    return (parts * weights).sum(-1), (grad * (slope * weights.unsqueeze(-1))).to(logits.dtype)


def _stated(token: Tensor, teacher: Mixture) -> Tensor:
    """The divergence [n] with the teachers' stated entropy, and 0 where there is no teacher."""
    if teacher.entropy is not None:
        log_p = teacher.log_probs
        token = token - (log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(-1) - teacher.entropy
    return torch.where(teacher.present, token, 0.0)


def _chunk_and_grad(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    ce_scale: Tensor,
    teachers: Sequence[Teacher],
    rows: slice,
    config: LossConfig,
    use_compile: bool,
) -> tuple[Tensor, Tensor]:
    """Weighted sums [4] of one chunk, and the gradient to its logits [n, V], which may take their place."""
    options = config.soft_cap, config.z_loss, use_compile
    if not teachers:
        return cross_entropy_and_grad(logits, targets, weights, ce_scale, *options)
    if needs_no_rows(teachers, config.direction, config.temperature):
        soft = sparse_target(teachers, rows, config.use_confidence)
        return soft_cross_entropy_and_grad(logits, targets, weights, ce_scale, soft, config.kl_weight, *options)
    student = None
    if any(isinstance(teacher, SparseTeacher) for teacher in teachers):
        student = _log_student(logits, config.soft_cap, config.temperature)
    teacher = mixture(teachers, rows, config.temperature, student, config.use_confidence)
    del student
    distill = compiled(_distillation_and_grad) if use_compile else _distillation_and_grad
    kl_share = config.kl_weight * teacher.present
    return distill(logits, targets, weights, ce_scale, kl_share, teacher, replace(config, kl_weight=0.0))


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
        ce_scale: Tensor,
        normalizer: Tensor,
        teachers: Sequence[Teacher],
        config: LossConfig,
        chunk_size: int,
        use_compile: bool,
        needs_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        matrix = head.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_head: Tensor | None = None
        add = compiled(Tensor.add_) if use_compile else Tensor.add_
        sums = torch.zeros(4, device=hidden.device)
        for start in range(0, hidden.shape[0], chunk_size):
            rows = slice(start, min(start + chunk_size, hidden.shape[0]))
            logits = F.linear(hidden[rows], matrix)
            of_token = targets[rows], weights[rows], ce_scale[rows]
            parts, grad = _chunk_and_grad(logits, *of_token, teachers, rows, config, use_compile)
            sums += parts
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
        if grad_hidden is not None and grad_head is not None:
            ctx.save_for_backward(grad_hidden, grad_head, normalizer)
            ctx.head_dtype = head.dtype
        total, *rest = (part.clone() for part in sums)
        ctx.mark_non_differentiable(*rest)
        return total, rest[0], rest[1], rest[2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head, normalizer = ctx.saved_tensors
        factor = grads[0] / normalizer  # float32: a loss scale of 2**16 is infinite in fp16
        grad_hidden = (grad_hidden.float() * factor).to(grad_hidden.dtype)
        # In place, as a copy would cost the size of the head; a second backward pass is an error.
        return grad_hidden, grad_head.mul_(factor).to(ctx.head_dtype), *(None,) * 9


def chunked_loss(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    config: LossConfig,
    *,
    weights: Tensor | None = None,
    ce_scale: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    teachers: Sequence[Teacher] = (),
    chunk_size: int = 1_024,
    use_compile: bool = False,
) -> Loss:
    """Loss of hidden states [N, C] under head [V, C] and targets [N] (below 0: masked).

    weights [N] multiply each token's loss, ce_scale [N] its cross-entropy alone in `total` (1 - a_i becomes
    ce_scale_i - a_i; it may be negative). `normalizer` is the divisor, by default the sum of the weights
    of unmasked tokens in this call; a trainer passes the sum over the whole optimizer step, so that
    accumulation, ranks and padding never change the loss. At most chunk_size x V logits exist at once.
    Raises ConfigError for a sparse teacher of another temperature, or a sampled one with a direction but forward.
    """
    used = checked_teachers(teachers, config.direction, config.temperature)
    token_weights = _token_weights(targets, weights)
    if normalizer is None:
        normalizer = token_weights.sum().clamp_min(1e-8)
    divisor = torch.as_tensor(normalizer, dtype=torch.float32, device=hidden.device)
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad)
    scale = torch.ones_like(token_weights) if ce_scale is None else ce_scale
    total, ce, z, kl = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        hidden, head, targets, token_weights, scale, divisor, used, config, chunk_size, use_compile, needs_grad
    )
    return Loss(total, ce, z, kl, torch.zeros_like(kl))


def dense_loss(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    config: LossConfig,
    *,
    weights: Tensor | None = None,
    ce_scale: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    teachers: Sequence[Teacher] = (),
) -> Loss:
    """The specification of `chunked_loss`: all logits at once, gradients by autograd."""
    used = checked_teachers(teachers, config.direction, config.temperature)
    token_weights = _token_weights(targets, weights)
    divisor = token_weights.sum().clamp_min(1e-8) if normalizer is None else normalizer
    capped_logits = reference.soft_cap(F.linear(hidden, head.to(hidden.dtype)).float(), config.soft_cap)
    ce = F.cross_entropy(capped_logits, targets.clamp_min(0), reduction="none")
    z = torch.logsumexp(capped_logits, dim=-1).square()
    kl, kl_share = torch.zeros_like(ce), torch.zeros_like(ce)
    if used:
        student = F.log_softmax(capped_logits / config.temperature, dim=-1)
        teacher = mixture(used, slice(None), config.temperature, student.detach(), config.use_confidence)
        kl = _stated(divergence(teacher.log_probs, student, config.divergence), teacher) * config.temperature**2
        kl_share = config.kl_weight * teacher.present
    scale = torch.ones_like(ce) if ce_scale is None else ce_scale
    total = (scale - kl_share) * ce + config.z_loss * z + kl_share * kl
    sums = [(part * token_weights).sum() / divisor for part in (total, ce, z, kl, torch.zeros_like(kl))]
    return Loss(sums[0], *(part.detach() for part in sums[1:]))
