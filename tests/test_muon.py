"""Muon against torch.optim.Muon, AdamW against torch.optim.AdamW, and the groups of both."""

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smelter.model import Model
from smelter.muon import AdjustLr, Muon, MuonAdamW, newton_schulz
from tests import tiny


@pytest.mark.parametrize("adjust_lr", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("nesterov", [True, False])
def test_equal_to_torch_step_for_step(adjust_lr: AdjustLr, weight_decay: float, nesterov: bool) -> None:
    torch.manual_seed(0)
    shapes = [(32, 32), (48, 16), (16, 48), (32, 32), (16, 48)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = copy.deepcopy(ours)
    options = {"lr": 0.02, "momentum": 0.9, "weight_decay": weight_decay}
    mine = Muon(ours, **options, use_nesterov=nesterov, adjust_lr=adjust_lr)  # type: ignore[arg-type]
    other = torch.optim.Muon(theirs, **options, nesterov=nesterov, adjust_lr_fn=adjust_lr)  # type: ignore[arg-type]
    for _ in range(10):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        mine.step()
        other.step()
        for a, b in zip(ours, theirs, strict=True):
            # Batched and single bf16 products may round differently: one bf16 unit of the update.
            torch.testing.assert_close(a, b, atol=0.02 * 2**-6, rtol=0)


@pytest.mark.parametrize("smallest", [1e-1, 1e-2])
def test_newton_schulz_orthogonalises_bad_spectra(smallest: float) -> None:
    torch.manual_seed(1)
    u, _ = torch.linalg.qr(torch.randn(3, 64, 64))
    v, _ = torch.linalg.qr(torch.randn(3, 96, 64))
    spectrum = torch.logspace(0, torch.tensor(smallest).log10().item(), 64)
    matrices = u @ torch.diag_embed(spectrum.expand(3, -1)) @ v.mT
    for dtype in (torch.bfloat16, torch.float32):
        singular = torch.linalg.svdvals(newton_schulz(matrices, dtype=dtype).float())
        assert float(singular.max()) < 1.3
        assert float(singular.min()) > (0.6 if smallest == 1e-1 else 0.2)


def test_cautious_decay_acts_only_where_the_update_shrinks() -> None:
    weight = torch.nn.Parameter(torch.ones(8, 8))
    weight.grad = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    plain = copy.deepcopy(weight)
    plain.grad = weight.grad.clone()
    Muon([weight], lr=0.1, weight_decay=0.5, use_cautious_decay=True).step()
    Muon([plain], lr=0.1).step()
    shrunk = plain.detach() < 1
    torch.testing.assert_close((plain - weight)[shrunk], torch.full((int(shrunk.sum()),), 0.05))
    torch.testing.assert_close(weight[~shrunk], plain[~shrunk])


def gradients(model: Model, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_adamw_part_equals_torch() -> None:
    ours, theirs = tiny.model(), tiny.model()
    mine = MuonAdamW(ours, use_muon=False, adamw_lr=1e-2, embedding_lr=1e-2, adamw_weight_decay=0.0)
    other = torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0)
    for step in range(5):
        gradients(ours, step)
        gradients(theirs, step)
        mine.step()
        other.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("use_muon", [True, False])
def test_every_parameter_is_in_one_group_and_moves(use_muon: bool) -> None:
    model = tiny.model(tie_embeddings=False)
    optimizer = MuonAdamW(model, use_muon=use_muon)
    grouped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))
    before = [parameter.clone() for parameter in model.parameters()]
    gradients(model, 0)
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_state_goes_on_bit_for_bit() -> None:
    def steps(model: Model, optimizer: MuonAdamW, first: int, last: int) -> None:
        for step in range(first, last):
            gradients(model, step)
            optimizer.param_groups[0]["lr"] = 0.01 * (step + 1)
            optimizer.step()

    whole, half = tiny.model(), tiny.model()
    steps(whole, MuonAdamW(whole), 0, 6)
    first = MuonAdamW(half)
    steps(half, first, 0, 3)
    second = MuonAdamW(half)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    steps(half, second, 3, 6)
    for a, b in zip(whole.parameters(), half.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_loss_scaler_unscales_every_group_and_skips_on_overflow() -> None:
    model = tiny.model()
    optimizer = MuonAdamW(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    gradients(model, 0)
    expected = [parameter.grad / 8 for parameter in model.parameters() if parameter.grad is not None]
    scaler.unscale_(optimizer)
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, grad)
    scaler.step(optimizer)
    scaler.update()
    before = [parameter.clone() for parameter in model.parameters()]
    gradients(model, 1)
    next(model.parameters()).grad.view(-1)[0] = float("inf")  # type: ignore[union-attr]
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert scaler.get_scale() == 4.0


def test_matrices_only() -> None:
    with pytest.raises(ValueError, match="2-D"):
        Muon([torch.nn.Parameter(torch.ones(3))])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("condition", [1e2, 1e3, 1e4])
def test_newton_schulz_keeps_directions_of_bad_spectra(condition: float, dtype: torch.dtype) -> None:
    u, v = torch.linalg.qr(randn(64, 64))[0], torch.linalg.qr(randn(96, 64, seed=1))[0]
    spectrum = torch.logspace(0, -math.log10(condition), 64)
    result = newton_schulz((u * spectrum @ v.T)[None], dtype=dtype)[0].float()
    # Seen in the bases of the SVD the result is diagonal, its entries near 1 unless they were tiny.
    inside = u.T @ result @ v
    share = spectrum / spectrum.norm()
    diagonal = inside.diagonal()[share > 0.02]
    assert float(diagonal.min()) > 0.5
    assert float(diagonal.max()) < 1.5
    assert float((inside - inside.diagonal().diag()).abs().max()) < (0.15 if dtype == torch.bfloat16 else 1e-3)
    assert bool(result.isfinite().all())


def test_newton_schulz_in_float32_follows_the_polynomial_of_the_singular_values() -> None:
    matrices = randn(2, 24, 40)
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True)
    for _ in range(5):
        a, b, c = 3.4445, -4.7750, 2.0315
        s = a * s + b * s**3 + c * s**5
    expected = u @ torch.diag_embed(s) @ vh
    torch.testing.assert_close(newton_schulz(matrices, dtype=torch.float32), expected, atol=1e-4, rtol=1e-3)


@given(
    count=st.integers(1, 3),
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    exponent=st.integers(-15, 15),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=50)
def test_newton_schulz_knows_only_the_direction(
    count: int, rows: int, columns: int, exponent: int, seed: int, dtype: torch.dtype
) -> None:
    matrices = randn(count, rows, columns, seed=seed)
    result = newton_schulz(matrices, dtype=dtype)
    assert result.shape == matrices.shape
    assert result.dtype == dtype
    assert float(torch.linalg.matrix_norm(result.float(), ord=2).max()) < 1.35
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for other, expected in (
        (newton_schulz(matrices * 2.0**exponent, dtype=dtype), result),
        (newton_schulz(-matrices, dtype=dtype), -result),
    ):
        torch.testing.assert_close(other, expected, atol=tolerance, rtol=0)
    if rows != columns:
        torch.testing.assert_close(newton_schulz(matrices.mT, dtype=dtype), result.mT, atol=tolerance, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_matrix_without_gradient_signal_stays(dtype: torch.dtype) -> None:
    weight = torch.nn.Parameter(randn(8, 4))
    before = weight.detach().clone()
    optimizer = Muon([weight], lr=0.1, weight_decay=0.5, newton_schulz_dtype=dtype, use_cautious_decay=True)
    optimizer.step()  # no gradient at all
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.equal(weight, before)


def test_the_newton_schulz_dtype_is_used() -> None:
    grad = randn(24, 40)
    for dtype in (torch.float32, torch.bfloat16):
        layer = torch.nn.Linear(40, 24)
        optimizer = MuonAdamW(layer, muon_lr=1.0, muon_momentum=0.0, newton_schulz_dtype=dtype)
        before = layer.weight.detach().clone()
        layer.weight.grad = grad.clone()
        optimizer.step()
        step = before - layer.weight.detach()
        torch.testing.assert_close(step, newton_schulz(grad[None], dtype=dtype)[0].float(), atol=1e-6, rtol=0)


def test_muon_inside_equals_muon_alone() -> None:
    ours, alone = tiny.model(), tiny.model()
    mine = MuonAdamW(ours, muon_lr=0.03, muon_momentum=0.8)
    matrices = [p for name, p in alone.named_parameters() if name.startswith("layers.") and p.ndim == 2]
    other = torch.optim.Muon(matrices, lr=0.03, momentum=0.8, weight_decay=0.0)
    for step in range(3):
        gradients(ours, step)
        gradients(alone, step)
        mine.step()
        other.step()
    theirs = dict(alone.named_parameters())
    for name, parameter in ours.named_parameters():
        if name.startswith("layers.") and parameter.ndim == 2:
            torch.testing.assert_close(parameter, theirs[name], atol=0.03 * 2**-6, rtol=0)


@pytest.mark.parametrize("use_muon", [True, False])
def test_weight_decay_spares_vectors(use_muon: bool) -> None:
    """Against torch.optim.AdamW with the groups written out."""
    ours, theirs = tiny.model(tie_embeddings=False), tiny.model(tie_embeddings=False)
    mine = MuonAdamW(ours, use_muon=use_muon, adamw_lr=1e-2, embedding_lr=2e-2, adamw_weight_decay=0.3)
    named = dict(theirs.named_parameters())
    outside = [p for name, p in named.items() if name in ("embed_tokens.weight", "lm_head.weight")]
    vectors = [p for p in named.values() if p.ndim == 1]
    body = [p for name, p in named.items() if name.startswith("layers.") and p.ndim == 2]
    groups: list[dict[str, Any]] = [
        {"params": outside, "lr": 2e-2, "weight_decay": 0.3},
        {"params": vectors, "lr": 1e-2, "weight_decay": 0.0},
    ]
    if not use_muon:
        groups.append({"params": body, "lr": 1e-2, "weight_decay": 0.3})
    other = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-10)
    for step in range(3):
        gradients(ours, step)
        gradients(theirs, step)
        mine.step()
        other.step()
    for name, parameter in ours.named_parameters():
        if not use_muon or not (name.startswith("layers.") and parameter.ndim == 2):
            torch.testing.assert_close(parameter, named[name], atol=1e-6, rtol=1e-5)


def test_rates_set_in_the_groups_are_used_also_after_loading() -> None:
    model = tiny.model()
    optimizer = MuonAdamW(model)
    other = MuonAdamW(model)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in (optimizer, other):
        assert [group["name"] for group in each.param_groups] == ["muon", "embedding", "vectors"]
        for group in each.param_groups:
            group["lr"] = 0.0
        before = [parameter.clone() for parameter in model.parameters()]
        gradients(model, 0)
        each.step()
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_state_of_another_kind_or_model_is_refused() -> None:
    model = tiny.model()
    state = MuonAdamW(model).state_dict()
    with pytest.raises(ValueError, match="another kind"):
        MuonAdamW(model, use_muon=False).load_state_dict(state)
    with pytest.raises(ValueError, match="doesn't match the size"):
        MuonAdamW(tiny.model(num_layers=1)).load_state_dict(state)


def test_zero_grad_and_closure_reach_every_parameter() -> None:
    model = tiny.model()
    optimizer = MuonAdamW(model)
    gradients(model, 0)
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())

    def closure() -> float:
        gradients(model, 1)
        return 4.5

    before = [parameter.clone() for parameter in model.parameters()]
    assert optimizer.step(closure) == 4.5
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
