"""The fused operations of the model, each with one signature whatever carries it out.

`reference` is the specification in plain PyTorch. Causal attention over a whole sequence is computed in
blocks of queries: a block needs no keys to its right, so almost half of the work is never done, and
the compiler fuses cap, mask and softmax of a block. It takes every cap, so none is ever dropped.
"""

import torch
from torch import Tensor

from smelter.kernels import reference
from smelter.kernels.ternary import ternary_linears

__all__ = ["attention", "blocked_attention", "reference", "ternary_linears"]

QUERY_BLOCK = 128
MAX_BLOCKS = 8


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, cap: float) -> Tensor:
    """Causal `reference.attention` over equal lengths, one block of queries after the other.

    q [B, H, T, D]; k, v [B, G, T, D]. Returns [B, H, T, D].
    """
    length, dim = q.shape[-2:]
    num_kv_heads = k.shape[1]
    q = q.unflatten(1, (num_kv_heads, -1)) * dim**-0.5  # [B, G, H / G, T, D]
    size = max(QUERY_BLOCK, -(-length // MAX_BLOCKS))
    blocks = []
    for start in range(0, length, size):
        end = min(start + size, length)
        # Query heads that share keys are stacked, so that keys are never repeated.
        queries = q[:, :, :, start:end].flatten(2, 3)  # [B, G, H / G * n, D]
        scores = reference.soft_cap((queries @ k[:, :, :end].mT).float(), cap)
        scores = scores.unflatten(2, (-1, end - start))  # [B, G, H / G, n, end]
        # 32-bit positions: the compiler's vector code for 64-bit ones is slow.
        positions = torch.arange(end, dtype=torch.int32, device=q.device)
        hidden = positions > positions[start:, None]
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1).to(v.dtype)
        out = weights.flatten(2, 3) @ v[:, :, :end]  # [B, G, H / G * n, D]
        blocks.append(out.unflatten(2, (-1, end - start)))
    return torch.cat(blocks, dim=3).flatten(1, 2)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cap: float) -> Tensor:
    """Soft-capped grouped-query attention; `mask` None means causal over equal lengths.

    q [B, H, T, D]; k, v [B, G, S, D]; mask bool broadcastable to [B, H, T, S]. Returns [B, H, T, D].
    """
    if mask is None:
        return blocked_attention(q, k, v, cap)
    return reference.attention(q, k, v, mask, cap)
