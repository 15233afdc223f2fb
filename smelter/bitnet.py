"""BitLinear: a linear layer whose weights are ternary (BitNet b1.58, arXiv 2402.17764).

The optimizer moves a float32 latent weight; the forward pass sees `scale * trit`. The trits are made
once per optimizer step by `quantize_weights` and reused by every micro-batch and recompute, which is
cheaper than quantising in each forward pass and gives identical numbers.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smelter.kernels import Stacked, int8_product, quantize_together, reference, ternary_linears, uses_triton


class BitLinear(nn.Module):
    """Linear layer without bias, ternary by default.

    Input [..., in_features] in the compute dtype, output [..., out_features] in the same. With
    `use_ternary=False` it is an ordinary linear layer that casts its weight to the compute dtype.
    """

    trits: Tensor
    scale: Tensor

    def __init__(
        self, in_features: int, out_features: int, *, use_ternary: bool = True, activation_quant: str = "token"
    ) -> None:
        super().__init__()
        self.use_ternary = False
        self.activation_quant = activation_quant
        self.int8_gradients = False
        """Whether the gradient of the input is made of int8, where the activations are quantised per token."""
        self.stacked: Stacked | None = None
        """In the first of several layers that read the same input, made by `freeze`: all their trits."""
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        if use_ternary:
            self.make_ternary()

    def make_ternary(self) -> None:
        """Turn an ordinary linear layer into a ternary one of the same latent weight; `quantize` then makes the trits.

        The weight stays the same parameter, so an optimizer goes on with it.
        """
        self.use_ternary = True
        # Derived from the weight, so neither saved nor moved by the optimizer.
        self.register_buffer("trits", torch.zeros_like(self.weight, requires_grad=False), persistent=False)
        self.register_buffer("scale", torch.ones((), device=self.weight.device), persistent=False)

    @torch.no_grad()
    def quantize(self, dtype: torch.dtype) -> None:
        """Recompute trits and scale from the latent weight; trits are kept in `dtype`."""
        if not self.use_ternary:
            return
        trits, scale = reference.quantize_weight(self.weight)
        if self.trits.dtype != dtype:
            self.trits = self.trits.to(dtype)
        self.trits.copy_(trits)
        self.scale.copy_(scale)

    def forward(self, x: Tensor) -> Tensor:
        return apply_together(x, [self])[0]


class RMSNorm(nn.Module):
    """RMSNorm with a learned gain, over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return reference.rms_norm(x, self.weight, self.eps)


def apply_together(x: Tensor, layers: Sequence[BitLinear], norm: RMSNorm | None = None) -> Sequence[Tensor]:
    """The outputs of several layers of one kind on the same input [..., in_features], computed together.

    With `norm` the input is normalised first, which a GPU does in one kernel with the quantisation.
    """
    if not layers[0].use_ternary:
        x = x if norm is None else norm(x)
        return [F.linear(x, layer.weight.to(x.dtype)) for layer in layers]
    stacked = layers[0].stacked
    if stacked is not None and not torch.is_grad_enabled():
        return stacked.apply(x, norm=None if norm is None else norm.weight, eps=0.0 if norm is None else norm.eps)
    return ternary_linears(
        x,
        [layer.weight for layer in layers],
        [layer.trits for layer in layers],
        [layer.scale for layer in layers],
        layers[0].activation_quant,
        norm=None if norm is None else norm.weight,
        eps=0.0 if norm is None else norm.eps,
        int8_gradients=layers[0].int8_gradients,
    )


def bit_linears(module: nn.Module) -> Iterator[tuple[str, BitLinear]]:
    """Every ternary layer with its name."""
    for name, child in module.named_modules():
        if isinstance(child, BitLinear) and child.use_ternary:
            yield name, child


def quantize_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Make the trits of every ternary layer from its latent weight: once per optimizer step."""
    layers = [layer for _, layer in bit_linears(module)]
    if layers and layers[0].weight.device.type == "cuda" and uses_triton(layers[0].weight.device):
        for layer in layers:
            layer.trits = layer.trits.to(dtype)
        with torch.no_grad():
            lists = zip(*((layer.weight.detach(), layer.trits, layer.scale) for layer in layers), strict=True)
            quantize_together(*(list(tensors) for tensors in lists))
        return
    for layer in layers:
        layer.quantize(dtype)


def freeze(groups: Iterable[Sequence[BitLinear]], compute_dtype: torch.dtype) -> None:
    """Make layers that are read and no longer trained quick, each group being applied together.

    Their trits are stacked once, and kept in int8 where the device multiplies that: a quarter of float32's bytes, which
    are what takes the time when few tokens are read at once. The results stay the same numbers.
    """
    for layers in groups:
        if not layers[0].use_ternary:
            continue
        use_int8 = int8_product(layers[0].trits.device) == "cpu"
        dtype = torch.int8 if use_int8 else layers[0].trits.dtype
        trits, scales = [layer.trits.to(dtype) for layer in layers], [layer.scale for layer in layers]
        stacked = Stacked.of(trits, scales, layers[0].activation_quant, compute_dtype)
        for layer, part in zip(layers, stacked.parts(), strict=True):
            layer.trits = part
        layers[0].stacked = stacked


def pack_trits(trits: Tensor) -> Tensor:
    """Four trits a byte, the first in the lowest two bits, stored as trit + 1; zeros fill the last byte up.

    trits [..., K] of any dtype with values -1, 0, 1. Returns uint8 [..., ceil(K / 4)]. Raises ValueError for other
    values.
    """
    codes = F.pad(trits + 1, (0, -trits.shape[-1] % 4), value=1)
    if not bool(((codes == 0) | (codes == 1) | (codes == 2)).all()):
        raise ValueError("pack_trits: values other than -1, 0 and 1")
    codes = codes.to(torch.uint8).unflatten(-1, (-1, 4))
    packed: Tensor = codes[..., 0] | codes[..., 1] << 2 | codes[..., 2] << 4 | codes[..., 3] << 6
    return packed


def unpack_trits(packed: Tensor, size: int) -> Tensor:
    """The inverse of `pack_trits`: uint8 [..., ceil(size / 4)] -> int8 [..., size]."""
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & 3).flatten(-2)[..., :size].to(torch.int8) - 1
