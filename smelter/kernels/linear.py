"""Ternary linear layers that share their input, with one quantisation of it and the fastest exact product.

Query, key and value read the same activations, and so do gate and up: stacked, they quantise them once and run one
wide product in each direction. The forward product is one of small integers: where the device multiplies int8
(`capability`), that is twice as fast as bf16 and as exact. Of the activations only the int8 are kept for the
backward pass, whose products are those of `reference.ternary_linear`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smelter.kernels import reference
from smelter.kernels.capability import Int8Product, int8_product, uses_triton

MIN_INT8_ROWS = 32
"""Below this many tokens reading the weights is what takes the time, not multiplying them."""


def pick_product(
    rows: int, inputs: int, outputs: int, device: torch.device, kept: torch.dtype | None = None
) -> Int8Product:
    """How to multiply activations [rows, inputs] with weights [outputs, inputs], whose trits are `kept` in a dtype."""
    product: Int8Product = int8_product(device)
    # With a single column, PyTorch's int8 product (2.13, CPU) returns arbitrary numbers; cuBLAS wants multiples of 8.
    if inputs == 1:
        return "none"
    # A quarter of the bytes to read, where they need not be converted first.
    reads_int8 = product == "cpu" and kept == torch.int8
    if rows < MIN_INT8_ROWS and not reads_int8:
        return "none"
    if product == "cublas" and (inputs % 8 or outputs % 8):
        return "none"
    return product


def _product(q: Tensor, row_scale: Tensor, trits: Tensor, column_scale: Tensor, how: Int8Product, dtype: Any) -> Tensor:
    """[M, N] in `dtype`: integers q [M, K] (float32 or int8) times trits [N, K], times scales [M, 1] and [N]."""
    if how == "triton":
        from smelter.kernels.linear_triton import int8_matmul

        product: Tensor = int8_matmul(q.to(torch.int8), trits.to(torch.int8), row_scale, column_scale, dtype)
        return product
    if how == "none":
        # Sums of int8 x trit products overflow fp16 beyond K = 516; 1/128 is exact in every format.
        shift = 128.0 if dtype == torch.float16 else 1.0
        sums = F.linear((q.float() / shift).to(dtype), trits.to(dtype)).float() * shift
    else:
        sums = torch._int_mm(q.to(torch.int8), trits.to(torch.int8).T).float()
    return (sums * (row_scale * column_scale)).to(dtype)


def _columns(values: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """A scalar for each layer, repeated for each of its outputs: [N]."""
    return torch.cat([value.expand(size) for value, size in zip(values, sizes, strict=True)])


def _quantize(x: Tensor, norm: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """Integers [M, K] and scales [M, 1] of x [M, K], normalised first where there is a `norm` [K].

    Also 1 / the rms [M, 1], from a kernel that makes it on the way.
    """
    if x.device.type == "cuda" and uses_triton(x.device):
        from smelter.kernels import linear_triton as triton_ops

        if norm is None:
            return *triton_ops.quantize_rows(x), None
        q, row_scale, rstd = triton_ops.rms_norm_quantize(x, norm, eps)
        return q, row_scale, rstd
    return *reference.quantize_activations(x if norm is None else reference.rms_norm(x, norm, eps)), None


class _TernaryLinears(torch.autograd.Function):
    """y = quantised(norm(x)) @ w'^T, quantised per token, w' [N, K] all layers' scale * trits stacked."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor | None, eps: float, how: Int8Product, int8_gradients: bool, *tensors: Tensor
    ) -> Tensor:
        count = len(tensors) // 3
        weights, trits, scales = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        flat = x.reshape(-1, x.shape[-1])
        q, row_scale, rstd = _quantize(flat, norm, eps)
        if norm is not None and rstd is None:
            rstd = torch.rsqrt(flat.float().square().mean(dim=-1, keepdim=True) + eps)
        columns = _columns(scales, [part.shape[0] for part in trits])
        y = _product(q, row_scale, torch.cat(trits), columns, how, x.dtype)
        normed = (flat, norm, rstd) if norm is not None else ()
        ctx.save_for_backward(q.to(torch.int8), row_scale, *trits, *scales, *normed)
        ctx.weight_dtypes = [weight.dtype for weight in weights]
        ctx.int8_gradients = int8_gradients
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        q, row_scale, *saved = ctx.saved_tensors
        count = len(ctx.weight_dtypes)
        trits, scales, normed = saved[:count], saved[count : 2 * count], saved[2 * count :]
        flat = grad.reshape(-1, grad.shape[-1])
        if ctx.int8_gradients:
            grad_x = _int8_grad_input(flat, trits, scales)
        else:
            weight = torch.cat([part * scale for part, scale in zip(trits, scales, strict=True)])
            grad_x = flat @ weight.to(grad.dtype)
        grad_weight = flat.T @ (q * row_scale).to(grad.dtype)
        parts = grad_weight.split([part.shape[0] for part in trits])
        grad_weights = [part.to(dtype) for part, dtype in zip(parts, ctx.weight_dtypes, strict=True)]
        grad_norm = None
        if normed:
            grad_x, grad_norm = _rms_norm_backward(grad_x, *normed)
        return grad_x.view(*grad.shape[:-1], -1), grad_norm, None, None, None, *grad_weights, *(None,) * (2 * count)


def _int8_grad_input(grad: Tensor, trits: Sequence[Tensor], scales: Sequence[Tensor]) -> Tensor:
    """grad [M, N] times the layers' stacked weights [N, K] as a product of int8: each token's gradient is rounded.

    The scales of the weights go into the gradient first, so that one of its own is left for each token.
    """
    stacked = torch.cat(list(trits))
    q, row_scale = reference.quantize_gradients(grad.float() * _columns(scales, [part.shape[0] for part in trits]))
    how = pick_product(grad.shape[0], stacked.shape[0], stacked.shape[1], grad.device, stacked.dtype)
    # cuBLAS and Triton read weights along the sum; the CPU's product turns the view back.
    transposed = stacked.T if how == "cpu" else stacked.T.contiguous()
    return _product(q, row_scale, transposed, row_scale.new_ones(stacked.shape[1]), how, grad.dtype)


def _rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x [M, K] and of the gain [K] of `reference.rms_norm`, from that of its output."""
    unit, g = x.float() * rstd, grad.float()
    grad_unit = g * weight
    grad_x = rstd * (grad_unit - unit * (grad_unit * unit).mean(dim=-1, keepdim=True))
    return grad_x.to(x.dtype), (g * unit).sum(0).to(weight.dtype)


def ternary_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    trits: Sequence[Tensor],
    scales: Sequence[Tensor],
    activation_quant: str,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    int8_gradients: bool = False,
) -> Sequence[Tensor]:
    """`reference.ternary_linear` of x [..., K] with each weight [N_i, K]; returns [..., N_i] for each.

    With a gain `norm` [K], x goes through `reference.rms_norm` first. The trits may be kept in any dtype that holds
    them. With `int8_gradients` (and activations quantised per token) the gradient of x is made of int8, too; those of
    the weights are not.
    """
    rows = x.numel() // max(1, x.shape[-1])
    if activation_quant != "token" or not rows:
        if norm is not None:
            x = reference.rms_norm(x, norm, eps)
        triples = zip(weights, trits, scales, strict=True)
        return [reference.ternary_linear(x, weight, t.to(x.dtype), s, activation_quant) for weight, t, s in triples]
    sizes = [part.shape[0] for part in trits]
    how = pick_product(rows, x.shape[-1], sum(sizes), x.device, trits[0].dtype)
    y: Tensor = _TernaryLinears.apply(x, norm, eps, how, int8_gradients, *weights, *trits, *scales)  # type: ignore[no-untyped-call]
    outputs: Sequence[Tensor] = y.split(sizes, dim=-1)
    return outputs


@dataclass(frozen=True)
class Stacked:
    """The trits [N, K] of layers that read the same input, one below the other, and each output's scale [N].

    Training stacks them anew in each step, since they change; a trained model need not. Where activations are not
    quantised per token, `weights` [N, K] are scale * trit in the compute dtype.
    """

    trits: Tensor
    columns: Tensor
    sizes: tuple[int, ...]
    activation_quant: str = "token"
    weights: Tensor | None = None

    @classmethod
    def of(cls, trits: Sequence[Tensor], scales: Sequence[Tensor], activation_quant: str, dtype: Any) -> "Stacked":
        """Stack the trits [N_i, K] and scales (scalars) of several layers that compute in `dtype`."""
        sizes = [part.shape[0] for part in trits]
        stacked, columns = torch.cat(list(trits)), _columns(scales, sizes)
        weights = None if activation_quant == "token" else (stacked.float() * columns[:, None]).to(dtype)
        return cls(stacked, columns, tuple(sizes), activation_quant, weights)

    def parts(self) -> Sequence[Tensor]:
        """Each layer's trits, as views."""
        parts: Sequence[Tensor] = self.trits.split(self.sizes)
        return parts

    def apply(self, x: Tensor, *, norm: Tensor | None = None, eps: float = 0.0) -> Sequence[Tensor]:
        """The numbers of `ternary_linears`; keeps nothing for a backward pass."""
        if self.weights is not None:
            x = x if norm is None else reference.rms_norm(x, norm, eps)
            together = F.linear(reference.quantized(x, self.activation_quant), self.weights)
            outputs: Sequence[Tensor] = together.split(self.sizes, dim=-1)
            return outputs
        flat = x.reshape(-1, x.shape[-1])
        how = pick_product(flat.shape[0], flat.shape[1], sum(self.sizes), x.device, self.trits.dtype)
        q, row_scale, _ = _quantize(flat, norm, eps)
        y = _product(q, row_scale, self.trits, self.columns, how, x.dtype).view(*x.shape[:-1], -1)
        outputs = y.split(self.sizes, dim=-1)
        return outputs
