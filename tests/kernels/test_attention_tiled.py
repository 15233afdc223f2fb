"""The CPU's own attention gives what the specification gives, forward and backward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smelter.kernels import operations
from smelter.kernels.attention_tiled import BLOCK, takes, tiled_attention
from smelter.kernels.capability import capability, cpu_has_tiles
from tests.kernels.test_attention_blocked import Heads, documents, heads, specified, with_gradients

needs_tiles = pytest.mark.skipif(not cpu_has_tiles(), reason="no AVX-512 BF16, or no C++ compiler")


def in_bf16(tensors: Heads, scale: float = 1.0) -> Heads:
    q, k, v = tensors
    return (q * scale).bfloat16(), k.bfloat16(), v.bfloat16()


def check(tensors: Heads, cap: float, docs: Tensor | None, more: float = 0.0) -> None:
    """About as near to float32 as the specification in bf16 is, give or take two roundings; or `more`, relatively.

    The gradients of queries and keys are differences of larger terms: how large, those of the values tell.
    """
    q, k, v = tensors
    exact = with_gradients(specified(cap, docs), (q.float(), k.float(), v.float()))
    spec = with_gradients(specified(cap, docs), tensors)
    got = with_gradients(lambda q, k, v: tiled_attention(q, k, v, cap, docs), tensors)
    terms = max(truth.norm() for truth in exact)
    for ours, theirs, truth in zip(got, spec, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        assert ours.shape == truth.shape
        allowed = 1.05 * (theirs.float() - truth).norm() + 2**-8 * terms + more * truth.norm() + 1e-6
        assert (ours.float() - truth).norm() <= allowed


@needs_tiles
@pytest.mark.parametrize("cap", [0.0, 50.0])
def test_is_nearer_to_float32_than_the_specification_in_bf16(cap: float) -> None:
    tensors = in_bf16(heads(2, 6, 2, 300, 64), 3.0)
    exact = with_gradients(specified(cap, None), tuple(tensor.float() for tensor in tensors))  # type: ignore[arg-type]
    spec = with_gradients(specified(cap, None), tensors)
    got = with_gradients(lambda q, k, v: tiled_attention(q, k, v, cap), tensors)
    for ours, theirs, truth in zip(got, spec, exact, strict=True):
        assert (ours.float() - truth).norm() < (theirs.float() - truth).norm() < 0.02 * truth.norm()


@needs_tiles
@pytest.mark.parametrize("length", [1, 63, 64, 65, 300])
@pytest.mark.parametrize("cap", [0.0, 2.0, 50.0, 100.0])
@pytest.mark.parametrize("in_documents", [False, True])
def test_equals_the_specification(length: int, cap: float, in_documents: bool) -> None:
    check(in_bf16(heads(2, 4, 2, length, 64)), cap, documents(2, length) if in_documents else None)


@needs_tiles
@given(
    batch=st.integers(1, 2),
    groups=st.integers(1, 3),
    per_group=st.integers(1, 3),
    length=st.integers(1, 200),
    blocks=st.integers(1, 3),
    cap=st.sampled_from([0.0, 1.5, 60.0, 70.0]),
    in_documents=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_any_shape(
    batch: int, groups: int, per_group: int, length: int, blocks: int, cap: float, in_documents: bool
) -> None:
    tensors = in_bf16(heads(batch, groups * per_group, groups, length, BLOCK * blocks, length))
    check(tensors, cap, documents(batch, length) if in_documents else None)


@needs_tiles
@pytest.mark.parametrize("scale", [0.0, 1e-3, 30.0, 1000.0])
@pytest.mark.parametrize("cap", [0.0, 50.0, 61.0])
def test_logits_of_any_size(scale: float, cap: float) -> None:
    """Zeros, ties, and logits far into the cap's flat part or, without one, far beyond what exp can hold."""
    # Where nearly every logit is at the cap, the slope is what tanh is off by.
    check(in_bf16(heads(1, 2, 1, 140, 64), scale), cap, None, 0.02 if scale == 1000.0 else 0.0)


@needs_tiles
def test_documents_in_any_order() -> None:
    """Blocks are left out by the numbers in them, which need not rise, or may return."""
    docs = torch.tensor([3, 1, 3, 2, 1], dtype=torch.int32).repeat_interleave(50)[None]
    check(in_bf16(heads(1, 2, 1, 250, 64)), 50.0, docs)


@needs_tiles
def test_what_is_hidden_has_no_effect() -> None:
    q, k, v = in_bf16(heads(1, 2, 1, 200, 64))
    first = tiled_attention(q, k, v, 50.0)
    k[:, :, 150:], v[:, :, 150:] = 100.0, -100.0
    assert torch.equal(tiled_attention(q, k, v, 50.0)[:, :, :150], first[:, :, :150])


@needs_tiles
@pytest.mark.parametrize("cap", [0.0, 50.0])
def test_the_same_numbers_on_any_number_of_threads(cap: float) -> None:
    tensors = in_bf16(heads(2, 6, 2, 200, 64))
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(with_gradients(lambda q, k, v: tiled_attention(q, k, v, cap), tensors))
    finally:
        torch.set_num_threads(threads)
    for got in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(got, results[0], strict=True))


@needs_tiles
def test_is_a_well_formed_operation() -> None:
    q, k, v = (tensor.contiguous().requires_grad_() for tensor in in_bf16(heads(1, 4, 2, 20, 64)))
    torch.library.opcheck(torch.ops.smelter.tiled_attention.default, (q, k, v, None, 50.0))
    torch.library.opcheck(torch.ops.smelter.tiled_attention.default, (q, k, v, documents(1, 20), 0.0))


@needs_tiles
def test_the_model_takes_it_for_bf16_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.dtype] = []

    def counted(q: Tensor, *rest: Tensor) -> Tensor:
        calls.append(q.dtype)
        return q

    monkeypatch.setattr(operations, "tiled_attention", counted)
    tensors = heads(1, 2, 1, 10, 64)
    assert "attention in tiles" in capability(torch.device("cpu")).describe()
    for q, k, v in (tensors, in_bf16(tensors), in_bf16(heads(1, 2, 1, 10, 32))):
        operations.attention(q, k, v, 50.0, mask=None, docs=None)
    assert calls == [torch.bfloat16]
    assert not takes(torch.empty(1, 2, 0, 64, dtype=torch.bfloat16))
