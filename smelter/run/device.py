"""What this machine computes with: device, precision, compiler, and the peak it reaches.

Decided once, at the start, and said: `smelter train` prints the line that `Machine.describe` gives.
"""

import ctypes
import os
import shutil
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from smelter.base import ConfigError
from smelter.config import TrainingConfig
from smelter.kernels import capability_of
from smelter.run import distributed

Precision = Literal["auto", "fp32", "bf16", "fp16"]


def pick_device(name: str) -> torch.device:
    """The device called `name`, of this rank; "auto" is the GPU if there is one. ConfigError for one that is not."""
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        device = torch.device(f"cuda:{distributed.local_rank()}" if kind == "cuda" else kind)
    except RuntimeError:
        raise ConfigError(f"device {name!r}: unknown: use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r}: use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {name!r}: this PyTorch sees no CUDA GPU: use cpu, or scripts/setup_cuda.sh")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name!r}: there are {torch.cuda.device_count()} CUDA devices here: use auto or cpu")
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


@dataclass(frozen=True)
class Machine:
    """Where a training run computes, and how. From `Machine.of`."""

    device: torch.device
    dtype: torch.dtype
    """What matrix products are computed in."""
    use_compile: bool
    keeps_freed_memory: bool
    rank: int
    """This process's number among those that train together, from 0."""
    world_size: int
    """Their number."""

    @classmethod
    def of(cls, config: TrainingConfig) -> "Machine":
        """What the recipe asks for of what is here; joins the other processes. ConfigError for what is not here."""
        device = pick_device(config.device)
        distributed.start(device)
        return cls(
            device=device,
            dtype=pick_dtype(config.precision, device, is_training=True),
            use_compile=can_compile(config, device),
            keeps_freed_memory=device.type == "cpu" and keep_freed_memory(),
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )

    @cached_property
    def peak_flops(self) -> float:
        """FLOP/s of a large matrix product on this device, measured when it is first asked for."""
        return measure_peak_flops(self.device, self.dtype)

    def peak_memory_mib(self) -> float:
        """Most memory used so far, in MiB: allocated on the GPU, or resident of this process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)

    def describe(self) -> str:
        """One line: where and how the run computes, and which kernels it takes."""
        is_gpu = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if is_gpu else f"{torch.get_num_threads()} threads"
        how = "compiled blocks" if self.use_compile else "eager"
        peak = f"measured peak {self.peak_flops / 1e9:,.0f} GFLOP/s"
        kernels, computing = capability_of(self.device).describe(), str(self.dtype).removeprefix("torch.")
        return f"{name} | {kernels} | computing in {computing}, {how} | {peak}"
