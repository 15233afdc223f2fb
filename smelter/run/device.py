"""What this machine computes with: device, precision, compiler, and the peak it reaches.

Decided once, at the start, and said: `smelter train` prints the line that `describe` gives.
"""

import ctypes
import os
import shutil
import sys
import time
from typing import Literal

import torch

from smelter.base import ConfigError
from smelter.config import TrainingConfig
from smelter.kernels import capability_of
from smelter.run import distributed

Precision = Literal["auto", "fp32", "bf16", "fp16"]


def pick_device(name: str) -> torch.device:
    """The device called `name`, of this rank; "auto" is the GPU if there is one. ConfigError for one that is not."""
    wanted = name
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{distributed.local_rank()}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device {wanted!r}: unknown: use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {wanted!r}: use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {wanted!r}: this PyTorch sees no CUDA GPU: use cpu, or scripts/setup_cuda.sh")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device {wanted!r}: there are {torch.cuda.device_count()} CUDA devices here: use auto or cpu"
        )
    return device


def pick_dtype(precision: Precision, device: torch.device, *, is_training: bool = False) -> torch.dtype:
    """What to compute in. ConfigError for fp16 on a CPU.

    auto is bf16 where the hardware multiplies it, else fp16 on CUDA and fp32 on a CPU. A CPU takes bf16 by itself only
    for training: reading and writing, fp32 is exact there and no slower at small batches.
    """
    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError("precision fp16 needs a GPU: use auto, bf16 or fp32 on a CPU")
    if precision in named:
        return named[precision]
    return capability_of(device).dtype if is_training or device.type == "cuda" else torch.float32


def can_compile(config: TrainingConfig, device: torch.device) -> bool:
    """Whether to compile; says so once where it is wanted and no compiler is there."""
    if not config.use_torch_compile:
        return False
    if device.type == "cpu" and not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")):
        distributed.print0("no C++ compiler found: training without torch.compile, which is slower (install g++)")
        return False
    return True


def keep_freed_memory() -> bool:
    """Let glibc keep memory that tensors free for the next ones, instead of handing it back and asking anew.

    Every large tensor would else be new pages, zeroed by the system at first touch: 4% of a training step. True where
    it was done; another C library, and allocators that replace malloc, manage on their own.
    """
    try:
        library = ctypes.CDLL(None)
        is_glibc = hasattr(library, "gnu_get_libc_version")
    except (OSError, TypeError):  # no C library of that kind
        return False
    trim_threshold, mmap_threshold = -1, -3  # from malloc.h
    return is_glibc and all(library.mallopt(name, 2**30) for name in (mmap_threshold, trim_threshold))


def measure_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product here and now: the 100% of the MFU that training reports."""
    size = 8_192 if device.type == "cuda" else 1_024
    a = torch.randn(size, size, device=device).to(dtype)
    best = 0.0
    for _ in range(6):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def peak_memory_mib(device: torch.device) -> float:
    """Most memory used so far, in MiB: allocated on the GPU, or resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def describe(device: torch.device, dtype: torch.dtype, use_compile: bool, peak_flops: float) -> str:
    """One line: where and how the run computes, and which kernels it takes."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    how = "compiled blocks" if use_compile else "eager"
    peak = f"measured peak {peak_flops / 1e9:,.0f} GFLOP/s"
    kernels, computing = capability_of(device).describe(), str(dtype).removeprefix("torch.")
    return f"{name} | {kernels} | computing in {computing}, {how} | {peak}"
