"""What a teacher with another tokenizer asks of the student: likelihoods of chunks of text (`tokens.alignment`).

A chunk is an event that happens or not, so the divergence is that of two coins (approximate likelihood matching,
Minixhofer, Vulic, Ponti, arXiv 2503.20083). With the teacher's and the student's likelihood of a chunk to the power
1 / tau, p and q:

    D = tau [ p log(p / q) + (1 - p) log((1 - p) / (1 - q)) ]

The factor tau keeps its size: as tau grows, D becomes b - a + a log(a / b), a and b the nats that teacher and student
spend on the chunk. With tau = 1 long chunks, whose likelihood is next to nothing, would not count.

The student's nats are a sum over its tokens, so the gradient is that of cross-entropy with a factor per token,
dD/db = (p - q) / (1 - q): the same for all tokens of a chunk, 0 where student and teacher agree, negative where the
student is surer than the teacher. Two passes over the head suffice: one without gradient for the log-probabilities of
the targets, one of cross-entropy with these factors (`loss.chunked_loss`, `ce_scale`). Neither memory nor code grows
with the teacher's vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from smelter.losses.cross_entropy import target_log_prob

MIN_NATS = 1e-4
"""Added to both sides' nats: where the student is certain the factor, which grows as 1 / b, stays finite."""


@dataclass(frozen=True)
class ChunkBatch:
    """What one teacher says about the chunks of a micro-batch [B, T]: `tokens.Chunks` of the targets, as tensors."""

    starts: Tensor
    ends: Tensor
    log_probs: Tensor


@dataclass(frozen=True)
class ChunkLoss:
    """The divergence of a micro-batch, and what makes its gradient in a pass of cross-entropy."""

    total: Tensor
    """Sum over chunks of weight x divergence: a number."""
    factors: Tensor
    """[B, T]: dD/db at every token of a chunk, 0 elsewhere."""
    present: Tensor
    """[B, T]: 1 at every token of a chunk, 0 elsewhere; with several teachers, the share of those that have one."""
    correction: Tensor
    """What takes the place of cross-entropy times `factors`, which has the gradient: `total` less that, a number."""


@torch.no_grad()
def target_log_probs(
    hidden: Tensor, head: Tensor, targets: Tensor, soft_cap: float, chunk_size: int, use_compile: bool = False
) -> Tensor:
    """Log-probabilities [N], float32, of targets [N] under hidden states [N, C] and head [V, C]; 0 where masked.

    At most chunk_size x V logits exist at once.
    """
    matrix = head.to(hidden.dtype)
    log_probs = torch.zeros(len(targets), device=hidden.device)
    # What is not compiled makes copies of the logits in float32: a quarter of them takes less than what they save.
    size = chunk_size if use_compile else max(1, chunk_size // 4)
    for start in range(0, len(targets), size):
        rows = slice(start, start + size)
        logits = F.linear(hidden[rows], matrix)
        at_target, lse, _ = target_log_prob(logits, targets[rows], soft_cap, use_compile)
        log_probs[rows] = torch.where(targets[rows] >= 0, (at_target - lse).squeeze(-1), 0.0)
        del logits
    return log_probs


def binary_divergence(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """D, elementwise, of nats b (`student`) and a (`teacher`), both at least 0."""
    a, b = (teacher + MIN_NATS) / tau, (student + MIN_NATS) / tau
    p = torch.exp(-a)
    return tau * (p * (b - a) - torch.expm1(-a) * (torch.log(-torch.expm1(-a)) - torch.log(-torch.expm1(-b))))


def binary_factor(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """dD/db of `binary_divergence`: (p - q) / (1 - q)."""
    a, b = (teacher + MIN_NATS) / tau, (student + MIN_NATS) / tau
    return (torch.expm1(-a) - torch.expm1(-b)) / -torch.expm1(-b)


@torch.no_grad()
def chunk_loss(
    log_probs: Tensor, targets: Tensor, weights: Tensor | None, teachers: Sequence[ChunkBatch], tau: float
) -> ChunkLoss:
    """Mean over teachers of the divergence of all chunks; log_probs and targets [B, T], weights [B, T] or None.

    A chunk counts once, with the weight of its last token; one with a masked target does not count.
    """
    # float64, and sums along rows: exact enough for differences, and the same in every run.
    sums = F.pad(log_probs.double().cumsum(dim=1), (1, 0))
    masked = F.pad((targets < 0).cumsum(dim=1), (1, 0))
    total = torch.zeros((), dtype=torch.float64, device=log_probs.device)
    factors, present = torch.zeros_like(log_probs), torch.zeros_like(log_probs)
    for teacher in teachers:
        first, last = teacher.starts.clamp_min(0), teacher.ends.clamp_min(0)
        after = last + 1
        is_chunk = (teacher.starts >= 0) & (masked.gather(1, after) == masked.gather(1, first))
        student = (sums.gather(1, first) - sums.gather(1, after)).clamp_min(0)
        nats = -teacher.log_probs.double().clamp_max(0)
        is_last = is_chunk & (last == torch.arange(last.shape[1], device=last.device))
        share = is_last.double() if weights is None else is_last * weights.double()
        total = total + (binary_divergence(student, nats, tau) * share).sum()
        factors += torch.where(is_chunk, binary_factor(student, nats, tau), 0.0).float()
        present += is_chunk
    count = len(teachers)
    mean, factors = (total / count).float(), factors / count
    surrogate = -log_probs * factors
    correction = mean - (surrogate if weights is None else surrogate * weights).sum()
    return ChunkLoss(mean, factors, present / count, correction)
