"""The activations' side of the CUDA path in Triton: quantise, RMSNorm + quantise, int8 product.

Each is an operation of its own for PyTorch (`torch.ops.smelter.*`), so that torch.compile leaves it whole and
fuses around it, and each equals `reference`:

- `quantize_rows`: absmax int8 per token. One read and one write of the activations.
- `rms_norm_quantize`: the norm in front of a ternary layer with the quantisation behind it, so that the normed
  activations never reach memory in 16 bits.
- `int8_matmul`: int8 x trits with int32 sums on tensor cores and both scales in the epilogue, so that the int32
  product, four times the size of its operands, never reaches memory. From sm_80 on only (see `capability`).

Nothing here waits for the device, except that `int8_matmul` times its tile shapes at the first call for a shape:
call it once before capturing a CUDA graph. The gradients are the caller's: quantisers are straight-through.

With TRITON_INTERPRET=1 all run on CPU tensors. Triton's interpreter truncates where a GPU rounds to bf16, so
rounding to bf16 is written out in integers; rounding to an integer adds and subtracts 1.5 x 2^23.
"""
# Kernels are Triton's language in Python's syntax; their parameters have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 4096
"""Most elements of a row that a program holds in registers; what lies beyond is read twice."""

ROUNDER = tl.constexpr(12_582_912.0)
"""1.5 x 2^23: float32 values of this size are the integers, so that adding it rounds, half to even."""


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """float32 `x` in `dtype`, rounded half to even."""
    if dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def _peak_bits(x):
    """The largest magnitude of float32 `x` as bits: these order like the values, and NaN is above them all."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)


@triton.jit
def _absmax_scale(peak_bits):
    """The float32 scale of a row. NaN stays NaN, so that a run that diverges is seen to diverge."""
    peak = peak_bits.to(tl.float32, bitcast=True)
    return tl.div_rn(tl.where(peak < 1e-5, 1e-5, peak), 127.0)


@triton.jit
def _quantized(x, scale):
    """float32 `x` in units of `scale`, rounded, in int8; zero where that is not a number."""
    units = tl.div_rn(x, scale)
    units = tl.where(units == units, units, 0.0)
    return ((units + ROUNDER) - ROUNDER).to(tl.int8)


@triton.jit
def quantize_rows_kernel(x_ptr, q_ptr, scale_ptr, columns, BLOCK: tl.constexpr):
    """One program a row [columns] of x."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * columns
    q_ptr += row * columns
    offsets = tl.arange(0, BLOCK)
    first = tl.load(x_ptr + offsets, mask=offsets < columns, other=0.0).to(tl.float32)
    peak = _peak_bits(first)
    for start in range(BLOCK, columns, BLOCK):
        more = tl.load(x_ptr + start + offsets, mask=start + offsets < columns, other=0.0).to(tl.float32)
        peak = tl.maximum(peak, _peak_bits(more))
    scale = _absmax_scale(peak)
    tl.store(scale_ptr + row, scale)
    tl.store(q_ptr + offsets, _quantized(first, scale), mask=offsets < columns)
    for start in range(BLOCK, columns, BLOCK):
        more = tl.load(x_ptr + start + offsets, mask=start + offsets < columns, other=0.0).to(tl.float32)
        tl.store(q_ptr + start + offsets, _quantized(more, scale), mask=start + offsets < columns)


@triton.jit
def _load_normed(x_ptr, weight_ptr, offsets, columns, rstd):
    """float32 values of the norm's output, rounded to x's dtype."""
    x = tl.load(x_ptr + offsets, mask=offsets < columns, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + offsets, mask=offsets < columns, other=0.0)
    return round_to(x * rstd * weight, x_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def rms_norm_quantize_kernel(
    x_ptr, weight_ptr, q_ptr, scale_ptr, rstd_ptr, columns, num_columns, eps, BLOCK: tl.constexpr
):
    """One program a row [columns] of x; `num_columns` is the same as a float."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * columns
    q_ptr += row * columns
    offsets = tl.arange(0, BLOCK)
    first = tl.load(x_ptr + offsets, mask=offsets < columns, other=0.0).to(tl.float32)
    squares = first * first
    for start in range(BLOCK, columns, BLOCK):
        more = tl.load(x_ptr + start + offsets, mask=start + offsets < columns, other=0.0).to(tl.float32)
        squares += more * more
    rstd = tl.rsqrt(tl.div_rn(tl.sum(squares), num_columns) + eps)
    tl.store(rstd_ptr + row, rstd)
    weight = tl.load(weight_ptr + offsets, mask=offsets < columns, other=0.0)
    normed = round_to(first * rstd * weight, x_ptr.dtype.element_ty).to(tl.float32)
    peak = _peak_bits(normed)
    for start in range(BLOCK, columns, BLOCK):
        peak = tl.maximum(peak, _peak_bits(_load_normed(x_ptr, weight_ptr, start + offsets, columns, rstd)))
    scale = _absmax_scale(peak)
    tl.store(scale_ptr + row, scale)
    tl.store(q_ptr + offsets, _quantized(normed, scale), mask=offsets < columns)
    for start in range(BLOCK, columns, BLOCK):
        more = _load_normed(x_ptr, weight_ptr, start + offsets, columns, rstd)
        tl.store(q_ptr + start + offsets, _quantized(more, scale), mask=start + offsets < columns)


def row_launch(columns: int) -> dict[str, int]:
    """Block and warps for rows of that many elements: eight or more elements a thread, up to eight warps."""
    block = min(triton.next_power_of_2(columns), MAX_BLOCK)
    return {"BLOCK": block, "num_warps": min(max(block // 256, 1), 8)}


def _tile(block_m: int, block_n: int, block_k: int, num_stages: int, num_warps: int) -> triton.Config:
    sizes = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "GROUP_M": 8}
    return triton.Config(sizes, num_stages=num_stages, num_warps=num_warps)


TILES = [
    _tile(64, 64, 64, 4, 4),
    _tile(64, 128, 128, 4, 4),
    _tile(128, 64, 128, 4, 4),
    _tile(128, 128, 64, 4, 8),
    _tile(128, 128, 128, 3, 8),
    _tile(128, 256, 128, 3, 8),
]
"""Tried once per shape and the fastest kept. Those that need more shared memory than there is drop out, and the
last needs more registers than Ampere has."""


@triton.autotune(
    # The interpreter has no clock that means anything.
    configs=TILES[:1] if triton.knobs.runtime.interpret else TILES,
    key=["size_class", "columns", "inner"],
)
@triton.heuristics({"EVEN_K": lambda args: args["inner"] % args["BLOCK_K"] == 0})
@triton.jit(do_not_specialize=["rows", "size_class"])
def int8_matmul_kernel(
    q_ptr,
    trits_ptr,
    row_scale_ptr,
    column_scale_ptr,
    out_ptr,
    rows,
    columns,
    inner,
    size_class,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """One program a tile of out [rows, columns] = q [rows, inner] x trits [columns, inner]^T, times the scales.

    Programs go through groups of GROUP_M tile rows column by column, so that what runs at one time shares
    operands in the L2 cache. `size_class` only tells the tuner which row counts are alike.
    """
    program = tl.program_id(0)
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(columns, BLOCK_N)
    group = program // (GROUP_M * tiles_n)
    group_rows = min(tiles_m - group * GROUP_M, GROUP_M)
    tile_m = group * GROUP_M + (program % (GROUP_M * tiles_n)) % group_rows
    tile_n = (program % (GROUP_M * tiles_n)) // group_rows

    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows beyond the end read others again, which needs no mask in the loop; they are not stored.
    left = q_ptr + (m % rows).to(tl.int64)[:, None] * inner + k[None, :]
    right = trits_ptr + (n % columns).to(tl.int64)[None, :] * inner + k[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for start in range(0, inner, BLOCK_K):
        if EVEN_K:
            a = tl.load(left)
            b = tl.load(right)
        else:
            a = tl.load(left, mask=start + k[None, :] < inner, other=0)
            b = tl.load(right, mask=start + k[:, None] < inner, other=0)
        sums = tl.dot(a, b, sums, out_dtype=tl.int32)
        left += BLOCK_K
        right += BLOCK_K

    row_scale = tl.load(row_scale_ptr + m, mask=m < rows, other=0.0)
    column_scale = tl.load(column_scale_ptr + n, mask=n < columns, other=0.0)
    out = sums.to(tl.float32) * (row_scale[:, None] * column_scale[None, :])
    pointers = out_ptr + m.to(tl.int64)[:, None] * columns + n[None, :]
    tl.store(pointers, round_to(out, out_ptr.dtype.element_ty), mask=(m[:, None] < rows) & (n[None, :] < columns))


@torch.library.custom_op("smelter::quantize_rows", mutates_args=())
def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.quantize_activations` per token of x [M, K], float32, bf16 or fp16.

    Returns (q, scale): q int8 [M, K], scale float32 [M, 1].
    """
    x = x.contiguous()
    rows, columns = x.shape
    q = torch.empty_like(x, dtype=torch.int8)
    scale = x.new_empty(rows, 1, dtype=torch.float32)
    with torch.cuda.device_of(x):  # Triton launches on the current device; for CPU tensors this does nothing
        quantize_rows_kernel[(rows,)](x, q, scale, columns, **row_launch(columns), enable_fp_fusion=False)
    return q, scale


@quantize_rows.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], 1, dtype=torch.float32)


@torch.library.custom_op("smelter::rms_norm_quantize", mutates_args=())
def rms_norm_quantize(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.rms_norm` of x [M, K] (float32, bf16 or fp16) with gain `weight` [K], quantised per token.

    Returns (q, scale, rstd): q int8 [M, K]; scale float32 [M, 1]; rstd float32 [M, 1], one over the root mean
    square, which the backward pass needs.
    """
    x, weight = x.contiguous(), weight.float().contiguous()
    rows, columns = x.shape
    q = torch.empty_like(x, dtype=torch.int8)
    scale, rstd = (x.new_empty(rows, 1, dtype=torch.float32) for _ in range(2))
    with torch.cuda.device_of(x):
        rms_norm_quantize_kernel[(rows,)](
            x, weight, q, scale, rstd, columns, float(columns), eps, **row_launch(columns), enable_fp_fusion=False
        )
    return q, scale, rstd


@rms_norm_quantize.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    scale, rstd = (x.new_empty(x.shape[0], 1, dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape, dtype=torch.int8), scale, rstd


@torch.library.custom_op("smelter::int8_matmul", mutates_args=())
def int8_matmul(q: Tensor, trits: Tensor, row_scale: Tensor, column_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """q [M, K] x trits [N, K]^T, both int8, times row_scale [M, 1] and column_scale [N], both float32.

    The sums are exact; the result [M, N] is rounded once to float32 and once to `dtype`, as
    `product.float() * (row_scale * column_scale)` is.
    """
    q, trits = q.contiguous(), trits.contiguous()
    row_scale, column_scale = row_scale.contiguous(), column_scale.contiguous()
    (rows, inner), columns = q.shape, trits.shape[0]
    out = q.new_empty(rows, columns, dtype=dtype)

    def grid(tile: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(rows, tile["BLOCK_M"]) * triton.cdiv(columns, tile["BLOCK_N"]),)

    with torch.cuda.device_of(q):
        int8_matmul_kernel[grid](
            q, trits, row_scale, column_scale, out, rows, columns, inner, rows.bit_length(), enable_fp_fusion=False
        )
    return out


@int8_matmul.register_fake
def _(q: Tensor, trits: Tensor, row_scale: Tensor, column_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return q.new_empty(q.shape[0], trits.shape[0], dtype=dtype)
