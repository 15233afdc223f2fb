"""The fused operations of the model, each with one signature whatever carries it out.

`reference` is the specification in plain PyTorch; everything else equals it, forward and backward. `capability` says
what a device takes.
"""

from typing import TYPE_CHECKING, Union

import torch
from torch import Tensor

from smelter.kernels import reference
from smelter.kernels.attention_blocked import capped_attention
from smelter.kernels.attention_tiled import takes as takes_tiles
from smelter.kernels.attention_tiled import tiled_attention
from smelter.kernels.cached import cached_attention
from smelter.kernels.capability import attends_in_tiles, cpu_has_kernels, int8_product, uses_triton
from smelter.kernels.capability import capability as capability_of
from smelter.kernels.decoder import Decoder, LayerWeights
from smelter.kernels.decoder import takes as takes_sizes
from smelter.kernels.head import ScreenedHead
from smelter.kernels.linear import Stacked, ternary_linears

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

__all__ = [
    "Decoder",
    "Documents",
    "LayerWeights",
    "ScreenedHead",
    "Stacked",
    "attention",
    "decodes_natively",
    "documents",
    "int8_product",
    "reference",
    "ternary_linears",
    "uses_triton",
]

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
        return cached_attention(q, k, v, mask, cap)
    if docs is None or isinstance(docs, Tensor):
        if takes_tiles(q) and attends_in_tiles(q.device):
            return tiled_attention(q, k, v, cap, docs)
        return capped_attention(q, k, v, cap, docs)
    from smelter.kernels.attention_flex import flex_attention

    return flex_attention(q, k, v, docs, cap)


def decodes_natively(device: torch.device, size: int, inner: int, dim: int) -> bool:
    """Whether `Decoder` computes a model of these sizes on this device: hidden, intermediate and head size."""
    return device.type == "cpu" and takes_sizes(size, inner, dim) and cpu_has_kernels()
