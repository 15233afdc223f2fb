"""Attention of new tokens to a cache of keys: each key is read once for all the queries that share it.

Grouped-query attention has several queries for one key. Repeating the keys for them, as the specification does, copies
the whole cache in every layer for every token; here the queries of a group stand below one another instead.
"""

from torch import Tensor

from smelter.kernels.reference import soft_cap


def cached_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, cap: float) -> Tensor:
    """`reference.attention` without copies of k and v.

    q [B, H, T, D]; k and v [B, G, S, D] with G dividing H; mask bool, broadcastable to [B, 1, T, S].
    Returns [B, H, T, D].
    """
    batch, heads, length, dim = q.shape
    groups = k.shape[1]
    stacked = q.reshape(batch, groups, -1, dim)  # [B, G, H / G * T, D]
    scores = soft_cap((stacked @ k.mT).float() * dim**-0.5, cap)
    scores = scores.view(batch, heads, length, -1).masked_fill(~mask, float("-inf"))
    weights = scores.softmax(dim=-1).to(q.dtype).view(batch, groups, -1, k.shape[2])
    return (weights @ v).view(batch, heads, length, dim)
