"""Causal soft-capped attention in blocks of queries: only the matrix products and one pass over the scores.

The idea is FlashAttention's (Dao et al., arXiv 2205.14135), made simpler by the cap (Gemma 2, arXiv 2408.00118):
capped logits lie in [-cap, cap], so their exponentials neither overflow nor vanish in float32 and no maximum is
needed. A block of queries multiplies the keys up to its own end (what lies to the right is never computed), one fused
pass turns scores into exponentials and their sums, and a second product reads the values. The backward pass makes the
scores again, so nothing of size T x T is kept.

Query heads that share a key head are stacked in one product, so keys are never repeated. The products go to the
library (oneDNN, cuBLAS): this is also the path for Turing GPUs, whose tensor cores Triton cannot reach. The operation
is opaque to torch.compile, which would else merge the second making of the scores with the first and keep them.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from smelter.kernels.soft_cap import COMPILER_OPTIONS, capped, capped_exp, is_bounded

MIN_BLOCK = 128
MAX_BLOCKS = 16
"""Fewer, larger blocks multiply faster; smaller ones multiply less that is hidden."""

Docs = tuple[Tensor, Tensor]
"""Numbers of the documents that queries [B, n] and keys [B, end] belong to."""


def _visible(scores: Tensor, docs: Docs | None) -> Tensor:
    """Which keys each query may see: [n, end], or [B, 1, 1, n, end] with documents; the last n are its own block."""
    n, end = scores.shape[-2:]
    # 32-bit positions: the compiler's vector code for 64-bit ones is slow.
    positions = torch.arange(end, dtype=torch.int32, device=scores.device)
    visible = positions <= positions[end - n :, None]
    if docs is None:
        return visible
    rows, columns = docs
    return visible & (rows.unsqueeze(-1) == columns.unsqueeze(-2))[:, None, None]


def _exponentials(scores: Tensor, docs: Docs | None, scale: float, cap: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """exp of the logits [B, G, R, n, end] in the scores' dtype, and float32 sums and maxima [B, G, R, n].

    Without a maximum where the cap makes it needless; fp16 cannot hold exp(50), so it always needs one.
    """
    logits, _ = capped(scores, cap, scale)
    visible = _visible(scores, docs)
    highest = None
    if not is_bounded(cap) or scores.dtype == torch.float16:
        highest = torch.where(visible, logits, float("-inf")).amax(-1)
        logits = logits - highest.unsqueeze(-1)
    e = torch.exp(logits) if highest is not None else capped_exp(logits, cap, scores.dtype)
    e = torch.where(visible, e, 0.0)
    return e.to(scores.dtype), e.sum(-1), highest


def _score_gradients(
    scores: Tensor, grads: Tensor, norm: Tensor, delta: Tensor, docs: Docs | None, scale: float, cap: float
) -> None:
    """Replaces the scores [B, G, R, n, end] by the softmax weights, and the weights' gradients by the scores'.

    norm and delta [B, G, R, n]: 1 / the sum of exponentials if the cap bounds them, else its logarithm; and the sums
    over D of output times its gradient.
    """
    logits, slope = capped(scores, cap, scale)
    if is_bounded(cap):
        # A factor of its own, since what the cap bounds is the logit, not its distance to the sum's logarithm.
        weights = capped_exp(logits, cap, scores.dtype) * norm.unsqueeze(-1)
    else:
        weights = torch.exp(logits - norm.unsqueeze(-1))
    weights = torch.where(_visible(scores, docs), weights, 0.0)
    grad = weights * (grads.float() - delta.unsqueeze(-1)) * (slope * scale)
    scores.copy_(weights)
    grads.copy_(grad)


@functools.cache
def _pass_over_scores(function: Callable[..., Any], scale: float, cap: float, use_compile: bool) -> Callable[..., Any]:
    """`function` with its numbers filled in."""
    filled = functools.partial(function, scale=scale, cap=cap)
    return torch.compile(filled, options=COMPILER_OPTIONS) if use_compile else filled


def _shaped(scores: Tensor, batch: int, num_kv_heads: int, size: int) -> Tensor:
    """Scores [B * G, R * n, end] as [B, G, R, n, end]."""
    view = scores.view(batch, num_kv_heads, -1, size, scores.shape[-1])
    # The number of keys differs from block to block: the compiler is to make one program for all.
    torch._dynamo.maybe_mark_dynamic(view, 4)
    return view


def _add(grad_k: Tensor, grad_v: Tensor, more_k: Tensor, more_v: Tensor) -> None:
    """Adds 16-bit gradients to float32 ones, without the copy that PyTorch makes of the former."""
    grad_k.add_(more_k)
    grad_v.add_(more_v)


@functools.cache
def _add_compiled() -> Callable[..., None]:
    return torch.compile(_add, dynamic=True)


def _block_size(length: int) -> int:
    return min(length, max(MIN_BLOCK, -(-length // MAX_BLOCKS)))


def _blocks(length: int, docs: Tensor | None) -> Iterator[tuple[slice, slice, Docs | None]]:
    """Query rows, key rows and the documents of both, for each block.

    The last comes first: it is the general case to the compiler, which then makes one program for it and the others.
    """
    size = _block_size(length)
    for start in reversed(range(0, length, size)):
        end = min(start + size, length)
        queries, keys = slice(start, end), slice(0, end)
        yield queries, keys, None if docs is None else (docs[:, queries], docs[:, keys])


def _products_buffer(q: Tensor) -> Tensor:
    """Room for the scores of the largest block: the same for all, so that it stays in the cache."""
    return q.new_empty(q.shape[0] * q.shape[1] * _block_size(q.shape[2]) * q.shape[2])


def _product(buffer: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """left [N, a, D] times right [N, b, D] transposed, [N, a, b], in the buffer."""
    shape = (left.shape[0], left.shape[1], right.shape[1])
    product: Tensor = torch.bmm(left, right.mT, out=buffer[: math.prod(shape)].view(shape))
    return product


def _stack(heads: Tensor, num_kv_heads: int, rows: slice) -> Tensor:
    """Rows of heads [B, H, T, D], those that share keys after one another: [B * G, R * n, D]."""
    stacked: Tensor = heads[:, :, rows].unflatten(1, (num_kv_heads, -1))  # [B, G, R, n, D]
    return stacked.flatten(2, 3).flatten(0, 1)


@torch.library.custom_op("smelter::capped_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, docs: Tensor | None, cap: float, use_compile: bool
) -> tuple[Tensor, Tensor]:
    """Output [B, H, T, D] and the float32 log of the sums of exponentials [B, H, T]."""
    batch, num_heads, length, dim = q.shape
    num_kv_heads = k.shape[1]
    keys, values = k.flatten(0, 1), v.flatten(0, 1)  # [B * G, T, D]
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
    exponentials = _pass_over_scores(_exponentials, dim**-0.5, cap, use_compile)
    buffer = _products_buffer(q)
    for rows, seen, documents in _blocks(length, docs):
        size = rows.stop - rows.start
        keys_seen, values_seen = keys[:, seen].contiguous(), values[:, seen].contiguous()
        scores = _product(buffer, _stack(q, num_kv_heads, rows), keys_seen)
        e, total, highest = exponentials(_shaped(scores, batch, num_kv_heads, size), documents)
        block = torch.bmm(e.view(scores.shape), values_seen).view(batch, num_heads, size, dim)
        out[:, :, rows] = block / total.view(batch, num_heads, size, 1)
        logs = total.log() if highest is None else total.log() + highest.view(total.shape)
        lse[:, :, rows] = logs.view(batch, num_heads, size)
    return out, lse


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, docs: Tensor | None, cap: float, use_compile: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("smelter::capped_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    docs: Tensor | None,
    cap: float,
    use_compile: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    batch, num_heads, length, dim = q.shape
    num_kv_heads = k.shape[1]
    keys, values = k.flatten(0, 1), v.flatten(0, 1)
    grad_q = torch.empty_like(q)
    # Transposed, [B * G, D, T]: the library is faster with the short side first.
    grad_k = torch.zeros(keys.mT.shape, dtype=torch.float32, device=k.device)
    grad_v = torch.zeros_like(grad_k)
    norms = torch.exp(-lse) if is_bounded(cap) else lse
    deltas = (grad.float() * out.float()).sum(-1)  # [B, H, T]
    gradients = _pass_over_scores(_score_gradients, dim**-0.5, cap, use_compile)
    add = _add_compiled() if use_compile else _add
    buffers = _products_buffer(q), _products_buffer(q)
    for rows, seen, documents in _blocks(length, docs):
        size = rows.stop - rows.start
        keys_seen, values_seen = keys[:, seen].contiguous(), values[:, seen].contiguous()
        queries, grads = _stack(q, num_kv_heads, rows), _stack(grad, num_kv_heads, rows)
        scores = _product(buffers[0], queries, keys_seen)
        grad_scores = _product(buffers[1], grads, values_seen)
        of_rows = (x[:, :, rows].reshape(batch, num_kv_heads, -1, size) for x in (norms, deltas))
        shaped = (_shaped(x, batch, num_kv_heads, size) for x in (scores, grad_scores))
        gradients(*shaped, *of_rows, documents)
        grad_q[:, :, rows] = torch.bmm(grad_scores, keys_seen).view(batch, num_heads, size, dim)
        more_k = torch.bmm(queries.mT, grad_scores)
        more_v = torch.bmm(grads.mT, scores)  # the scores are the weights by now
        add(grad_k[:, :, seen], grad_v[:, :, seen], more_k, more_v)
    grad_k, grad_v = (x.mT.to(k.dtype).contiguous().view(k.shape) for x in (grad_k, grad_v))
    return grad_q, grad_k, grad_v


@_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    docs: Tensor | None,
    cap: float,
    use_compile: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(q),
        torch.empty(k.shape, dtype=k.dtype, device=k.device),
        torch.empty(v.shape, dtype=v.dtype, device=v.device),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, docs, ctx.cap, ctx.use_compile = inputs
    ctx.save_for_backward(q, k, v, *output, docs)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, docs = ctx.saved_tensors
    return *_backward(grad, q, k, v, out, lse, docs, ctx.cap, ctx.use_compile), None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def capped_attention(q: Tensor, k: Tensor, v: Tensor, cap: float, docs: Tensor | None = None) -> Tensor:
    """`reference.attention` with the causal mask, within documents if `docs` [B, T] (int32) numbers them.

    q [B, H, T, D]; k, v [B, G, T, D]; cap 0 means none. Returns [B, H, T, D].
    """
    # The compiler writes them in this order at once; the blocks would be gathered row by row.
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out: Tensor = _forward(q, k, v, docs, cap, torch.compiler.is_compiling())[0]
    return out
