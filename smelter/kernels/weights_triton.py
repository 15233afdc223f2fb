"""All weights of one size quantised by two launches in Triton: once per optimizer step, without a pause.

A model has dozens of ternary weights in few shapes. Quantised one by one they cost hundreds of launches; here a
table on the device holds the addresses of all of them. The first pass sums magnitudes in fixed parts, the second
adds the parts up, which gives the scale, and writes trits. Sums are always added in the same order, so that equal
weights give equal trits, on every rank and after a resume. Nothing waits for the device.

No division and no rounding is needed for the trits. `round(w / scale)` is 1 exactly if w > scale / 2: at a tie
round half to even gives 0, and the scale is a bf16 number, so the quotient of the next float32 above
scale / 2 is nearer to the next float32 above 1/2 than to 1/2 itself.
"""
# Kernels are Triton's language in Python's syntax; their parameters have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from smelter.kernels.linear_triton import round_to

BLOCK = 1024
MAX_PARTS = 128
"""Partial sums per weight: enough programs to fill a GPU, few enough that every later one can add them up."""

TRIT_DTYPES = {
    torch.int8: tl.int8,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
}


@triton.jit
def magnitude_sums_kernel(table_ptr, sums_ptr, size, num_parts, ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    """Program (part, weight) writes one partial sum of |W| to sums [weights, num_parts]."""
    part = tl.program_id(0)
    weight = tl.program_id(1)
    values_ptr = tl.multiple_of(tl.load(table_ptr + weight).to(tl.pointer_type(tl.float32)), ALIGN)
    offsets = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(part * BLOCK, size, num_parts * BLOCK):
        sums += tl.abs(tl.load(values_ptr + start + offsets, mask=start + offsets < size, other=0.0))
    tl.store(sums_ptr + weight * num_parts + part, tl.sum(sums))


@triton.jit
def trits_kernel(
    table_ptr,
    sums_ptr,
    num_weights,
    size,
    num_values,
    num_parts,
    TRIT: tl.constexpr,
    PARTS: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (block, weight) writes BLOCK trits, and the first of a weight its scale; num_values is size, a float."""
    block = tl.program_id(0)
    weight = tl.program_id(1)
    parts = tl.arange(0, PARTS)
    total = tl.sum(tl.load(sums_ptr + weight * num_parts + parts, mask=parts < num_parts, other=0.0))
    mean = tl.div_rn(total, num_values)
    scale = round_to(tl.where(mean < 1e-5, 1e-5, mean), tl.bfloat16).to(tl.float32)
    if block == 0:
        tl.store(tl.load(table_ptr + 2 * num_weights + weight).to(tl.pointer_type(tl.float32)), scale)
    values_ptr = tl.multiple_of(tl.load(table_ptr + weight).to(tl.pointer_type(tl.float32)), ALIGN)
    trits_ptr = tl.multiple_of(tl.load(table_ptr + num_weights + weight).to(tl.pointer_type(TRIT)), ALIGN)
    offsets = block * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(values_ptr + offsets, mask=offsets < size, other=0.0)
    half = scale * 0.5
    trits = tl.where(values > half, 1.0, tl.where(values < -half, -1.0, 0.0))
    tl.store(trits_ptr + offsets, trits.to(TRIT), mask=offsets < size)


@functools.lru_cache(maxsize=256)
def _table(device: torch.device, pointers: tuple[int, ...]) -> Tensor:
    """`pointers` on the device. The key is the content, so the cache cannot be out of date."""
    return torch.tensor(pointers, dtype=torch.int64).to(device)


def _check(weights: list[Tensor], trits: list[Tensor], scales: list[Tensor]) -> None:
    if not len(weights) == len(trits) == len(scales):
        raise ValueError(f"{len(weights)} weights, {len(trits)} trits and {len(scales)} scales: one of each, please")
    for weight, trit, scale in zip(weights, trits, scales, strict=True):
        if weight.dtype != torch.float32 or scale.dtype != torch.float32 or trit.dtype not in TRIT_DTYPES:
            raise ValueError(f"weight {weight.dtype}, trits {trit.dtype}, scale {scale.dtype}: not what is quantised")
        if weight.shape != trit.shape or scale.numel() != 1 or not 0 < weight.numel() < 2**31:
            raise ValueError(f"weight {tuple(weight.shape)}, trits {tuple(trit.shape)}, scale {tuple(scale.shape)}")
        if not (weight.is_contiguous() and trit.is_contiguous()):
            raise ValueError("weights and trits must be contiguous")


@torch.library.custom_op("smelter::quantize_weights", mutates_args=("trits", "scales"))
def quantize_weights(weights: list[Tensor], trits: list[Tensor], scales: list[Tensor]) -> None:
    """`reference.quantize_weight` of every weight, written into its trits and its scale.

    weights float32, each of any shape; trits of the same shapes in int8, bf16, fp16 or float32; scales float32
    scalars. The mean behind a scale is added up in another order than PyTorch's, so that a scale may be the
    neighbouring bf16 number; the trits are always those of the scale beside them. Two launches for all weights
    with as many elements. Call it once before capturing a CUDA graph: the table of addresses is made then.
    Raises ValueError for other dtypes, shapes that differ, or tensors that are not contiguous.
    """
    _check(weights, trits, scales)
    groups: dict[tuple[torch.device, int, torch.dtype], list[int]] = {}
    for i, (weight, trit) in enumerate(zip(weights, trits, strict=True)):
        groups.setdefault((weight.device, weight.numel(), trit.dtype), []).append(i)
    for (device, size, dtype), members in groups.items():
        pointers = tuple(tensors[i].data_ptr() for tensors in (weights, trits, scales) for i in members)
        table = _table(device, pointers)
        num_weights, num_blocks = len(members), triton.cdiv(size, BLOCK)
        num_parts = min(num_blocks, MAX_PARTS)
        # Fresh allocations are aligned; a view into one need not be, and wide loads from it would fault.
        align = 16 if all(pointer % 16 == 0 for pointer in pointers[: 2 * num_weights]) else 1
        sums = torch.empty(num_weights, num_parts, device=device)
        with torch.cuda.device_of(sums):  # Triton launches on the current device; for CPU tensors this does nothing
            magnitude_sums_kernel[(num_parts, num_weights)](
                table, sums, size, num_parts, ALIGN=align, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False
            )
            trits_kernel[(num_blocks, num_weights)](
                table,
                sums,
                num_weights,
                size,
                float(size),
                num_parts,
                TRIT=TRIT_DTYPES[dtype],
                PARTS=triton.next_power_of_2(num_parts),
                ALIGN=align,
                BLOCK=BLOCK,
                num_warps=4,
                enable_fp_fusion=False,
            )


@quantize_weights.register_fake
def _(weights: list[Tensor], trits: list[Tensor], scales: list[Tensor]) -> None:
    return None
