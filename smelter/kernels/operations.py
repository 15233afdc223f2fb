"""Who carries out an operation on this device: `capability` says what it takes, and the signature is the same."""

from typing import TYPE_CHECKING, Union

import torch
from torch import Tensor

from smelter.kernels import reference
from smelter.kernels.attention_blocked import capped_attention
from smelter.kernels.attention_tiled import takes as takes_tiles
from smelter.kernels.attention_tiled import tiled_attention
from smelter.kernels.capability import attends_in_tiles, cpu_has_kernels
from smelter.kernels.capability import capability as capability_of
from smelter.kernels.decoder import takes as takes_sizes

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Documents = Union[Tensor, "BlockMask", None]
"""Where causal attention may look, in the form that the device's kernel takes; made by `documents`."""


def documents(doc_ids: Tensor | None, length: int, device: torch.device) -> Documents:
    """What keeps `attention` inside each document of doc_ids [B, T]: made once per batch, for all layers.

    Imports FlexAttention only where it is used: that takes a second.
    """
    if capability_of(device).attention == "flex":
        from smelter.kernels.attention_flex import block_mask

        return block_mask(doc_ids, length, device)
    return None if doc_ids is None else doc_ids.to(torch.int32)


def attention(q: Tensor, k: Tensor, v: Tensor, cap: float, *, mask: Tensor | None, docs: Documents) -> Tensor:
    """Soft-capped grouped-query attention; without a mask causal, and inside each document that `docs` tells apart.

    q [B, H, T, D]; k, v [B, G, S, D]; mask bool broadcastable to [B, H, T, S], else S = T. Returns [B, H, T, D].
    """
    if mask is not None:
        return _cached_attention(q, k, v, mask, cap)
    if docs is None or isinstance(docs, Tensor):
        if takes_tiles(q) and attends_in_tiles(q.device):
            return tiled_attention(q, k, v, cap, docs)
        return capped_attention(q, k, v, cap, docs)
    from smelter.kernels.attention_flex import flex_attention

    return flex_attention(q, k, v, docs, cap)


def _cached_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, cap: float) -> Tensor:
    """Attention of new tokens to a cache of keys: `reference.attention` without copies of k and v.

    Grouped-query attention has several queries for one key. Repeating the keys for them, as the specification does,
    copies the whole cache in every layer for every token; here the queries of a group stand below one another instead.

    q [B, H, T, D]; k and v [B, G, S, D] with G dividing H; mask bool, broadcastable to [B, 1, T, S].
    Returns [B, H, T, D].
    """
    batch, heads, length, dim = q.shape
    groups = k.shape[1]
    stacked = q.reshape(batch, groups, -1, dim)  # [B, G, H / G * T, D]
    scores = reference.soft_cap((stacked @ k.mT).float() * dim**-0.5, cap)
    scores = scores.view(batch, heads, length, -1).masked_fill(~mask, float("-inf"))
    weights = scores.softmax(dim=-1).to(q.dtype).view(batch, groups, -1, k.shape[2])
    return (weights @ v).view(batch, heads, length, dim)


def quantize_together(weights: list[Tensor], trits: list[Tensor], scales: list[Tensor]) -> None:
    """Fill trits and scales of all layers in two launches on a GPU. Imports Triton, which takes a second."""
    from smelter.kernels.weights_triton import quantize_weights

    quantize_weights(weights, trits, scales)


def decodes_natively(device: torch.device, size: int, inner: int, dim: int) -> bool:
    """Whether `Decoder` computes a model of these sizes on this device: hidden, intermediate and head size."""
    return device.type == "cpu" and takes_sizes(size, inner, dim) and cpu_has_kernels()
