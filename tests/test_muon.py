"""Muon against torch.optim.Muon, AdamW against torch.optim.AdamW, and the groups of both."""

import copy

import pytest
import tiny
import torch

from smelter.model import Model
from smelter.muon import AdjustLr, Muon, MuonAdamW, newton_schulz


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
