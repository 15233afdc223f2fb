"""The largest logit without all the logits: int8 products tell which tokens can have it, float32 ones which has.

Half of a small model's time for a token goes into its output head in float32. Greedy decoding reads one thing from it,
and nearly every token is out of the question by far. So head and hidden states are rounded to int8, whose product is
three to eight times as fast, and by the Cauchy-Schwarz inequality that product is off by no more than the rounding
errors' norms allow: what is farther below the largest cannot win. The few others, 2 to 7 of 4,096 in trained models,
are computed from the float32 weights. The answer is exact, whatever the bound leaves over.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from smelter.kernels.reference import quantize_activations

MIN_PRODUCTS = 2**22
"""B * V * C; for fewer, rounding takes as long as it saves."""
MAX_CANDIDATES = 256
"""For each row, on average; with more left, all logits in float32 are as cheap."""
BLOCK = 64
"""Tokens that are left out together, where the largest among them is too low."""
ROUNDING = 1e-4
"""Of the norms' product: what summing in float32 may be off, many times over."""


@dataclass(frozen=True)
class ScreenedHead:
    """An output head [V, C] in float32, and in int8 with a scale for each token."""

    weight: Tensor
    q: Tensor
    """Padded to whole blocks of tokens, as is `scale`."""
    scale: Tensor
    norm: float
    """Of the longest row of scale * q [V, C]."""
    error: float
    """Norm of the largest row of what rounding took away."""

    @classmethod
    def of(cls, weight: Tensor) -> "ScreenedHead":
        """Round a head [V, C], which must not change after that."""
        weight = weight.detach()
        q, scale = quantize_activations(weight)
        rounded = q * scale
        norm, error = (float(rows.norm(dim=-1).max()) for rows in (rounded, weight - rounded))
        padding = -len(weight) % BLOCK
        q, scale = F.pad(q.to(torch.int8), (0, 0, 0, padding)), F.pad(scale.squeeze(-1), (0, padding))
        return cls(weight, q, scale, norm, error)

    def argmax(self, hidden: Tensor, count: int) -> Tensor:
        """`F.linear(hidden, weight)[:, :count].argmax(-1)`: [B], of hidden states [B, C] in float32."""
        if hidden.shape[0] * self.weight.numel() < MIN_PRODUCTS:
            return self._argmax_of_all(hidden, count)
        q, scale = quantize_activations(hidden)
        length, lost = hidden.norm(dim=-1, keepdim=True), (hidden - q * scale).norm(dim=-1, keepdim=True)
        # In units of each row's scale, as what follows.
        reach = ((self.error + ROUNDING * self.norm) * length + self.norm * lost) / scale
        approximate = torch._int_mm(q.to(torch.int8), self.q.T).float().mul_(self.scale)  # [B, V]
        approximate[:, count:] = -torch.inf
        blocks = approximate.view(len(hidden), -1, BLOCK)
        largest = blocks.amax(dim=-1)
        floor = largest.amax(dim=-1, keepdim=True) - 2 * reach
        # "Not below", so that numbers that are none leave everything in.
        rows, places = (~(largest < floor)).nonzero(as_tuple=True)
        inside, ids = (~(blocks[rows, places] < floor[rows])).nonzero(as_tuple=True)
        rows, ids = rows[inside], places[inside] * BLOCK + ids
        # A row whose numbers are none has left in what fills the last block up, too.
        rows, ids = rows[ids < count], ids[ids < count]
        if len(ids) > MAX_CANDIDATES * len(hidden):
            return self._argmax_of_all(hidden, count)
        logits = (self.weight[ids] * hidden[rows]).sum(dim=-1)
        best = logits.new_full((len(hidden),), -torch.inf).scatter_reduce(0, rows, logits, "amax")
        loses = (logits < best[rows]) | (best.isnan()[rows] & ~logits.isnan())  # as in argmax: what is none is largest
        winners = ids.masked_fill(loses, count)
        first: Tensor = winners.new_full((len(hidden),), count).scatter_reduce(0, rows, winners, "amin")
        return first

    def _argmax_of_all(self, hidden: Tensor, count: int) -> Tensor:
        return F.linear(hidden, self.weight)[:, :count].argmax(dim=-1)
