"""Ternary linear layers that share their input, carried out together: one quantisation, one matrix product.

Query, key and value read the same activations, and so do gate and up. Stacked, they quantise them once and
run one wide product in each direction instead of two or three narrow ones. Where the processor multiplies
int8 (AVX-512 VNNI), the forward product runs in int8 with int32 sums: twice as fast as bf16 and exact, since
trits and quantised activations are small integers. The gradients are those of `reference.ternary_linear`.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smelter.kernels import reference

MIN_INT8_ROWS = 32
"""Below this many tokens reading the weights is what takes the time, not multiplying them."""


def _cpu_has_int8() -> bool:
    """Whether the CPU multiplies int8 faster than floats (AVX-512 VNNI or AMX)."""
    get_capabilities = getattr(torch.backends.cpu, "get_capabilities", None)
    if get_capabilities is not None:
        found = get_capabilities()
        return bool(found.get("avx512_vnni") or found.get("amx_int8"))
    return bool(torch.cpu._is_vnni_supported())


CPU_HAS_INT8 = _cpu_has_int8()
"""Looked up once: the compiler then sees a constant."""


def _int8_product(integers: Tensor, trits: Tensor) -> Tensor:
    """int8 [M, K] x trits [N, K] in any dtype -> int32 [M, N]."""
    return torch._int_mm(integers, trits.to(torch.int8).T)


class _TernaryLinears(torch.autograd.Function):
    """y_i = quantised(x) @ (scale_i * trits_i)^T for every layer i, activations quantised per token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, use_int8: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(tensors) // 3
        weights, trits, scales = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        q, x_scale = reference.quantize_activations(x.reshape(-1, x.shape[-1]))
        integers = q.to(torch.int8)
        stacked = torch.cat(trits)  # [N, K]
        product = _int8_product(integers, stacked) if use_int8 else F.linear(q.to(x.dtype), stacked)
        outputs, start = [], 0
        for part, scale in zip(trits, scales, strict=True):
            end = start + part.shape[0]
            y = (product[:, start:end].float() * (x_scale * scale)).to(x.dtype)
            outputs.append(y.view(*x.shape[:-1], end - start))
            start = end
        ctx.save_for_backward(integers, x_scale, *trits, *scales)
        ctx.weight_dtypes = [weight.dtype for weight in weights]
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Not stacked: putting the gradients side by side would cost more than the narrower products.
        integers, x_scale, *saved = ctx.saved_tensors
        count = len(saved) // 2
        rows = integers.to(grads[0].dtype)
        grad_x: Tensor | None = None
        grad_weights = []
        for grad, part, scale, dtype in zip(grads, saved[:count], saved[count:], ctx.weight_dtypes, strict=True):
            flat = grad.reshape(-1, grad.shape[-1]).float()
            share = (flat * scale).to(grad.dtype) @ part
            grad_x = share if grad_x is None else grad_x + share
            grad_weights.append(((flat * x_scale).to(grad.dtype).T @ rows).to(dtype))
        assert grad_x is not None
        return grad_x.view(*grads[0].shape[:-1], -1), None, *grad_weights, *(None,) * (2 * count)


def ternary_linears(
    x: Tensor, weights: Sequence[Tensor], trits: Sequence[Tensor], scales: Sequence[Tensor], activation_quant: str
) -> Sequence[Tensor]:
    """`reference.ternary_linear` of x [..., K] with each weight [N_i, K]; returns [..., N_i] for each."""
    rows = x.numel() // max(1, x.shape[-1])
    # fp16 sums overflow unless scaled, and blocks of 256 have a scale each: the specification takes care of both.
    if activation_quant != "token" or x.dtype == torch.float16 or not rows:
        triples = zip(weights, trits, scales, strict=True)
        return [reference.ternary_linear(x, weight, t, scale, activation_quant) for weight, t, scale in triples]
    # With a single column, PyTorch's int8 product (2.13) returns arbitrary numbers.
    is_large = rows >= MIN_INT8_ROWS and x.shape[-1] > 1
    use_int8 = CPU_HAS_INT8 and x.device.type == "cpu" and is_large
    y: Sequence[Tensor] = _TernaryLinears.apply(x, use_int8, *weights, *trits, *scales)  # type: ignore[no-untyped-call]
    return y
