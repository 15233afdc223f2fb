"""How far a student's distribution q is from a teacher's p: four divergences, their values and gradients.

    forward   KL(p || q)                                                   Hinton et al., arXiv 1503.02531
    reverse   KL(q || p)                                                   MiniLLM, arXiv 2306.08543
    skew      KL(p || alpha p + (1 - alpha) q)                             DistiLLM, arXiv 2402.03898
    js        beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q       GKD, arXiv 2306.13649

Each is a sum over q_v f(p_v / q_v), so its gradient to the student's logits, p held constant, is
q_v (g_v - sum_u q_u g_u) with g_v = dD/dq_v. Hence also: entries whose ratio p_v / q_v is the same may be merged into
one category without any change of value or gradient, which is what makes a teacher's tail one category (targets.py).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Direction = Literal["forward", "reverse", "skew", "js"]


@dataclass(frozen=True)
class Divergence:
    """Which of the four, and the parameters that skew (alpha in [0, 1)) and js (beta in (0, 1)) have."""

    direction: Direction = "forward"
    alpha: float = 0.1
    beta: float = 0.5


def _log_blend(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share p + (1 - share) q)."""
    return log_q if share == 0 else torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) [n] of log-probabilities [n, V]; where p is 0 its term is 0, and log 0 must not meet that 0."""
    return (log_p.exp() * (log_p.clamp_min(torch.finfo(log_p.dtype).min) - log_q)).sum(-1)


def divergence(log_p: Tensor, log_q: Tensor, kind: Divergence) -> Tensor:
    """The divergence [n] of log-probabilities [n, V], written as it is defined: for autograd, the specification.

    log_p may be -inf; reverse KL is then infinite unless q is 0 as well.
    """
    if kind.direction == "forward":
        return _kl(log_p, log_q)
    if kind.direction == "reverse":
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    if kind.direction == "skew":
        return _kl(log_p, _log_blend(log_p, log_q, kind.alpha))
    assert kind.direction == "js"
    middle = _log_blend(log_p, log_q, kind.beta)
    return kind.beta * _kl(log_p, middle) + (1 - kind.beta) * _kl(log_q, middle)


def divergence_and_grad(log_p: Tensor, log_q: Tensor, kind: Divergence) -> tuple[Tensor, Tensor]:
    """The divergence [n] and its gradient [n, V] to the logits whose log-softmax log_q is; p is constant."""
    q = log_q.exp()
    if kind.direction == "forward":
        p = log_p.exp()
        return _kl(log_p, log_q), q * p.sum(-1, keepdim=True) - p
    if kind.direction == "skew":
        middle = _log_blend(log_p, log_q, kind.alpha)
        pull = (1 - kind.alpha) * (log_p + log_q - middle).exp()  # -q g
        return _kl(log_p, middle), q * pull.sum(-1, keepdim=True) - pull
    if kind.direction == "reverse":
        difference = log_q - log_p
        token = (q * difference).sum(-1)
        return token, q * (difference - token.unsqueeze(-1))
    assert kind.direction == "js"
    middle = _log_blend(log_p, log_q, kind.beta)
    difference = log_q - middle
    mean = (q * difference).sum(-1)
    token = kind.beta * _kl(log_p, middle) + (1 - kind.beta) * mean
    return token, (1 - kind.beta) * q * (difference - mean.unsqueeze(-1))
