"""Attention in blocks of queries gives what the specification gives, forward and backward, compiled or not."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smelter.kernels import attention_blocked as blocked
from smelter.kernels import reference, soft_cap
from smelter.kernels.attention_blocked import capped_attention

Heads = tuple[Tensor, Tensor, Tensor]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def heads(batch: int, num_heads: int, num_kv_heads: int, length: int, dim: int, seed: int = 0) -> Heads:
    """Queries, keys and values with their tokens before their heads, as the projections give them."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(batch, length, n, dim, generator=generator).transpose(1, 2)
        for n in (num_heads, num_kv_heads, num_kv_heads)
    )
    return q, k, v


def documents(batch: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(batch, length, generator=generator) < 0.1).cumsum(1).to(torch.int32)


def with_gradients(attend: Attend, tensors: Heads) -> list[Tensor]:
    """Output and gradients for one fixed gradient of the output."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = attend(*leaves)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def specified(cap: float, docs: Tensor | None) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.attention(q, k, v, reference.causal_mask(docs, q.shape[2], q.device), cap)

    return attend


def ours(cap: float, docs: Tensor | None) -> Attend:
    return lambda q, k, v: capped_attention(q, k, v, cap, docs)


@pytest.mark.parametrize("length", [1, 5, 128, 129, 300])
@pytest.mark.parametrize("cap", [0.0, 2.0, 50.0, 100.0])
@pytest.mark.parametrize("in_documents", [False, True])
def test_equals_the_specification(length: int, cap: float, in_documents: bool) -> None:
    tensors = heads(2, 4, 2, length, 8)
    docs = documents(2, length) if in_documents else None
    for got, want in zip(
        with_gradients(ours(cap, docs), tensors), with_gradients(specified(cap, docs), tensors), strict=True
    ):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@given(
    batch=st.integers(1, 2),
    groups=st.integers(1, 3),
    per_group=st.integers(1, 3),
    length=st.integers(1, 40),
    half_dim=st.integers(1, 6),
    block=st.integers(1, 9),
    max_blocks=st.integers(1, 50),
    cap=st.sampled_from([0.0, 1.5, 70.0]),
    in_documents=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_blocks_of_any_size(
    batch: int,
    groups: int,
    per_group: int,
    length: int,
    half_dim: int,
    block: int,
    max_blocks: int,
    cap: float,
    in_documents: bool,
) -> None:
    tensors = heads(batch, groups * per_group, groups, length, 2 * half_dim, length)
    docs = documents(batch, length) if in_documents else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocked, "MIN_BLOCK", block)
        patch.setattr(blocked, "MAX_BLOCKS", max_blocks)
        got = with_gradients(ours(cap, docs), tensors)
    for ours_, want in zip(got, with_gradients(specified(cap, docs), tensors), strict=True):
        torch.testing.assert_close(ours_, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 30.0, 100.0])
@pytest.mark.parametrize("cap", [0.0, 50.0, 60.0, 61.0])
def test_logits_of_any_size(scale: float, cap: float) -> None:
    """Zeros, ties, and logits far into the cap's flat part or, without one, far beyond what exp can hold."""
    q, k, v = heads(1, 2, 1, 40, 8)
    tensors = (q * scale, k * scale, v)
    for got, want in zip(
        with_gradients(ours(cap, None), tensors), with_gradients(specified(cap, None), tensors), strict=True
    ):
        assert torch.isfinite(got).all()
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cap", [0.0, 50.0])
def test_sixteen_bits_are_as_near_to_float32_as_the_specification(dtype: torch.dtype, cap: float) -> None:
    exact = heads(2, 6, 2, 300, 32)
    exact = (exact[0] * 3, exact[1], exact[2])
    q, k, v = (tensor.to(dtype) for tensor in exact)
    want = with_gradients(specified(cap, None), (q.float(), k.float(), v.float()))
    got, spec = (with_gradients(attend(cap, None), (q, k, v)) for attend in (ours, specified))
    for a, b, truth in zip(got, spec, want, strict=True):
        assert (a.float() - truth).norm() <= 1.3 * (b.float() - truth).norm() + 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_is_the_same(dtype: torch.dtype) -> None:
    docs = documents(2, 300)
    q, k, v = (tensor.to(dtype) for tensor in heads(2, 4, 2, 300, 16))
    for where in (None, docs):
        attend = ours(50.0, where)
        plain = with_gradients(attend, (q, k, v))
        compiled = with_gradients(torch.compile(attend), (q, k, v))
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        for got, want in zip(compiled, plain, strict=True):
            assert (got.float() - want.float()).norm() <= tolerance * want.float().norm()


def test_is_a_well_formed_operation() -> None:
    q, k, v = (tensor.contiguous().requires_grad_() for tensor in heads(1, 4, 2, 20, 8))
    torch.library.opcheck(torch.ops.smelter.capped_attention.default, (q, k, v, None, 50.0, False))
    torch.library.opcheck(torch.ops.smelter.capped_attention.default, (q, k, v, documents(1, 20), 0.0, False))


def test_nothing_of_the_whole_score_matrix_is_kept() -> None:
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    q, k, v = (tensor.requires_grad_() for tensor in heads(1, 2, 1, 512, 8))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        capped_attention(q, k, v, 50.0)
    assert max(kept) <= q.numel()


def test_the_polynomials_are_as_near_as_they_say() -> None:
    x = torch.linspace(-20, 20, 100_001, dtype=torch.float64)
    assert (soft_cap.rational_tanh(x) - x.tanh()).abs().max() < 1e-4
    x = torch.linspace(-soft_cap.MAX_EXPONENT, soft_cap.MAX_EXPONENT, 100_001)
    assert (soft_cap.power_exp(x).double() / x.double().exp() - 1).abs().max() < 2e-3
