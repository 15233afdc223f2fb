"""Every kernel compiles for every GPU that the capability table sends it to, with the instructions meant.

Triton compiles ahead of time without a GPU: to PTX, and with its own `ptxas` to machine code. What is read here
is whether the integer product is on tensor cores, whether memory is read 16 bytes at a time, and whether registers
sufficed. What is computed, rounding too, is checked in Triton's interpreter (`test_linear_triton.py`).
"""

import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from smelter.kernels import linear_triton as triton_ops
from smelter.kernels import weights_triton as triton_weights
from smelter.kernels.capability import cuda_table
from smelter.kernels.linear_triton import int8_matmul_kernel, quantize_rows_kernel, rms_norm_quantize_kernel
from smelter.kernels.weights_triton import magnitude_sums_kernel, trits_kernel

TRITON_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "i8"}
ROW_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TURING, AMPERE, HOPPER = 75, 80, 90
TARGETS = [TURING, AMPERE, HOPPER]
"""Ada and the smaller Amperes take sm_80's instructions."""

Constants = dict[str, Any]


def jit_function(kernel: Any) -> Any:
    """The function below autotuning and heuristics."""
    while not isinstance(kernel, JITFunction):
        kernel = kernel.fn
    return kernel


@cache
def compiled(
    kernel: Any, capability: int, types: tuple[str, ...], constants: tuple[tuple[str, Any], ...], **options: int
) -> Any:
    """The kernel with its runtime arguments of `types`; pointers and integers divisible by 16, as in a real model."""
    function, given = jit_function(kernel), dict(constants)
    runtime = [name for name in function.arg_names if name not in given]
    signature = dict.fromkeys(function.arg_names, "constexpr") | dict(zip(runtime, types, strict=True))
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(function.arg_names)
        if signature[name].startswith("*") or (name in ("columns", "inner", "size") and name not in given)
    }
    source = ASTSource(function, signature=signature, constexprs=given, attrs=attrs)
    return triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": False, **options}
    )


def ptx(kernel: Any) -> str:
    text: str = kernel.asm["ptx"]
    return text


def reads_wide(text: str) -> bool:
    """Whether memory is read 16 bytes at a time, with whatever hint to the caches."""
    return re.search(r"\bld\.global\S*\.v4\b", text) is not None


def local_bytes(kernel: Any, folder: Path) -> int:
    """Bytes a thread keeps in memory for want of registers, from the machine code's own table."""
    path = folder / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    run = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True)
    usage = re.findall(r"(STACK|LOCAL):(\d+)", run.stdout)
    assert {name for name, _ in usage} == {"STACK", "LOCAL"}, run.stdout
    return sum(int(size) for _, size in usage)


def row_kernel(kernel: Any, capability: int, dtype: torch.dtype, columns: int) -> Any:
    types = {
        quantize_rows_kernel: ("*{}", "*i8", "*fp32", "i32"),
        rms_norm_quantize_kernel: ("*{}", "*fp32", "*i8", "*fp32", "*fp32", "i32", "fp32", "fp32"),
    }[kernel]
    launch = triton_ops.row_launch(columns)
    return compiled(
        kernel,
        capability,
        tuple(name.format(TRITON_NAMES[dtype]) for name in types),
        (("BLOCK", launch["BLOCK"]),),
        num_warps=launch["num_warps"],
    )


def weight_kernel(kernel: Any, capability: int, dtype: torch.dtype = torch.int8) -> Any:
    constants: Constants = {"ALIGN": 16, "BLOCK": triton_weights.BLOCK}
    types: tuple[str, ...] = ("*i64", "*fp32", "i32", "i32")
    if kernel is trits_kernel:
        constants |= {"TRIT": triton_weights.TRIT_DTYPES[dtype], "PARTS": triton_weights.MAX_PARTS}
        types = ("*i64", "*fp32", "i32", "i32", "fp32", "i32")
    return compiled(kernel, capability, types, tuple(constants.items()), num_warps=4)


def product_kernel(capability: int, dtype: torch.dtype, tile: Any, even: bool = True) -> Any:
    return compiled(
        int8_matmul_kernel,
        capability,
        ("*i8", "*i8", "*fp32", "*fp32", f"*{TRITON_NAMES[dtype]}", "i32", "i32", "i32", "i32"),
        (*tile.kwargs.items(), ("EVEN_K", even)),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("dtype", ROW_DTYPES, ids=str)
@pytest.mark.parametrize("kernel", [quantize_rows_kernel, rms_norm_quantize_kernel], ids=["rows", "norm"])
def test_row_kernels(kernel: Any, dtype: torch.dtype, capability: int, tmp_path: Path) -> None:
    for columns in (768, 2_048, 9_000):
        code = row_kernel(kernel, capability, dtype, columns)
        text = ptx(code)
        assert f".target sm_{capability}" in text
        assert reads_wide(text)
        assert not re.search(r"\bfma\.", text)  # a product and a sum in one rounding
        assert "mma" not in text
        assert local_bytes(code, tmp_path) == 0


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("dtype", [torch.int8, *ROW_DTYPES], ids=str)
def test_trits(dtype: torch.dtype, capability: int, tmp_path: Path) -> None:
    code = weight_kernel(trits_kernel, capability, dtype)
    text = ptx(code)
    assert reads_wide(text)  # although the address comes from a table
    assert re.search(r"st\.global\.v[24]", text)
    assert "atom" not in text
    assert local_bytes(code, tmp_path) == 0


@pytest.mark.parametrize("capability", TARGETS)
def test_magnitude_sums(capability: int, tmp_path: Path) -> None:
    code = weight_kernel(magnitude_sums_kernel, capability)
    assert reads_wide(ptx(code))
    assert "atom" not in ptx(code)  # whose order of summation would be another every time
    assert local_bytes(code, tmp_path) == 0


def check_tensor_cores(code: Any, capability: int) -> None:
    instruction = {
        AMPERE: r"mma\.sync\.aligned\.m16n8k32\.row\.col(\.satfinite)?\.s32\.s8\.s8\.s32",
        HOPPER: r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.s32\.s8\.s8",
    }[capability]
    assert re.search(instruction, ptx(code))
    assert "cp.async" in ptx(code)  # operands arrive while others are multiplied


@pytest.mark.slow
@pytest.mark.parametrize("capability", [AMPERE, HOPPER])
@pytest.mark.parametrize("tile", triton_ops.TILES, ids=lambda tile: "x".join(map(str, tile.kwargs.values())))
def test_the_integer_product_is_on_tensor_cores(tile: Any, capability: int, tmp_path: Path) -> None:
    code = product_kernel(capability, torch.bfloat16, tile)
    check_tensor_cores(code, capability)
    if (tile, capability) != (triton_ops.TILES[-1], AMPERE):  # there another one is faster
        assert local_bytes(code, tmp_path) <= 32


@pytest.mark.parametrize("capability", [AMPERE, HOPPER])
@pytest.mark.parametrize(
    ("dtype", "even"), [(torch.bfloat16, True), (torch.float16, True), (torch.float32, True), (torch.bfloat16, False)]
)
def test_each_form_of_the_integer_product(dtype: torch.dtype, even: bool, capability: int) -> None:
    check_tensor_cores(product_kernel(capability, dtype, triton_ops.TILES[0], even), capability)


def test_sizes_of_one() -> None:
    """Triton makes a program of its own where an integer is 1, and the integer a constant of it."""
    align: tuple[tuple[str, Any], ...] = (("ALIGN", 1), ("BLOCK", triton_weights.BLOCK))
    tile = triton_ops.TILES[0].kwargs.items()
    ones: list[tuple[Any, tuple[str, ...], tuple[tuple[str, Any], ...]]] = [
        (quantize_rows_kernel, ("*bf16", "*i8", "*fp32"), (("columns", 1), ("BLOCK", 1))),
        (
            rms_norm_quantize_kernel,
            ("*bf16", "*fp32", "*i8", "*fp32", "*fp32", "fp32", "fp32"),
            (("columns", 1), ("BLOCK", 1)),
        ),
        (
            int8_matmul_kernel,
            ("*i8", "*i8", "*fp32", "*fp32", "*fp32", "i32", "i32"),
            (("columns", 1), ("inner", 1), *tile, ("EVEN_K", False)),
        ),
        (magnitude_sums_kernel, ("*i64", "*fp32"), (("size", 1), ("num_parts", 1), *align)),
        (
            trits_kernel,
            ("*i64", "*fp32", "fp32"),
            (("num_weights", 1), ("size", 1), ("num_parts", 1), ("TRIT", tl.int8), ("PARTS", 1), *align),
        ),
    ]
    for kernel, types, constants in ones:
        assert ".entry" in ptx(compiled(kernel, AMPERE, types, constants, num_warps=4))


@triton.jit  # type: ignore[untyped-decorator]
def half_product_kernel(a_ptr, b_ptr, out_ptr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The smallest fp16 product."""
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    product = tl.dot(tl.load(a_ptr + i * BLOCK + j), tl.load(b_ptr + i * BLOCK + j))
    tl.store(out_ptr + i * BLOCK + j, product)


def test_why_turing_gets_no_product() -> None:
    """If this fails, Triton reaches Turing's tensor cores: give the table's row for sm_75 another look."""
    for capability in TARGETS:
        code = compiled(half_product_kernel, capability, ("*fp16", "*fp16", "*fp32"), (("BLOCK", 64),), num_warps=4)
        assert ("mma" in ptx(code)) == (capability != TURING)


def test_the_table_sends_no_product_to_turing() -> None:
    kernels = {
        name: jit_function(value).src
        for module in (triton_ops, triton_weights)
        for name, value in vars(module).items()
        if name.endswith("_kernel")
    }
    assert len(kernels) == 5
    assert [name for name, source in kernels.items() if "tl.dot" in source] == ["int8_matmul_kernel"]
    for works in (False, True):
        row = cuda_table(7, 5, True, works)
        assert row.use_triton
        assert row.int8_product != "triton"
        assert row.attention != "flex"
    for capability in (AMPERE, HOPPER):
        assert cuda_table(capability // 10, capability % 10, True, True).int8_product == "triton"
