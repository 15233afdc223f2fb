"""All layers of a trained ternary model in one call on a CPU: `cpu/decode.cpp` beside PyTorch's tensors.

For one token after the other PyTorch spends more time between its operations than in them. Here the weights are packed,
four trits a byte, so that those of a small model stay in the processor's cache. Activations, products and results are
those of the layers in float32, up to the order of summation.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from smelter.kernels import native
from smelter.kernels.linear import Stacked

CHUNK = 256
"""Inputs whose trits lie in 64 bytes."""
OUTPUTS = 4
"""Computed together."""
MAX_ROWS = 512
"""Tokens in a call: what lies between the layers then takes some megabytes."""


class KeyCache(Protocol):
    """Keys and values [layers, slots, G, max_len, D] in float32; row i of a batch has slot first + i."""

    keys: Tensor
    values: Tensor
    first: int


@dataclass
class Scratch:
    """A cache for one row that is read once."""

    keys: Tensor
    values: Tensor
    first: int = 0

    @classmethod
    def of(cls, num_layers: int, num_kv_heads: int, length: int, dim: int) -> "Scratch":
        """Room for `length` tokens."""
        keys, values = torch.zeros(2, num_layers, 1, num_kv_heads, length, dim)
        return cls(keys, values)


@dataclass(frozen=True)
class LayerWeights:
    """A block's ternary layers, and its gains, or None where it has no such norm."""

    qkv: Stacked
    out: Stacked
    gate_up: Stacked
    down: Stacked
    attention_norm: Tensor
    query_norm: Tensor | None
    key_norm: Tensor | None
    attention_sub_norm: Tensor | None
    mlp_norm: Tensor
    mlp_sub_norm: Tensor | None


class _Linear(ctypes.Structure):
    _fields_ = (
        ("packed", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("outputs", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Linear) for name in ("qkv", "out", "gate_up", "down")),
        *((name, ctypes.c_void_p) for name in ("attention_norm", "query_norm", "key_norm")),
        *((name, ctypes.c_void_p) for name in ("attention_sub_norm", "mlp_norm", "mlp_sub_norm")),
    )


class _Decoder(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.POINTER(_Layer)),
        *((name, ctypes.c_void_p) for name in ("embedding", "norm", "cos", "sin")),
        *((name, ctypes.c_int64) for name in ("num_layers", "size", "heads", "kv_heads", "dim", "inner", "blocks")),
        ("eps", ctypes.c_float),
        ("cap", ctypes.c_float),
    )


def pack(trits: Tensor) -> Tensor:
    """Trits [N, K] as the kernel reads them: uint8 [N, K / 256, 64], N and K rounded up to multiples of 4 and 256.

    Bits 2 i and 2 i + 1 of byte j of a chunk are trit + 1 of input 64 i + j.
    """
    outputs, inputs = trits.shape
    codes = F.pad(trits.to(torch.int8), (0, -inputs % CHUNK, 0, -outputs % OUTPUTS)) + 1
    parts = codes.to(torch.uint8).unflatten(-1, (-1, 4, CHUNK // 4))
    packed: Tensor = parts[..., 0, :] | parts[..., 1, :] << 2 | parts[..., 2, :] << 4 | parts[..., 3, :] << 6
    return packed.contiguous()


def takes(size: int, inner: int, dim: int) -> bool:
    """Whether the kernel computes a model of these sizes: its vectors have 16 numbers, half a head fills them, too."""
    return size % 16 == 0 and inner % 16 == 0 and dim % 32 == 0


class Decoder:
    """A model's layers for tokens that are read with a cache of keys; the weights may not change any more."""

    def __init__(
        self,
        layers: Sequence[LayerWeights],
        *,
        embedding: Tensor,
        norm: Tensor,
        cos: Tensor,
        sin: Tensor,
        num_heads: int,
        num_kv_heads: int,
        eps: float,
        cap: float,
    ) -> None:
        """embedding [V, C], gain norm [C], cos and sin [T, D], all float32; ValueError without the C++ kernels."""
        library = native.library()
        if library is None:
            raise ValueError("the C++ kernels could not be compiled")
        self._decode = library.smelter_decode
        self._kept: list[Tensor] = []  # what the structures point to
        self.vocab_size, self.size = embedding.shape
        self.max_len, dim = cos.shape
        self._layers = (_Layer * len(layers))(*map(self._layer, layers))
        first = layers[0]
        pointers = map(self._keep, (embedding, norm, cos, sin))
        sizes = len(layers), self.size, num_heads, num_kv_heads, dim, first.down.trits.shape[1]
        in_blocks = first.qkv.activation_quant == "block256"
        self._decoder = _Decoder(self._layers, *pointers, *sizes, int(in_blocks), eps, cap)

    def _keep(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        tensor = tensor.detach().contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _linear(self, layers: Stacked) -> _Linear:
        outputs, inputs = layers.trits.shape
        scales = F.pad(layers.columns, (0, -outputs % OUTPUTS))
        return _Linear(self._keep(pack(layers.trits)), self._keep(scales), outputs, inputs)

    def _layer(self, layer: LayerWeights) -> _Layer:
        return _Layer(
            *map(self._linear, (layer.qkv, layer.out, layer.gate_up, layer.down)),
            *map(self._keep, (layer.attention_norm, layer.query_norm, layer.key_norm)),
            *map(self._keep, (layer.attention_sub_norm, layer.mlp_norm, layer.mlp_sub_norm)),
        )

    def __call__(self, tokens: Tensor, positions: Tensor, cache: KeyCache) -> Tensor:
        """Hidden states [B, T, C], after the last norm, of tokens [B, T] at `positions` [B, T] of the cache's rows.

        Each sees its row's cache up to itself: what was read before, or stands before it here. IndexError for tokens,
        positions or rows that are none, TypeError for a cache that is not in float32.
        """
        if cache.keys.dtype != torch.float32:
            raise TypeError(f"a cache in {cache.keys.dtype}: the kernel reads float32")
        batch, length = tokens.shape
        keys, values, positions = cache.keys, cache.values, positions.expand_as(tokens)
        num_slots, max_len = keys.shape[1], keys.shape[3]
        if not batch * length:
            return tokens.new_empty(batch, length, self.size, dtype=torch.float32)
        for name, least, most, end in (
            ("token", *tokens.aminmax(), self.vocab_size),
            ("position", *positions.aminmax(), min(max_len, self.max_len)),
            ("row", cache.first, cache.first + batch - 1, num_slots),
        ):
            if least < 0 or most >= end:
                raise IndexError(f"{name} {int(least if least < 0 else most)}: must lie between 0 and {end - 1}")
        slots = torch.arange(cache.first, cache.first + batch)[:, None].expand(batch, length)
        step = max(1, MAX_ROWS // batch)
        parts = [slice(start, start + step) for start in range(0, length, step)]
        hidden = [self._run(tokens[:, at], slots[:, at], positions[:, at], keys, values) for at in parts]
        return hidden[0] if len(hidden) == 1 else torch.cat(hidden, dim=1)

    def _run(self, tokens: Tensor, slots: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        rows = [x.to(torch.int64).contiguous() for x in (tokens, slots, positions)]
        hidden = torch.empty(*tokens.shape, self.size)
        self._decode(
            ctypes.byref(self._decoder),
            *map(native.address, rows),
            tokens.numel(),
            native.address(keys),
            native.address(values),
            ctypes.c_int64(keys.shape[1]),
            ctypes.c_int64(keys.shape[3]),
            torch.get_num_threads(),
            native.address(hidden),
        )
        return hidden
