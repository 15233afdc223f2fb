"""Keys and values of the tokens a decoder has already read, for rows of unequal lengths.

Every row is filled from slot 0 without holes, wherever its neighbours are, so the mask needs no lengths:
a query at position p sees the slots 0..p of its own row. What lies beyond, padding of a shorter prompt
or what an earlier one left, is never seen before it is overwritten.
"""

import torch
from torch import Tensor

from smelter.config import ModelConfig


class KVCache:
    """Keys and values [layers, B, G, max_len, D] of every row, each row filled from 0 without holes."""

    def __init__(
        self, config: ModelConfig, batch_size: int, max_len: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        shape = (config.num_layers, batch_size, config.num_kv_heads, max_len, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.positions = torch.zeros(batch_size, 0, dtype=torch.long, device=device)
        self.end = 0
        self.first = 0

    def advance(self, positions: Tensor, end: int, first: int = 0) -> Tensor:
        """Say where the next tokens go: `positions` [B, T], all below `end`, of the rows `first` and after.

        Returns their mask [B, 1, T, end].
        """
        self.positions, self.end, self.first = positions, end, first
        slots = torch.arange(end, device=positions.device)
        return slots <= positions[:, None, :, None]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v [B, G, T, D] at the announced positions; return the first `end` slots [B, G, end, D]."""
        announced = slice(self.first, self.first + k.shape[0])
        keys, values = self.keys[layer, announced], self.values[layer, announced]
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        keys[rows, :, self.positions] = k.transpose(1, 2)
        values[rows, :, self.positions] = v.transpose(1, 2)
        return keys[:, :, : self.end], values[:, :, : self.end]

    def swap(self, a: int, b: int, length: int) -> None:
        """Exchange the first `length` slots of two rows."""
        for tensor in (self.keys, self.values):
            one, other = tensor[:, a, :, :length], tensor[:, b, :, :length]
            kept = one.clone()
            one.copy_(other)
            other.copy_(kept)

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` slots of a row into another."""
        for tensor in (self.keys, self.values):
            tensor[:, target, :, :length] = tensor[:, source, :, :length]
