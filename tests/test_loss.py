"""The chunked loss against dense autograd, and the dense one against PyTorch's own losses."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from smelter.loss import LossConfig, chunked_loss, dense_loss
from smelter.losses.divergence import Direction
from smelter.losses.targets import TeacherHead
from tests.largest import Largest

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
    hidden, head = torch.randn(4_096, 8).requires_grad_(), torch.randn(1_000, 8).requires_grad_()
    with Largest() as seen:  # type: ignore[no-untyped-call]
        chunked_loss(hidden, head, torch.zeros(4_096, dtype=torch.long), LossConfig(), chunk_size=64).total.backward()
    assert seen.numel <= 64 * 1_000


def test_temperature_softens_both_and_is_squared() -> None:
    hidden, head, targets, _ = inputs()
    (teacher,) = teachers(1)
    loss = chunked_loss(hidden, head, targets, LossConfig(kl_weight=1.0, temperature=2.5), teachers=[teacher])
    valid = targets >= 0
    student = F.log_softmax(hidden @ head.T / 2.5, -1)[valid]
    expected = F.kl_div(student, F.softmax(teacher.hidden @ teacher.head.T / 2.5, -1)[valid], reduction="batchmean")
    torch.testing.assert_close(loss.kl, expected.detach() * 2.5**2)


def test_z_loss_is_the_squared_log_partition() -> None:
    hidden, head, targets, weights = inputs()
    loss = chunked_loss(hidden, head, targets, LossConfig(soft_cap=3.0, z_loss=0.5), weights=weights)
    valid = targets >= 0
    lse = (torch.tanh(hidden @ head.T / 3) * 3).logsumexp(-1)[valid]
    torch.testing.assert_close(loss.z, ((lse**2 * weights[valid]).sum() / weights[valid].sum()).detach())
    torch.testing.assert_close(loss.total.detach(), loss.ce + 0.5 * loss.z)


def test_a_token_that_a_teacher_excludes_adds_nothing_to_forward_kl() -> None:
    hidden, head, targets, _ = inputs()
    head_t = torch.randn(V, 8, generator=torch.Generator().manual_seed(3))
    head_t[7] = float("-inf")
    teacher = TeacherHead(torch.rand(N, 8, generator=torch.Generator().manual_seed(4)) + 0.1, head_t, 0.0)
    loss = chunked_loss(hidden, head, targets, LossConfig(kl_weight=1.0), teachers=[teacher])
    loss.total.backward()
    rest = torch.arange(V) != 7
    log_p = F.log_softmax(teacher.hidden @ head_t[rest].T, -1)
    student = F.log_softmax(hidden @ head.T, -1)[:, rest]
    expected = (log_p.exp() * (log_p - student)).sum(-1)[targets >= 0].mean()
    torch.testing.assert_close(loss.kl, expected.detach())
    assert hidden.grad is not None
    assert bool(hidden.grad.isfinite().all())
    grad = hidden.grad.clone()
    hidden.grad = None
    dense = dense_loss(hidden, head, targets, LossConfig(kl_weight=1.0), teachers=[teacher])
    dense.total.backward()
    torch.testing.assert_close(dense.kl, expected.detach())
    torch.testing.assert_close(hidden.grad, grad)


Shape = st.tuples(st.integers(1, 30), st.integers(1, 12), st.integers(1, 40), st.integers(1, 35))


@given(
    shape=Shape,
    seed=st.integers(0, 2**32 - 1),
    soft_cap=st.sampled_from([0.0, 0.7, 30.0]),
    z_loss=st.sampled_from([0.0, 0.3]),
    num_teachers=st.integers(0, 2),
    direction=st.sampled_from(["forward", "reverse"]),
    temperature=st.floats(0.5, 4.0),
)
@settings(max_examples=60)
def test_any_shape_and_mask_chunked_equals_dense(
    shape: tuple[int, int, int, int],
    seed: int,
    soft_cap: float,
    z_loss: float,
    num_teachers: int,
    direction: Direction,
    temperature: float,
) -> None:
    tokens, size, vocab, chunk_size = shape
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    hidden, head = randn(tokens, size).requires_grad_(), randn(vocab, size).requires_grad_()
    targets = torch.randint(-2, vocab, (tokens,), generator=generator)
    weights = torch.rand(tokens, generator=generator)
    mixture = [TeacherHead(randn(tokens, 3), randn(vocab, 3), 2.0 * i, 0.5 + i) for i in range(num_teachers)]
    config = LossConfig(soft_cap, z_loss, 0.4 if mixture else 0.0, temperature, direction)
    chunked, dense = (
        function(hidden, head, targets, config, weights=weights, teachers=mixture)
        for function in (partial(chunked_loss, chunk_size=chunk_size), dense_loss)
    )
    for name in ("total", "ce", "z", "kl"):
        torch.testing.assert_close(getattr(chunked, name), getattr(dense, name), atol=1e-5, rtol=1e-4)
    if bool((targets >= 0).any()):
        expected = torch.autograd.grad(dense.total, (hidden, head))
        for got, want in zip(torch.autograd.grad(chunked.total, (hidden, head)), expected, strict=True):
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-3)


def test_weight_two_is_the_token_twice() -> None:
    hidden, head, targets, _ = inputs()
    weights = torch.randint(0, 3, (N,), generator=torch.Generator().manual_seed(2))
    config = LossConfig(soft_cap=5.0, z_loss=0.1)
    weighted = chunked_loss(hidden, head, targets, config, weights=weights.float()).total
    index = torch.arange(N).repeat_interleave(weights)
    repeated = chunked_loss(hidden[index], head, targets[index], config).total
    torch.testing.assert_close(weighted, repeated)
    for got, want in zip(
        torch.autograd.grad(weighted, (hidden, head)), torch.autograd.grad(repeated, (hidden, head)), strict=True
    ):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)


def half_gradients(dtype: torch.dtype, loss_scale: float) -> tuple[Tensor, Tensor]:
    """Gradients of one micro-batch of a step of 262,144 tokens, the loss scale removed again."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 32, generator=generator).to(dtype).requires_grad_()
    head = (torch.randn(4_096, 32, generator=generator) * 0.1).requires_grad_()
    targets = torch.randint(0, 4_096, (64,), generator=generator)
    loss = chunked_loss(hidden, head, targets, LossConfig(z_loss=1e-4), normalizer=262_144.0, chunk_size=24)
    grad_hidden, grad_head = torch.autograd.grad(loss.total * loss_scale, (hidden, head))
    assert grad_hidden.dtype == dtype
    assert grad_head.dtype == torch.float32
    return grad_hidden.float() / loss_scale, grad_head / loss_scale


@pytest.mark.parametrize(
    ("dtype", "loss_scale", "tolerance"),
    [(torch.bfloat16, 1.0, 1e-2), (torch.float16, 1_024.0, 2e-3), (torch.float16, 65_536.0, 2e-3)],
)
def test_half_precision_loses_no_gradient(dtype: torch.dtype, loss_scale: float, tolerance: float) -> None:
    """In fp16 the loss scale must come before the division by the step's tokens, and may exceed 65,504."""
    expected = half_gradients(torch.float32, 1.0)
    for got, want in zip(half_gradients(dtype, loss_scale), expected, strict=True):
        assert float((got - want).norm() / want.norm()) < tolerance


def test_no_gradient_is_made_where_none_is_asked_for() -> None:
    products = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal products
            products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
            return func(*args, **(kwargs or {}))

    hidden, head, targets, _ = inputs()
    with Count(), torch.no_grad():  # type: ignore[no-untyped-call]
        loss = chunked_loss(hidden, head, targets, LossConfig(), chunk_size=10)
    assert not loss.total.requires_grad
    assert products == 4  # the logits of four chunks


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("num_teachers", [0, 1])
def test_compiled_equals_eager(num_teachers: int) -> None:
    config = LossConfig(4.0, z_loss=0.01, kl_weight=0.7, temperature=1.7)
    hidden, head, targets, weights = inputs()
    results = []
    for use_compile in (True, False):
        loss = chunked_loss(
            hidden, head, targets, config, weights=weights, teachers=teachers(num_teachers), chunk_size=16,
            use_compile=use_compile,
        )  # fmt: skip
        results.append((loss.total, loss.ce, loss.z, loss.kl, *torch.autograd.grad(loss.total, (hidden, head))))
    torch.compiler.reset()
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-4)
