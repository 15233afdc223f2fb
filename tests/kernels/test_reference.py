"""The specification itself, against Transformers, PyTorch and plain autograd."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.integrations.bitnet import ActQuant, AutoBitLinear, WeightQuant
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from smelter.kernels import reference
from smelter.kernels.reference import BLOCK, quantize_activations, quantize_weight, ternary_linear

MODES = ("token", "block256", "none")
SEEDS = st.integers(0, 2**32 - 1)
MAGNITUDES = st.sampled_from([1e-9, 1e-6, 1e-3, 0.02, 1.0, 37.5, 1e4, 1e30])


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.fixture(autouse=True)
def _without_compiler() -> Any:
    """Transformers' quantisers are compiled; what they compute is what counts here."""
    with torch.compiler.set_stance("force_eager"):
        yield


def exact_scale_weight(rows: int, columns: int, seed: int) -> Tensor:
    """A weight whose mean magnitude, 4/64, bf16 holds exactly; ties at half the scale included."""
    assert rows * columns % 9 == 0
    generator = torch.Generator().manual_seed(seed)
    magnitudes = torch.arange(9.0).repeat(rows * columns // 9)[torch.randperm(rows * columns, generator=generator)]
    signs = torch.randint(0, 2, (rows * columns,), generator=generator) * 2.0 - 1
    return (magnitudes * signs).view(rows, columns) / 64


# --- quantisers ------------------------------------------------------------------------------------


@given(rows=st.integers(1, 33), columns=st.integers(1, 65), seed=SEEDS, scale=MAGNITUDES)
def test_weights_are_transformers_up_to_the_rounded_scale(rows: int, columns: int, seed: int, scale: float) -> None:
    weight = randn(rows, columns, seed=seed, scale=scale)
    trits, ours = quantize_weight(weight)
    exact = weight.abs().mean().clamp_min(1e-5)
    theirs = (WeightQuant.apply(weight) / exact).round()
    assert float((ours / exact - 1).abs()) <= 2**-8
    # |w| rounds to 1 above half of the scale: only between the two halves may the trits differ.
    low, high = sorted((float(ours) / 2, float(exact) / 2))
    between = (weight.abs() >= low * (1 - 1e-6)) & (weight.abs() <= high * (1 + 1e-6))
    assert torch.equal(trits[~between], theirs[~between])
    assert set(trits.unique().tolist()) <= {-1.0, 0.0, 1.0}


@pytest.mark.parametrize("seed", range(3))
def test_weights_are_transformers_where_bf16_holds_the_scale(seed: int) -> None:
    weight = exact_scale_weight(36, 30, seed)
    trits, scale = quantize_weight(weight)
    assert float(scale) == 4 / 64
    assert torch.equal(trits * scale, WeightQuant.apply(weight))
    assert float(trits[weight.abs() == 2 / 64].abs().max()) == 0  # ties round to even


@given(rows=st.integers(1, 8), columns=st.integers(1, 300), seed=SEEDS, scale=MAGNITUDES)
def test_activations_are_transformers(rows: int, columns: int, seed: int, scale: float) -> None:
    x = randn(rows, columns, seed=seed, scale=scale)
    q, q_scale = quantize_activations(x)
    assert torch.equal(q, q.round())
    assert float(q.abs().max()) <= 127
    factor = 127 / x.abs().amax(-1, keepdim=True).clamp_min(1e-5)
    tie = ((x * factor) % 1 - 0.5).abs() < 1e-4  # where the last bit of the division decides
    torch.testing.assert_close((q * q_scale)[~tie], ActQuant.apply(x)[~tie], rtol=1e-6, atol=0)
    # The largest of each token is kept, and nothing is further off than half a step.
    if float(x.abs().amax(-1).min()) > 1e-5:
        assert bool((q.abs().amax(-1) == 127).all())
    assert bool(((q * q_scale - x).abs() <= q_scale * 0.5001).all())


@given(rows=st.integers(1, 4), blocks=st.integers(1, 3), seed=SEEDS)
def test_a_block_is_a_token_of_256(rows: int, blocks: int, seed: int) -> None:
    x = randn(rows, blocks * BLOCK, seed=seed) * torch.logspace(-3, 2, blocks * BLOCK)
    q, scale = quantize_activations(x, BLOCK)
    apart, apart_scale = quantize_activations(x.view(rows * blocks, BLOCK))
    assert torch.equal(q.view(rows * blocks, BLOCK), apart)
    assert torch.equal(scale.view(rows * blocks, 1), apart_scale)


@given(scale=st.floats(1e-12, 6e4), seed=SEEDS)
def test_every_file_format_holds_the_scale(scale: float, seed: int) -> None:
    _, rounded = quantize_weight(randn(16, 16, seed=seed).clamp(-1, 1) * scale)
    assert float(rounded) >= 1e-5 * (1 - 2**-8)
    for dtype in (torch.bfloat16, torch.float16):
        assert float(rounded.to(dtype)) == float(rounded)


@pytest.mark.parametrize("weight", [torch.zeros(5, 3), torch.full((4, 4), 1e-30)])
def test_vanishing_weights_become_zeros(weight: Tensor) -> None:
    trits, scale = quantize_weight(weight)
    assert float(trits.abs().max()) == 0
    assert float(scale) == pytest.approx(1e-5, rel=2**-8)


def test_latent_weights_of_any_dtype_are_quantised_in_float32() -> None:
    weight = randn(40, 24).bfloat16()
    for got, want in zip(quantize_weight(weight), quantize_weight(weight.float()), strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, want)


# --- the layer -------------------------------------------------------------------------------------


def explicit(x: Tensor, weight: Tensor, mode: str) -> Tensor:
    """The layer with straight-through quantisers written as x + (quantised - x).detach()."""
    trits, scale = quantize_weight(weight.detach())
    weight = weight + (trits * scale - weight).detach()
    if mode != "none":
        values = x.detach().unflatten(-1, (-1, BLOCK)) if mode == "block256" else x.detach()
        step = values.abs().amax(-1, keepdim=True).clamp_min(1e-5) / 127
        quantised = ((values / step).round() * step).reshape(x.shape)
        x = x + (quantised - x).detach()
    return x @ weight.T


def layer(x: Tensor, weight: Tensor, mode: str) -> Tensor:
    trits, scale = quantize_weight(weight.detach())
    return ternary_linear(x, weight, trits.to(x.dtype), scale, mode)


def value_and_gradients(function: Any, x: Tensor, weight: Tensor, mode: str) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y: Tensor = function(x, weight, mode)
    grad_x, grad_weight = torch.autograd.grad(y, (x, weight), randn(*y.shape, seed=9).to(y.dtype))
    return y.detach(), grad_x, grad_weight


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(256,), (1, 256), (7, 512), (2, 3, 256), (0, 256), (2, 0, 256)])
def test_gradients_are_straight_through(mode: str, shape: tuple[int, ...]) -> None:
    x, weight = randn(*shape), randn(33, shape[-1], seed=1, scale=0.05)
    for got, want in zip(
        value_and_gradients(layer, x, weight, mode), value_and_gradients(explicit, x, weight, mode), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_value_and_gradients_are_transformers() -> None:
    weight = exact_scale_weight(36, 30, 0)
    theirs = AutoBitLinear(30, 36, bias=False, online_quant=True)
    with torch.no_grad():
        theirs.weight.copy_(weight)
    x = randn(11, 30).requires_grad_()
    y = theirs(x)
    expected = y.detach(), *torch.autograd.grad(y, (x, theirs.weight), randn(11, 36, seed=9))
    for got, want in zip(value_and_gradients(layer, x.detach(), weight, "token"), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@given(
    rows=st.integers(1, 5), columns=st.integers(1, 70), out=st.integers(1, 40), seed=SEEDS, mode=st.sampled_from(MODES)
)
@settings(max_examples=40)
def test_any_shape(rows: int, columns: int, out: int, seed: int, mode: str) -> None:
    columns = columns if mode != "block256" else BLOCK * (1 + columns % 2)
    x, weight = randn(rows, columns, seed=seed), randn(out, columns, seed=seed + 1)
    for got, want in zip(
        value_and_gradients(layer, x, weight, mode), value_and_gradients(explicit, x, weight, mode), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 1.5e-3)])
def test_half_precision_is_near_float32(mode: str, dtype: torch.dtype, tolerance: float) -> None:
    x, weight = randn(64, 512).to(dtype), randn(96, 512, seed=1, scale=0.05)
    half = value_and_gradients(layer, x, weight, mode)
    assert half[0].dtype == half[1].dtype == dtype
    assert half[2].dtype == torch.float32
    for got, want in zip(half, value_and_gradients(layer, x.float(), weight, mode), strict=True):
        assert float((got.float() - want).norm() / want.norm()) < tolerance


@pytest.mark.parametrize("mode", ["token", "block256"])
def test_fp16_does_not_overflow(mode: str) -> None:
    """2,048 products of 127 and 1 add up to 260,096, four times what fp16 holds."""
    x = torch.full((3, 2_048), 6e4, dtype=torch.float16)
    weight = torch.full((4, 2_048), 1e-4)
    y, grad_x, grad_weight = value_and_gradients(layer, x, weight, mode)
    expected = 6e4 * 2_048 * float(quantize_weight(weight)[1])
    torch.testing.assert_close(y.float(), torch.full((3, 4), expected), rtol=2e-3, atol=0)
    assert bool(grad_x.isfinite().all())
    assert grad_weight.shape == weight.shape


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zeros_give_zeros(mode: str, dtype: torch.dtype) -> None:
    x, weight = randn(3, 256).to(dtype), randn(5, 256, seed=1)
    y, _, grad_weight = value_and_gradients(layer, torch.zeros_like(x), weight, mode)
    assert float(y.abs().max()) == 0
    assert float(grad_weight.abs().max()) == 0
    y, grad_x, grad_weight = value_and_gradients(layer, x, torch.zeros_like(weight), mode)
    assert float(y.abs().max()) == 0
    assert float(grad_x.abs().max()) == 0
    assert float(grad_weight.abs().max()) > 0  # a dead weight can come back


# --- the rest --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_is_pytorchs_and_transformers(dtype: torch.dtype) -> None:
    x, gain = (randn(2, 5, 64) * 3).to(dtype), 1 + randn(64, seed=1)
    ours = reference.rms_norm(x, gain, 1e-6)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, F.rms_norm(x.float(), (64,), gain, 1e-6).to(dtype))
    theirs = Qwen3RMSNorm(64, eps=1e-6)
    theirs.weight.data.copy_(gain)
    torch.testing.assert_close(ours.float(), theirs(x).float(), rtol=1e-2 if dtype == torch.bfloat16 else 2e-3, atol=0)


def test_rotation_is_transformers() -> None:
    q, k = randn(2, 4, 9, 16), randn(2, 2, 9, 16, seed=1)
    angles = torch.outer(torch.arange(9.0), 100.0 ** -(torch.arange(8.0) / 8)).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    expected = apply_rotary_pos_emb(q, k, cos[None], sin[None])
    torch.testing.assert_close(reference.rotate(q, cos, sin), expected[0])
    torch.testing.assert_close(reference.rotate(k, cos[None, None], sin[None, None]), expected[1])


@given(cap=st.floats(0.5, 100), seed=SEEDS)
@settings(max_examples=25)
def test_soft_cap_bounds_and_is_the_identity_near_zero(cap: float, seed: int) -> None:
    x = randn(50, seed=seed, scale=1e3)
    assert float(reference.soft_cap(x, cap).abs().max()) <= cap * (1 + 1e-6)
    small = x / x.abs().max() * cap * 1e-3
    torch.testing.assert_close(reference.soft_cap(small, cap), small, rtol=1e-5, atol=1e-7)
    assert reference.soft_cap(x, 0.0) is x


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_without_cap_is_pytorchs(groups: int, dtype: torch.dtype) -> None:
    q = randn(2, 4, 11, 16).to(dtype)
    k, v = (randn(2, groups, 11, 16, seed=seed).to(dtype) for seed in (1, 2))
    docs = torch.tensor([[0] * 4 + [1] * 7, [0] * 11])
    for doc_ids in (None, docs):
        mask = reference.causal_mask(doc_ids, 11, q.device)
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(reference.attention(q, k, v, mask, 0.0), expected, rtol=tolerance, atol=tolerance)


@given(docs=st.lists(st.integers(0, 2), min_size=1, max_size=12))
@settings(max_examples=25)
def test_document_mask_sees_earlier_tokens_of_the_same_document(docs: list[int]) -> None:
    mask = reference.causal_mask(torch.tensor([docs]), len(docs), torch.device("cpu"))
    expected = [[j <= i and docs[i] == docs[j] for j in range(len(docs))] for i in range(len(docs))]
    assert mask[0, 0].tolist() == expected
