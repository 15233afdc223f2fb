"""Every fused operation in plain PyTorch: the specification, forward and backward.

W1.58A8 (BitNet b1.58, arXiv 2402.17764): a weight is `scale * trit` with one scale per tensor, an
activation is an int8 integer with one scale per token. Both quantisers are straight-through: the
backward pass treats them as the identity. The operands of the forward product are therefore small
integers, which bf16 and fp32 hold exactly; both scales are applied to the product (the epilogue). With
activations quantised per block or not at all, the weight's operand is `scale * trit`, exact as well.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256  # llama.cpp's Q8_K block


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Absmean quantisation of a latent weight of any shape.

    Returns (trits, scale): trits in {-1, 0, 1} as float32, and the float32 scalar scale mean|W|, at least
    1e-5 and rounded to bf16, so that f32, bf16, f16 and TQ2_0 files hold identical weights.
    """
    weight = weight.float()
    scale = weight.abs().mean().clamp_min(1e-5).to(torch.bfloat16).float()
    return (weight / scale).round_().clamp_(-1, 1), scale


def quantize_activations(x: Tensor, block_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Absmax int8 quantisation of activations [..., K], per token or per block of `block_size`.

    Returns (q, scale): q [..., K] float32 integers in [-127, 127]; scale float32 [..., 1], or
    [..., K / block_size, 1] for blocks. q * scale approximates x.
    """
    values = x.float()
    if block_size is not None:
        values = values.unflatten(-1, (-1, block_size))
    scale = values.abs().amax(dim=-1, keepdim=True).clamp_min(1e-5) / 127
    q = (values / scale).round()
    return (q.flatten(-2) if block_size is not None else q), scale


def quantize_gradients(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Absmax int8 quantisation of gradients [..., N] per token, as (q, scale) of `quantize_activations`.

    Without its floor: gradients of 1e-9 are as good as any. Source: SwitchBack (arXiv 2304.13013).
    """
    values = grad.float()
    scale = values.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny * 128) / 127
    return (values / scale).round(), scale


def quantized(x: Tensor, activation_quant: str) -> Tensor:
    """What the product sees of activations x [..., K] in "block256": integers times their block's scale; "none": x."""
    if activation_quant == "none":
        return x
    q, scale = quantize_activations(x, BLOCK)
    blocks: Tensor = q.unflatten(-1, (-1, BLOCK)) * scale
    return blocks.flatten(-2).to(x.dtype)


class _TernaryLinear(torch.autograd.Function):
    """y = x' @ w'^T, where x' and w' are the quantised x and weight; gradients as if x and weight were x' and w'."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, trits: Tensor, scale: Tensor, activation_quant: str) -> Tensor:
        dequantized = (trits.float() * scale).to(x.dtype)  # exact: the scale is a bf16 number
        if activation_quant == "token":
            q, x_scale = quantize_activations(x)
            # Sums of int8 x trit products overflow fp16 beyond K = 516; 1/128 is exact in every format.
            shift = 128.0 if x.dtype == torch.float16 else 1.0
            product = F.linear((q / shift).to(x.dtype), trits)
            y = (product.float() * (x_scale * (scale * shift))).to(x.dtype)
            operand = (q * x_scale).to(x.dtype)
        else:
            # Every compute dtype holds scale * trit, and these sums cannot overflow before the result does.
            operand = quantized(x, activation_quant)
            y = F.linear(operand, dequantized)
        ctx.save_for_backward(operand, dequantized)
        ctx.weight_dtype = weight.dtype
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        operand, dequantized = ctx.saved_tensors
        grad_weight = grad.reshape(-1, grad.shape[-1]).T @ operand.reshape(-1, operand.shape[-1])
        return grad @ dequantized, grad_weight.to(ctx.weight_dtype), None, None, None


def ternary_linear(x: Tensor, weight: Tensor, trits: Tensor, scale: Tensor, activation_quant: str) -> Tensor:
    """The ternary linear layer.

    x [..., K] in the compute dtype; weight [N, K] latent, receives the gradient and is not read; trits [N, K]
    in the compute dtype; scale float32 scalar. Returns [..., N] in x's dtype. `activation_quant` is
    "token", "block256" or "none".
    """
    result: Tensor = _TernaryLinear.apply(x, weight, trits, scale, activation_quant)  # type: ignore[no-untyped-call]
    return result


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, computed in float32, returned in x's dtype (arXiv 1910.07467)."""
    values = x.float()
    values = values * torch.rsqrt(values.square().mean(dim=-1, keepdim=True) + eps)
    return (values * weight).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split layout of Hugging Face's models (arXiv 2104.09864).

    x [B, H, T, D]; cos and sin [T, D] or [B, 1, T, D], float32. Returned in x's dtype.
    """
    left, right = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-right, left), dim=-1) * sin).to(x.dtype)


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap), as in Gemma 2 (arXiv 2408.00118); cap 0 means none."""
    return cap * torch.tanh(x / cap) if cap else x


def causal_mask(doc_ids: Tensor | None, length: int, device: torch.device) -> Tensor:
    """True where a query may look: [T, T], or [B, 1, T, T] inside the same document of doc_ids [B, T]."""
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    if doc_ids is None:
        return mask
    return mask & (doc_ids[:, None, :, None] == doc_ids[:, None, None, :])


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, cap: float) -> Tensor:
    """Grouped-query attention: scale, soft-cap, mask, softmax, in that order; softmax in float32.

    q [B, H, T, D]; k and v [B, G, S, D] with G dividing H; mask bool, broadcastable to [B, H, T, S].
    Returns [B, H, T, D].
    """
    groups, dim = q.shape[1] // k.shape[1], q.shape[-1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = soft_cap((q @ k.mT).float() * dim**-0.5, cap)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return weights.to(q.dtype) @ v
