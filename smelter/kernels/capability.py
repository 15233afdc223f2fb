"""What a device computes well, and so which kernels a run takes: one table, looked up once and said.

Tensor cores decide. Turing (sm_75) has them for fp16 and int8, but Triton does not reach them there: it
compiles an fp16 product to plain multiply-adds and no int8 product at all. So on Turing every matrix product
goes to cuBLAS, attention included, and Triton does element-wise and reduction kernels only. From Ampere
(sm_80) on, bf16 and Triton's own products are on tensor cores. A CPU multiplies int8 faster than floats where
it has AVX-512 VNNI or AMX.
"""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch

from smelter.kernels import native

Int8Product = Literal["cpu", "cublas", "triton", "none"]
AttentionPath = Literal["blocked", "tiled", "flex"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Capability:
    """The path that one device takes; `describe` says it in a line."""

    name: str
    """The device as the table knows it, such as "CPU with int8" or "CUDA sm_75"."""

    dtype: torch.dtype
    """Preferred compute dtype: the narrowest float that matrix products are native in and training is stable in."""

    int8_product: Int8Product
    """Who multiplies int8 activations with trits: `torch._int_mm` on the CPU ("cpu") or through cuBLAS ("cublas",
    which takes more than 16 rows and both other sizes in multiples of 8), `triton_ops.int8_matmul` ("triton"),
    or nobody ("none"): the integers are then multiplied as floats of `dtype`, which is as exact."""

    attention: AttentionPath
    """Soft-capped attention in blocks of queries on batched products ("blocked"), by FlexAttention ("flex"), or by
    the CPU's own kernel ("tiled"), which is for bf16 and leaves other dtypes and odd head sizes to the blocks."""

    use_triton: bool
    """Whether the element-wise and reduction kernels of `triton_ops` run here."""

    def describe(self) -> str:
        """One line for the log of a run."""
        products = {
            "cpu": "int8 products",
            "cublas": "int8 products by cuBLAS",
            "triton": "int8 products by Triton",
            "none": f"products in {str(self.dtype).removeprefix('torch.')}",
        }[self.int8_product]
        attention = {"blocked": "attention in blocks", "tiled": "attention in tiles", "flex": "FlexAttention"}
        kernels = ", Triton kernels" if self.use_triton else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.name}: {dtype}, {products}, {attention[self.attention]}{kernels}"


def cpu_table(has_bf16: bool, has_int8: bool, has_tiles: bool = False) -> Capability:
    """The table's rows for CPUs, by whether bf16 and int8 products are native and our kernels are there."""
    return Capability(
        name="CPU with int8" if has_int8 else "CPU without int8",
        dtype=torch.bfloat16 if has_bf16 else torch.float32,
        int8_product="cpu" if has_int8 else "none",
        attention="tiled" if has_tiles else "blocked",
        use_triton=False,
    )


def cuda_table(major: int, minor: int, has_triton: bool, int8_mm_works: bool) -> Capability:
    """The table's rows for CUDA, by compute capability, whether Triton is installed, and `int8_mm_works` here."""
    name = f"CUDA sm_{major}{minor}"
    cublas: Int8Product = "cublas" if int8_mm_works else "none"
    if (major, minor) < (7, 5):  # Volta and older: no int8 tensor cores, and Triton does not compile for them
        return Capability(name, torch.float16, "none", "blocked", use_triton=False)
    if major < 8:  # Turing
        return Capability(name, torch.float16, cublas, "blocked", use_triton=has_triton)
    if not has_triton:
        return Capability(f"{name} without Triton", torch.bfloat16, cublas, "blocked", use_triton=False)
    return Capability(name, torch.bfloat16, "triton", "flex", use_triton=True)


def int8_mm_works(device: torch.device) -> bool:
    """Whether `torch._int_mm` runs on this CUDA device and gives the exact product, tried on small shapes.

    Waits for the device. Shapes are those of a linear layer: [M, K] x [N, K]^T.
    """
    generator = torch.Generator().manual_seed(0)
    for rows, inputs, outputs in ((32, 64, 40), (128, 768, 256), (264, 2_048, 72)):
        a = torch.randint(-127, 128, (rows, inputs), generator=generator)
        b = torch.randint(-1, 2, (outputs, inputs), generator=generator)
        try:
            product = torch._int_mm(a.to(device, torch.int8), b.to(device, torch.int8).T)
        except RuntimeError:  # what PyTorch raises where cuBLAS has no such product
            return False
        if not torch.equal(product.cpu().double(), a.double() @ b.double().T):
            return False
    return True


def _cpu_features() -> dict[str, bool]:
    get_capabilities = getattr(torch.cpu, "get_capabilities", None)
    if get_capabilities is not None:
        return dict(get_capabilities())
    has_amx = bool(torch.cpu._is_amx_tile_supported())
    return {
        "avx512_vnni": bool(torch.cpu._is_vnni_supported()),
        "avx512_bf16": bool(torch.cpu._is_avx512_bf16_supported()),
        "amx_int8": has_amx,
        "amx_bf16": has_amx,
    }


def cpu_has_int8() -> bool:
    """Whether the CPU multiplies int8 faster than floats (AVX-512 VNNI or AMX)."""
    features = _cpu_features()
    return bool(features.get("avx512_vnni") or features.get("amx_int8"))


def cpu_has_bf16() -> bool:
    """Whether matrix products in bf16 are native (AVX-512 BF16, AMX); emulated ones are far slower than fp32."""
    features = _cpu_features()
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))


def cpu_has_kernels() -> bool:
    """Whether the C++ kernels run: AVX-512 with BF16 and VNNI, and a compiler."""
    features = _cpu_features()
    return bool(features.get("avx512_bf16") and features.get("avx512_vnni")) and native.library() is not None


def cpu_has_tiles() -> bool:
    """Whether attention runs in tiles on this CPU: not with AMX, which the library's products use and ours do not."""
    return not _cpu_features().get("amx_bf16") and cpu_has_kernels()


@functools.cache
def capability(device: torch.device) -> Capability:
    """The path of this device, decided at the first call. ValueError for devices other than CPU and CUDA."""
    if device.type == "cpu":
        return cpu_table(cpu_has_bf16(), cpu_has_int8(), cpu_has_tiles())
    if device.type != "cuda":
        raise ValueError(f"no kernels for device {device}: use cpu or cuda")
    major, minor = torch.cuda.get_device_capability(device)
    has_triton = importlib.util.find_spec("triton") is not None
    return cuda_table(major, minor, has_triton, int8_mm_works(device))


def _constant(function: _Function) -> _Function:
    """`torch.compiler.assume_constant_result`, which would load the compiler, a second, for who compiles nothing."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant
def int8_product(device: torch.device) -> Int8Product:
    """How this device multiplies int8; a constant to the compiler."""
    return capability(device).int8_product


@_constant
def uses_triton(device: torch.device) -> bool:
    """Whether Triton's kernels run on this device; a constant to the compiler."""
    return capability(device).use_triton


@_constant
def attends_in_tiles(device: torch.device) -> bool:
    """Whether the CPU's own attention runs on this device; a constant to the compiler."""
    return capability(device).attention == "tiled"
