"""What this machine computes with: device, precision, compiler, and the peak it reaches.

Decided once, at the start, and said: `smelter train` prints the line that `describe` gives.
"""

import ctypes
import os
import shutil
import time

import torch

from smelter.base.errors import ConfigError
from smelter.config import TrainingConfig
from smelter.kernels.capability import capability
from smelter.run import distributed


def pick_device(name: str) -> torch.device:
    """The device of this rank. Raises ConfigError where CUDA is asked for and absent, or the name is unknown."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{distributed.local_rank()}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f'training.device = "{name}": not a device: use auto, cpu, cuda or cuda:N') from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f'training.device = "{name}": this PyTorch sees no CUDA GPU: use cpu, or scripts/setup_cuda.sh'
        )
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f'training.device = "{name}": use auto, cpu, cuda or cuda:N')
    return device


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Compute dtype: bf16 where the hardware multiplies it, else fp16 on CUDA and fp32 on CPU."""
    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError('training.precision = "fp16" needs a GPU: use "auto", "bf16" or "fp32" on a CPU')
    if precision in named:
        return named[precision]
    return capability(device).dtype


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
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def describe(device: torch.device, dtype: torch.dtype, use_compile: bool, peak_flops: float) -> str:
    """One line: where and how the run computes, and which kernels it takes."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    how = "compiled blocks" if use_compile else "eager"
    peak = f"measured peak {peak_flops / 1e9:,.0f} GFLOP/s"
    return (
        f"{name} | {capability(device).describe()} | computing in {str(dtype).removeprefix('torch.')}, {how} | {peak}"
    )
