"""Soft-capped attention by FlexAttention (arXiv 2412.05496), where Triton's products are on tensor cores.

The cap goes into the kernel as a change of each score, the causal and same-document mask as a map of blocks:
blocks that no query may look into are never computed, whole ones need no mask. The map depends on the documents
alone, so it is made once per micro-step and shared by all layers.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import BlockMask

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def _causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


@functools.lru_cache(maxsize=16)
def _causal_mask(length: int, device: torch.device) -> BlockMask:
    return flex.create_block_mask(_causal, None, None, length, length, device=device)


# Compiled when first called. Not behind a cache: the compiler traces `flex_attention`, and warns of caches in it.
_create_block_mask = torch.compile(flex.create_block_mask, dynamic=False)
_flex_attention = torch.compile(flex.flex_attention, dynamic=False)


def block_mask(doc_ids: Tensor | None, length: int, device: torch.device) -> BlockMask:
    """Where queries may look: at earlier keys and themselves, inside the same document of doc_ids [B, T].

    The mask of `reference.causal_mask`, for `flex_attention`. Without documents it is made once per length.
    """
    if doc_ids is None:
        return _causal_mask(length, device)

    def same_document(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (doc_ids[batch, query] == doc_ids[batch, key])

    # Uncompiled it goes through a mask of [B, 1, T, T].
    create = _create_block_mask if device.type == "cuda" else flex.create_block_mask
    mask: BlockMask = create(same_document, doc_ids.shape[0], None, length, length, device=device)
    return mask


def _soft_cap(cap: float) -> ScoreMod | None:
    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return score_mod if cap else None


def flex_attention(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, cap: float) -> Tensor:
    """`reference.attention` with the mask of `block_mask`; softmax in float32.

    q [B, H, T, D]; k, v [B, G, T, D] with G dividing H. Returns [B, H, T, D]. Compiled on CUDA; on a CPU it
    computes all scores and has no backward pass, which serves to check it.
    """
    attend: Callable[..., Any] = _flex_attention if q.device.type == "cuda" else flex.flex_attention
    out: Tensor = attend(q, k, v, score_mod=_soft_cap(cap), block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    return out
