"""Soft-capped logits, their exponentials and the cap's slope, at the precision that the logits have.

Attention and the loss spend most of their element-wise time here. Logits of 16 bits are rounded further than a
polynomial is off, and a cap (Gemma 2, arXiv 2408.00118) bounds what is exponentiated: both make it cheaper. Logits in
float32 get the library's functions.
"""

from typing import Any

import torch
from torch import Tensor

MAX_EXPONENT = 60.0
"""exp(60) times any vocabulary or context stays below float32's 3e38, and exp(-60) above its 1e-38."""

COMPILER_OPTIONS: dict[str, Any] = {
    "cpp.enable_floating_point_contract_flag": "fast",
    "realize_opcount_threshold": 1_000,
}
"""For torch.compile: multiply and add in one instruction, and keep no intermediate result in memory."""


def is_bounded(cap: float) -> bool:
    """Whether the cap alone keeps exponentials and their sums within float32, so that no maximum is needed."""
    return 0 < cap <= MAX_EXPONENT


def rational_tanh(x: Tensor) -> Tensor:
    """tanh as a ratio of polynomials: Lambert's continued fraction, cut at the seventh power.

    Off by at most 1e-4 (around |x| = 4.97, where it is held): for values of 16 bits. A third of tanh's cost on a CPU.
    """
    x = x.clamp(-4.97, 4.97)
    y = x * x
    return x * (135135 + y * (17325 + y * (378 + y))) / (135135 + y * (62370 + y * (3150 + y * 28)))


def power_exp(x: Tensor) -> Tensor:
    """exp as the 256th power of a Taylor polynomial of x / 256: multiplications only.

    Relative error below 1e-3 up to |x| = 50 and 2e-3 up to 60: for results of 16 bits. Half of exp's cost on a CPU.
    """
    y = x * (1 / 256)
    # Two powers: the compiler makes multiplications of exponents below 32.
    return (1 + y * (1 + y * (0.5 + y * (1 / 6 + y * (1 / 24))))).pow(16).pow(16)


def capped(logits: Tensor, cap: float, scale: float = 1.0) -> tuple[Tensor, Tensor | float]:
    """soft_cap(scale * logits) in float32, and the cap's slope there; cap 0 means none."""
    x = logits.float() * scale
    if not cap:
        return x, 1.0
    t = torch.tanh(x / cap) if logits.dtype == torch.float32 else rational_tanh(x * (1 / cap))
    return cap * t, 1 - t * t


def capped_exp(values: Tensor, cap: float, dtype: torch.dtype) -> Tensor:
    """exp of capped values; `dtype` is what the result is rounded to."""
    return power_exp(values) if is_bounded(cap) and dtype != torch.float32 else torch.exp(values)
