"""The four divergences against formulas written out number by number in float64, their gradients, and their limits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smelter.losses.divergence import Direction, Divergence, divergence, divergence_and_grad

DIRECTIONS: tuple[Direction, ...] = ("forward", "reverse", "skew", "js")


def pair(seed: int = 0, tokens: int = 5, vocab: int = 7, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities of a teacher, and logits of a student, in float64."""
    generator = torch.Generator().manual_seed(seed)
    teacher, student = (spread * torch.randn(tokens, vocab, generator=generator, dtype=torch.float64) for _ in "ab")
    return teacher.log_softmax(-1), student.requires_grad_()


def written_out(p: list[float], q: list[float], direction: Direction, alpha: float, beta: float) -> float:
    """The definition of the papers, with the mathematics of Python."""

    def kl(a: list[float], b: list[float]) -> float:
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)

    def blend(share: float) -> list[float]:
        return [share * x + (1 - share) * y for x, y in zip(p, q, strict=True)]

    if direction == "forward":
        return kl(p, q)
    if direction == "reverse":
        return kl(q, p)
    if direction == "skew":
        return kl(p, blend(alpha))
    return beta * kl(p, blend(beta)) + (1 - beta) * kl(q, blend(beta))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("alpha", "beta"), [(0.1, 0.5), (0.7, 0.2), (0.0, 0.9)])
def test_value_is_the_papers(direction: Direction, alpha: float, beta: float) -> None:
    log_p, logits = pair()
    log_q = logits.detach().log_softmax(-1)
    kind = Divergence(direction, alpha, beta)
    expected = [
        written_out(p, q, direction, alpha, beta)
        for p, q in zip(log_p.exp().tolist(), log_q.exp().tolist(), strict=True)
    ]
    torch.testing.assert_close(divergence(log_p, log_q, kind), torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(divergence_and_grad(log_p, log_q, kind)[0], torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("alpha", "beta"), [(0.1, 0.5), (0.6, 0.05)])
def test_gradient_is_the_slope_of_the_value(direction: Direction, alpha: float, beta: float) -> None:
    """Central differences of the written-out formula, one logit at a time."""
    log_p, logits = pair(3, tokens=2, vocab=4)
    kind = Divergence(direction, alpha, beta)
    _, grad = divergence_and_grad(log_p, logits.detach().log_softmax(-1), kind)
    (by_autograd,) = torch.autograd.grad(divergence(log_p, logits.log_softmax(-1), kind).sum(), logits)
    torch.testing.assert_close(grad, by_autograd)
    step = 1e-5
    for token in range(2):
        p = log_p[token].exp().tolist()
        for entry in range(4):
            values = []
            for sign in (1, -1):
                moved = logits.detach()[token].clone()
                moved[entry] += sign * step
                values.append(written_out(p, moved.softmax(-1).tolist(), direction, alpha, beta))
            assert float(grad[token, entry]) == pytest.approx((values[0] - values[1]) / (2 * step), abs=1e-8)


@given(
    seed=st.integers(0, 2**32 - 1),
    tokens=st.integers(1, 6),
    vocab=st.integers(1, 9),
    spread=st.floats(0.0, 15.0),
    direction=st.sampled_from(DIRECTIONS),
    alpha=st.floats(0.0, 0.99),
    beta=st.floats(0.01, 0.99),
)
@settings(max_examples=60)
def test_any_pair(
    seed: int, tokens: int, vocab: int, spread: float, direction: Direction, alpha: float, beta: float
) -> None:
    """Never negative, 0 at the teacher, a gradient that sums to 0 over a token and is autograd's."""
    log_p, logits = pair(seed, tokens, vocab, spread)
    kind = Divergence(direction, alpha, beta)
    token, grad = divergence_and_grad(log_p, logits.detach().log_softmax(-1), kind)
    assert float(token.min()) > -1e-12
    torch.testing.assert_close(grad.sum(-1), torch.zeros_like(token), atol=1e-9, rtol=0)
    (by_autograd,) = torch.autograd.grad(divergence(log_p, logits.log_softmax(-1), kind).sum(), logits)
    torch.testing.assert_close(grad, by_autograd, atol=1e-10, rtol=1e-7)
    for same in divergence_and_grad(log_p, log_p, kind):
        torch.testing.assert_close(same, torch.zeros_like(same), atol=1e-12, rtol=0)


def both(kind: Divergence) -> tuple[Tensor, Tensor]:
    log_p, logits = pair(1)
    return divergence_and_grad(log_p, logits.detach().log_softmax(-1), kind)


def test_skew_without_skew_is_forward() -> None:
    for alpha, tolerance in ((0.0, 1e-12), (1e-8, 1e-4)):
        for got, want in zip(both(Divergence("skew", alpha=alpha)), both(Divergence()), strict=True):
            torch.testing.assert_close(got, want, atol=tolerance, rtol=0)


@pytest.mark.parametrize(("beta", "share", "limit"), [(1e-6, 1e-6, "forward"), (1 - 1e-6, 1e-6, "reverse")])
def test_js_near_its_ends_is_kl(beta: float, share: float, limit: Direction) -> None:
    """js / beta -> KL(p || q) for beta -> 0, and js / (1 - beta) -> KL(q || p) for beta -> 1."""
    for got, want in zip(both(Divergence("js", beta=beta)), both(Divergence(limit)), strict=True):
        torch.testing.assert_close(got / share, want, atol=1e-3, rtol=1e-3)


def test_js_of_one_half_is_symmetric_and_at_most_log_2() -> None:
    log_p, logits = pair(2, spread=30.0)
    log_q = logits.detach().log_softmax(-1)
    value = divergence(log_p, log_q, Divergence("js"))
    torch.testing.assert_close(value, divergence(log_q, log_p, Divergence("js")))
    assert float(value.max()) <= math.log(2) + 1e-12
    assert float(value.max()) > 0.6


@pytest.mark.parametrize("direction", ["forward", "skew", "js"])
def test_where_the_teacher_gives_nothing_all_stays_finite(direction: Direction) -> None:
    log_p, logits = pair(4, vocab=6)
    log_p = torch.cat((log_p[:, :3].log_softmax(-1), torch.full_like(log_p[:, 3:], float("-inf"))), dim=-1)
    log_q = logits.log_softmax(-1)
    kind = Divergence(direction)
    expected = [
        written_out(p, q, direction, 0.1, 0.5) for p, q in zip(log_p.exp().tolist(), log_q.exp().tolist(), strict=True)
    ]
    token, grad = divergence_and_grad(log_p, log_q.detach(), kind)
    torch.testing.assert_close(token, torch.tensor(expected, dtype=torch.float64))
    (by_autograd,) = torch.autograd.grad(divergence(log_p, log_q, kind).sum(), logits)
    torch.testing.assert_close(grad, by_autograd)
    assert bool(grad.isfinite().all())
