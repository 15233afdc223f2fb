"""Layers computed together give what the specification gives for each, forward and backward, int8 or not."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from smelter import bitnet
from smelter.kernels import linear as ternary
from smelter.kernels import reference

MODES = ("token", "block256", "none")


def case(
    rows: tuple[int, ...], outputs: tuple[int, ...], inputs: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*rows, inputs, generator=generator).to(dtype)
    weights = [torch.randn(n, inputs, generator=generator) * (i + 1) for i, n in enumerate(outputs)]
    quantised = [reference.quantize_weight(weight) for weight in weights]
    return x, weights, [t.to(dtype) for t, _ in quantised], [scale for _, scale in quantised]


def run(together: bool, x: Tensor, weights: list[Tensor], *rest: Any) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Outputs, gradient of x, gradients of the weights, for one fixed gradient of the outputs."""
    x = x.clone().requires_grad_()
    weights = [weight.clone().requires_grad_() for weight in weights]
    trits, scales, mode = rest
    if together:
        outputs = list(ternary.ternary_linears(x, weights, trits, scales, mode))
    else:
        triples = zip(weights, trits, scales, strict=True)
        outputs = [reference.ternary_linear(x, w, t, s, mode) for w, t, s in triples]
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in outputs]
    grad_x, *grad_weights = torch.autograd.grad(outputs, [x, *weights], grads)
    return [y.detach() for y in outputs], grad_x, list(grad_weights)


@pytest.mark.parametrize("use_int8", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [(1,), (3, 7), (64,), (2, 33), (0,)])
@pytest.mark.parametrize("outputs", [(5,), (16, 8, 8), (3, 129)])
def test_together_is_each_apart(
    use_int8: bool, mode: str, rows: tuple[int, ...], outputs: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ternary, "int8_product", lambda device: "cpu" if use_int8 else "none")
    x, *rest = case(rows, outputs, 256, torch.float32)
    for got, want in zip(run(True, x, *rest, mode), run(False, x, *rest, mode), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6 * 256)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_float32_as_the_specification(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ternary, "int8_product", lambda device: "cpu")
    x, weights, trits, scales = case((96,), (40, 24), 128, dtype)
    exact = run(False, x.float(), weights, [t.float() for t in trits], scales, "token")
    ours, spec = (run(together, x, weights, trits, scales, "token") for together in (True, False))
    for i in range(3):
        flat: list[Tensor] = [
            torch.cat([t.float().flatten() for t in (part if isinstance(part, list) else [part])])
            for part in (ours[i], spec[i], exact[i])
        ]
        error, allowed = (flat[0] - flat[2]).norm(), (flat[1] - flat[2]).norm()
        assert float(error) <= 1.2 * float(allowed) + 1e-6


@given(rows=st.integers(32, 80), outputs=st.integers(1, 70), inputs=st.integers(1, 300), seed=st.integers(0, 2**32 - 1))
def test_int8_products_are_exact(rows: int, outputs: int, inputs: int, seed: int) -> None:
    x, weights, trits, scales = case((rows,), (outputs,), inputs, torch.float32, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ternary, "int8_product", lambda device: "cpu")
        (got,) = ternary.ternary_linears(x, weights, trits, scales, "token")
    (want,) = (reference.ternary_linear(x, weights[0], trits[0], scales[0], "token"),)
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e4])
def test_the_norm_within_is_the_norm_before(dtype: torch.dtype, mode: str, scale: float) -> None:
    x, weights, trits, scales = case((3, 40), (24, 8), 256, dtype)
    x, norm = x * scale, torch.rand(256) + 0.5
    found = []
    for is_within in (True, False):
        inputs = [tensor.clone().requires_grad_() for tensor in (x, norm, *weights)]
        if is_within:
            outputs = ternary.ternary_linears(inputs[0], inputs[2:], trits, scales, mode, norm=inputs[1], eps=1e-6)
        else:
            normed = reference.rms_norm(inputs[0], inputs[1], 1e-6)
            outputs = ternary.ternary_linears(normed, inputs[2:], trits, scales, mode)
        generator = torch.Generator().manual_seed(1)
        grads = [torch.randn(y.shape, generator=generator).to(dtype) for y in outputs]
        found.append([*outputs, *torch.autograd.grad(outputs, inputs, grads)])
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for index, (got, want) in enumerate(zip(*found, strict=True)):
        if index < len(weights):
            assert torch.equal(got, want)
        assert (got.float() - want.float()).norm() <= tolerance * want.float().norm()


def test_one_layer_is_a_bit_linear() -> None:
    torch.manual_seed(0)
    layers = [bitnet.BitLinear(64, n) for n in (32, 16)]
    for layer in layers:
        layer.weight.data.normal_()
        layer.quantize(torch.float32)
    x = torch.randn(5, 64)
    for together, layer in zip(bitnet.apply_together(x, layers), layers, strict=True):
        assert torch.equal(together, layer(x))
    full = [bitnet.BitLinear(64, n, use_ternary=False) for n in (32, 16)]
    for layer in full:
        layer.weight.data.normal_()
    for together, layer in zip(bitnet.apply_together(x, full), full, strict=True):
        assert torch.equal(together, x @ layer.weight.T)


@pytest.mark.parametrize("use_int8", [False, True])
@pytest.mark.parametrize("magnitude", [1.0, 1e-9, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_gradients_are_rounded_per_token_and_the_weights_gradients_are_not(
    use_int8: bool, magnitude: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ternary, "int8_product", lambda device: "cpu" if use_int8 else "none")
    x, weights, trits, scales = case((2, 33), (16, 8, 8), 256, dtype)
    generator = torch.Generator().manual_seed(1)
    grads = [magnitude * torch.randn(2, 33, n, generator=generator).to(dtype) for n in (16, 8, 8)]
    grads[0][0, 0], grads[1][0, 0], grads[2][0, 0] = 0.0, 0.0, 0.0  # a token without any

    def gradients(int8_gradients: bool) -> tuple[Tensor, ...]:
        leaves = [tensor.clone().requires_grad_() for tensor in (x, *weights)]
        outputs = ternary.ternary_linears(leaves[0], leaves[1:], trits, scales, "token", int8_gradients=int8_gradients)
        return torch.autograd.grad(list(outputs), leaves, grads)

    rounded, plain = gradients(True), gradients(False)
    scaled = torch.cat([grad.float() * scale for grad, scale in zip(grads, scales, strict=True)], dim=-1)
    q, row_scale = reference.quantize_gradients(scaled)
    assert q.abs().amax(dim=-1).flatten()[1:].eq(127).all()
    want = ((q @ torch.cat(trits).float()) * row_scale).to(dtype)  # sums of integers, exact
    torch.testing.assert_close(rounded[0], want, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=0.0)
    assert 0 < (rounded[0].float() - plain[0].float()).norm() < 0.01 * plain[0].float().norm()
    assert all(torch.equal(a, b) for a, b in zip(rounded[1:], plain[1:], strict=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
def test_int8_gradients_compile() -> None:
    x, weights, trits, scales = case((64,), (16, 8), 256, torch.bfloat16)
    x.requires_grad_()

    def grad_x(compiled: bool) -> Tensor:
        call = torch.compile(ternary.ternary_linears) if compiled else ternary.ternary_linears
        first, second = call(x, weights, [t.to(torch.int8) for t in trits], scales, "token", int8_gradients=True)
        return torch.autograd.grad((first.float() ** 2).sum() + second.float().sum(), x)[0]

    torch.testing.assert_close(grad_x(True), grad_x(False), rtol=2e-2, atol=1e-3)
