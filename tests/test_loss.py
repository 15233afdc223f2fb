"""The chunked loss against dense autograd, and the dense one against PyTorch's own losses."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from smelter.loss import Direction, LossConfig, TeacherHead, chunked_loss, dense_loss

N, C, V = 37, 16, 50


def inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, C, generator=generator).requires_grad_()
    head = torch.randn(V, C, generator=generator).requires_grad_()
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[::5] = -100
    return hidden, head, targets, torch.rand(N, generator=generator)


def teachers(count: int) -> list[TeacherHead]:
    generator = torch.Generator().manual_seed(9)
    return [
        TeacherHead(torch.randn(N, 8, generator=generator), torch.randn(V, 8, generator=generator), 5.0 * i, 1.0 + i)
        for i in range(count)
    ]


@pytest.mark.parametrize("chunk_size", [1, 8, 37, 100])
@pytest.mark.parametrize("num_teachers", [0, 1, 2])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("soft_cap", [0.0, 4.0])
def test_chunked_equals_dense(chunk_size: int, num_teachers: int, direction: Direction, soft_cap: float) -> None:
    config = LossConfig(
        soft_cap, z_loss=0.01, kl_weight=0.7 if num_teachers else 0.0, temperature=1.7, direction=direction
    )
    hidden, head, targets, weights = inputs()
    results = []
    for loss in (
        chunked_loss(
            hidden, head, targets, config, weights=weights, teachers=teachers(num_teachers), chunk_size=chunk_size
        ),
        dense_loss(hidden, head, targets, config, weights=weights, teachers=teachers(num_teachers)),
    ):
        results.append((loss.total, loss.ce, loss.z, loss.kl, *torch.autograd.grad(loss.total * 3, (hidden, head))))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-4)


def test_cross_entropy_is_pytorchs() -> None:
    hidden, head, targets, _ = inputs()
    loss = dense_loss(hidden, head, targets, LossConfig())
    torch.testing.assert_close(loss.total, F.cross_entropy(hidden @ head.T, targets, ignore_index=-100))


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_kl_is_pytorchs(direction: Direction) -> None:
    hidden, head, _, _ = inputs()
    (teacher,) = teachers(1)
    loss = dense_loss(
        hidden,
        head,
        torch.zeros(N, dtype=torch.long),
        LossConfig(kl_weight=1.0, direction=direction),
        teachers=[teacher],
    )
    student, other = (
        torch.distributions.Categorical(logits=x) for x in (hidden @ head.T, teacher.hidden @ teacher.head.T)
    )
    pair = (other, student) if direction == "forward" else (student, other)
    torch.testing.assert_close(loss.total, torch.distributions.kl_divergence(*pair).mean())


def test_two_teachers_are_a_mixture_of_probabilities() -> None:
    hidden, head, targets, _ = inputs()
    a, b = teachers(2)
    probs = [
        F.softmax(t.hidden @ t.head.T if not t.soft_cap else 5 * torch.tanh(t.hidden @ t.head.T / 5), -1)
        for t in (a, b)
    ]
    mixture = (probs[0] * a.weight + probs[1] * b.weight) / (a.weight + b.weight)
    loss = chunked_loss(hidden, head, targets, LossConfig(kl_weight=1.0), teachers=[a, b])
    token_kl = (mixture * (mixture.log() - F.log_softmax(hidden @ head.T, -1))).sum(-1)
    torch.testing.assert_close(loss.kl, token_kl[targets >= 0].mean(), atol=1e-5, rtol=1e-4)


def test_all_masked_is_zero_and_finite() -> None:
    hidden, head, targets, _ = inputs()
    loss = chunked_loss(hidden, head, torch.full_like(targets, -100), LossConfig(z_loss=0.1))
    loss.total.backward()
    assert float(loss.total.detach()) == 0
    assert hidden.grad is not None
    assert float(hidden.grad.abs().max()) == 0


def test_parts_divided_by_one_normalizer_add_up() -> None:
    hidden, head, targets, _ = inputs()
    whole = chunked_loss(hidden, head, targets, LossConfig())
    count = float((targets >= 0).sum())
    parts = [
        chunked_loss(hidden[r], head, targets[r], LossConfig(), normalizer=count).total
        for r in (slice(9), slice(9, None))
    ]
    torch.testing.assert_close(torch.stack(parts).sum(), whole.total)


def test_the_logits_never_exist_whole() -> None:
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple) else (out,):
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.numel())
            return out

    hidden, head = torch.randn(4_096, 8).requires_grad_(), torch.randn(1_000, 8).requires_grad_()
    with Watch():  # type: ignore[no-untyped-call]
        chunked_loss(hidden, head, torch.zeros(4_096, dtype=torch.long), LossConfig(), chunk_size=64).total.backward()
    assert largest <= 64 * 1_000
