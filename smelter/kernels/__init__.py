"""The fused operations of the model, each with one signature whatever carries it out.

`reference` is the specification in plain PyTorch; `cpu_attention` computes the same attention block by
block, so that the [queries x keys] scores stay in the processor's cache. The choice is made here.
"""

from torch import Tensor

from smelter.kernels import reference


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cap: float) -> Tensor:
    """Soft-capped grouped-query attention; `mask` None means causal over equal lengths.

    q [B, H, T, D]; k, v [B, G, S, D]; mask bool broadcastable to [B, H, T, S]. Returns [B, H, T, D].
    """
    if mask is None:
        mask = reference.causal_mask(None, q.shape[2], q.device)
    return reference.attention(q, k, v, mask, cap)
