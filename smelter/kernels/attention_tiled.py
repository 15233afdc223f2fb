"""Causal soft-capped attention on a CPU, a tile of scores at a time: `cpu/attention.cpp` as a PyTorch operation.

For bf16 where the processor multiplies it (AVX-512 BF16). Scores never leave the cache and stay in float32, which is
faster than blocks on a library's products (`blocked`), and nearer to the specification. The operation is opaque to
torch.compile.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from smelter.kernels import native
from smelter.kernels.soft_cap import is_bounded

BLOCK = 64
"""Head sizes must be multiples of it."""


def takes(q: Tensor) -> bool:
    """Whether the kernel computes attention of these queries [B, H, T, D]."""
    return q.dtype == torch.bfloat16 and q.shape[-1] % BLOCK == 0 and q.numel() > 0


def _call(name: str, tensors: list[Tensor | None], q: Tensor, num_kv_heads: int, cap: float, *more: int) -> None:
    library = native.library()
    if library is None:
        raise RuntimeError("the C++ kernels could not be compiled")
    batch, num_heads, length, dim = q.shape
    sizes = (batch, num_heads, num_kv_heads, length, dim, torch.get_num_threads())
    numbers = ctypes.c_float(dim**-0.5), ctypes.c_float(cap)
    getattr(library, name)(*map(native.address, tensors), *sizes, *numbers, *more)


@torch.library.custom_op("smelter::tiled_attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, docs: Tensor | None, cap: float) -> tuple[Tensor, Tensor]:
    """Output [B, H, T, D] and the float32 log of the sums of exponentials [B, H, T]."""
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
    needs_max = int(not is_bounded(cap))
    _call("smelter_attention_forward", [q, k, v, docs, out, lse], q, k.shape[1], cap, needs_max)
    return out, lse


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, docs: Tensor | None, cap: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("smelter::tiled_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, docs: Tensor | None, cap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    tensors = [grad.contiguous(), q, k, v, out, lse, docs, *grads]
    _call("smelter_attention_backward", tensors, q, k.shape[1], cap)
    return grads


@_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, docs: Tensor | None, cap: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, docs, ctx.cap = inputs
    ctx.save_for_backward(q, k, v, *output, docs)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, docs = ctx.saved_tensors
    return *_backward(grad, q, k, v, out, lse, docs, ctx.cap), None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def tiled_attention(q: Tensor, k: Tensor, v: Tensor, cap: float, docs: Tensor | None = None) -> Tensor:
    """`reference.attention` with the causal mask, within documents if `docs` [B, T] (int32) numbers them.

    q [B, H, T, D]; k, v [B, G, T, D], all bf16 with D a multiple of 64; cap 0 means none. Returns [B, H, T, D].
    """
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out: Tensor = _forward(q, k, v, None if docs is None else docs.contiguous(), cap)[0]
    return out
