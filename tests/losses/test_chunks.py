"""The divergence of chunks and its gradient equal plain autograd over all logits."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from smelter.base.errors import ConfigError
from smelter.config import Config, DistillationConfig
from smelter.data import Batch, chunk_batch
from smelter.distillation.objective import Objective
from smelter.kernels import reference
from smelter.loss import LossConfig, dense_loss
from smelter.losses.chunks import ChunkBatch, binary_divergence, binary_factor, chunk_loss, target_log_probs
from smelter.losses.targets import SparseTeacher, TeacherHead
from smelter.tokens.alignment import chunks_of_slice
from tests import tiny

B, T, V = 3, 12, 40


def powered(nats: Tensor, tau: float) -> Tensor:
    """A coin [.., 2] of likelihood exp(-nats) to the power 1 / tau."""
    p = torch.exp(-nats / tau)
    return torch.stack((p, 1 - p), dim=-1)


@pytest.mark.parametrize("tau", [1.0, 7.0, 100.0])
def test_the_divergence_is_that_of_two_coins(tau: float) -> None:
    torch.manual_seed(0)
    student = (torch.rand(50, dtype=torch.float64) * 9 + 0.05).requires_grad_()
    teacher = torch.rand(50, dtype=torch.float64) * 9 + 0.05
    p, q = powered(teacher, tau), powered(student, tau)
    expected = tau * (p * (p / q).log()).sum(-1)
    found = binary_divergence(student, teacher, tau)
    # What is added to both sides' nats moves the result a little.
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-5)
    (grad,) = torch.autograd.grad(found.sum(), student)
    torch.testing.assert_close(binary_factor(student, teacher, tau), grad, rtol=1e-9, atol=1e-12)
    assert bool((found >= 0).all())


def test_as_tau_grows_it_tends_to_the_divergence_of_nats() -> None:
    a, b = torch.tensor([2.0, 0.5, 4.0], dtype=torch.float64), torch.tensor([1.0, 3.0, 4.0], dtype=torch.float64)
    torch.testing.assert_close(binary_divergence(b, a, 1e6), b - a + a * (a / b).log(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(binary_factor(b, a, 1e6), 1 - a / b, rtol=1e-3, atol=1e-5)
    assert binary_factor(b, b, 100.0).abs().max() == 0


def test_certain_and_hopeless_likelihoods_stay_finite() -> None:
    nats = torch.tensor([0.0, 1e-9, 1e-3, 5.0, 1e3, 6e4], dtype=torch.float64)
    for tau in (1.0, 100.0):
        student, teacher = torch.meshgrid(nats, nats, indexing="ij")
        assert torch.isfinite(binary_divergence(student, teacher, tau)).all()
        assert torch.isfinite(binary_factor(student, teacher, tau)).all()
        assert bool((binary_factor(student, teacher, tau) <= 1).all())


def made(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states [B, T, 8], head, targets with some masked, weights."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, T, 8, generator=generator, dtype=dtype) * 2
    head = torch.randn(V, 8, generator=generator, dtype=dtype)
    targets = torch.randint(V, (B, T), generator=generator)
    targets[1, 7] = targets[2, 0] = -100
    weights = torch.rand(B, 1, generator=generator).expand(B, T).contiguous() + 0.2
    return hidden, head, targets, weights


def random_chunks(seed: int) -> ChunkBatch:
    """Chunks of one to five tokens in rows of T + 1 tokens; some tokens have none."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(B):
        values = np.where(rng.random(T + 9) < 0.5, -rng.exponential(2.0, size=T + 9), np.nan)
        rows.append(chunks_of_slice(values, int(rng.integers(8)), T + 1))
    return chunk_batch(rows)


def dense(log_probs: Tensor, targets: Tensor, weights: Tensor, chunks: ChunkBatch, tau: float) -> Tensor:
    """The specification: a loop over chunks, differentiable."""
    total = torch.zeros((), dtype=torch.float64)
    for row in range(B):
        for start, end in sorted(
            {*zip(chunks.starts[row].tolist(), chunks.ends[row].tolist(), strict=True)} - {(-1, -1)}
        ):
            inside = slice(start, end + 1)
            if bool((targets[row, inside] >= 0).all()):
                nats = torch.tensor(-float(chunks.log_probs[row, start]), dtype=torch.float64)
                student = -log_probs[row, inside].double().sum()
                total = total + weights[row, end] * binary_divergence(student, nats, tau)
    return total


def test_one_token_a_chunk_is_a_formula_over_tokens() -> None:
    """With the same tokenizer on both sides every token is a chunk."""
    hidden, head, targets, _ = made()
    targets = targets.clamp_min(0)
    generator = torch.Generator().manual_seed(5)
    teacher = F.log_softmax(torch.randn(B, T, V, generator=generator, dtype=torch.float64), -1)
    nats = -teacher.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    places = torch.arange(T).expand(B, T)
    log_probs = target_log_probs(hidden.flatten(0, 1), head, targets.flatten(), 0.0, 7).view(B, T)
    found = chunk_loss(log_probs, targets, None, [ChunkBatch(places, places, -nats)], 100.0)
    logits = F.linear(hidden, head).requires_grad_()
    own = -F.log_softmax(logits, -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    p, q = powered(nats + 1e-4, 100.0), powered(own + 1e-4, 100.0)
    expected = 100.0 * (p * (p / q).log()).sum()
    torch.testing.assert_close(found.total.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad(expected, logits)
    one_hot = F.one_hot(targets, V)
    ours = found.factors.unsqueeze(-1) * (F.softmax(logits.detach(), -1) - one_hot)
    torch.testing.assert_close(ours, grad, rtol=1e-4, atol=1e-5)
    assert bool((found.present == 1).all())


@pytest.mark.parametrize("kind", ["alone", "head", "sampled", "reverse"])
def test_two_passes_have_the_gradient_of_the_dense_formula(kind: str) -> None:
    """With masks, weights, soft-cap, z-loss, two chunk teachers, and other teachers beside them."""
    hidden, head, targets, weights = made(1, torch.float32)
    chunks, share, tau = [random_chunks(1), random_chunks(2)], 0.4, 100.0
    beside: list[TeacherHead] = []
    stored: tuple[SparseTeacher, ...] = ()
    config = LossConfig(soft_cap=8.0, z_loss=1e-2, kl_weight=0.0 if kind == "alone" else 0.3)
    if kind in ("head", "reverse"):
        beside = [TeacherHead(torch.randn(B * T, 5), torch.randn(V, 5), 0.0)]
        config = replace(config, direction="reverse" if kind == "reverse" else "forward", temperature=2.0)
    elif kind == "sampled":
        stored = (SparseTeacher(torch.randint(V, (B * T, 4)), torch.full((B * T, 4), 0.25), "sampled"),)
    distillation = DistillationConfig(chunk_weight=share, chunk_temperature=tau, kl_weight=config.kl_weight)
    batch = Batch(inputs=targets, targets=targets, weights=weights, teachers=stored, chunks=tuple(chunks))

    def total(use_chunks: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        if use_chunks:
            objective = Objective(
                Stub(x, w, config.soft_cap),  # type: ignore[arg-type]
                Config(distillation=distillation),
                [Beside(teacher) for teacher in beside],
                (1.0,) * len([*beside, *stored]),
                use_compile=False,
            )
            objective.loss_config, objective.chunk_size = config, 5
            loss = objective(batch, torch.tensor(3.0))
            value, ce, divergence = loss.total, loss.ce, loss.chunk * 3.0
        else:
            capped = reference.soft_cap(F.linear(x, w), config.soft_cap)
            own = F.log_softmax(capped, -1).gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1)
            present = sum((torch.from_numpy(whole(c, targets)) for c in chunks), torch.zeros(B, T)) / len(chunks)
            base = dense_loss(
                x.flatten(0, 1), w, targets.flatten(), config, weights=weights.flatten(),
                ce_scale=(1 - share * present).flatten(), normalizer=3.0, teachers=[*beside, *stored],
            )  # fmt: skip
            each = [dense(own, targets, weights, c, tau) for c in chunks]
            divergence = torch.stack(each).mean()
            value, ce = base.total + share * divergence / 3.0, base.ce
        value.backward()
        assert x.grad is not None
        assert w.grad is not None
        return value.detach(), torch.cat((x.grad.flatten(), w.grad.flatten())), ce, divergence.detach()

    found, expected = total(True), total(False)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=2e-4, atol=2e-5)


class Stub(torch.nn.Module):
    """A model of fixed hidden states and head."""

    def __init__(self, hidden: Tensor, head: Tensor, soft_cap: float) -> None:
        super().__init__()
        self.hidden, self.head = hidden, head
        self.config = replace(tiny.TINY, final_logit_soft_cap=soft_cap)

    def forward(self, inputs: Tensor, doc_ids: Tensor | None, positions: Tensor | None = None) -> Tensor:
        return self.hidden


class Beside:
    """A teacher of fixed hidden states."""

    path, max_seq_len = Path(), T

    def __init__(self, said: TeacherHead) -> None:
        self.head, self.soft_cap, self._hidden = said.head, said.soft_cap, said.hidden

    def hidden(self, inputs: Tensor, doc_ids: Tensor | None) -> Tensor:
        return self._hidden


def whole(chunks: ChunkBatch, targets: Tensor) -> np.ndarray[Any, Any]:
    """1 at tokens of chunks without a masked target."""
    made = np.zeros((B, T), dtype=np.float32)
    for row in range(B):
        for place in range(T):
            start, end = int(chunks.starts[row, place]), int(chunks.ends[row, place])
            made[row, place] = start >= 0 and bool((targets[row, start : end + 1] >= 0).all())
    return made


def test_a_teacher_that_agrees_leaves_only_the_rest_of_the_loss() -> None:
    hidden, head, targets, weights = made(3, torch.float32)
    log_probs = target_log_probs(hidden.flatten(0, 1), head, targets.flatten(), 0.0, 100).view(B, T)
    places = torch.arange(T).expand(B, T)
    found = chunk_loss(log_probs, targets, weights, [ChunkBatch(places, places, log_probs)], 100.0)
    assert found.total.abs() < 1e-6
    assert found.factors.abs().max() < 1e-5
    assert bool((found.present == (targets >= 0)).all())


def settings(values: Sequence[tuple[str, Any]]) -> DistillationConfig:
    return DistillationConfig(**dict(values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([("chunk_weight", 1.5)], "chunk_weight"),
        ([("chunk_temperature", 0.0)], "chunk_temperature"),
        ([("chunk_teachers", ("a",)), ("teachers", ("b",)), ("kl_weight", 0.9)], "together at most 1"),
    ],
)
def test_settings_are_checked(values: list[tuple[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(values)
    assert settings([("chunk_teachers", ("a",)), ("kl_weight", 0.9)]).num_teachers == 0
