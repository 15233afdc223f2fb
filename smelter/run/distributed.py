"""Ranks: start and end a process group, reduce numbers, print once.

Under `torchrun` the environment names rank, world size and where to meet; without it there is one rank and every
function here is a no-op. Gloo carries CPU tensors, NCCL carries CUDA tensors.
"""

import contextlib
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from smelter.base import require

ANNOUNCED = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")
"""What `torchrun` sets, and all of which a process group needs."""
START = "start with `torchrun --nproc-per-node N -m smelter train ...`, or unset WORLD_SIZE, RANK and LOCAL_RANK"


def start(device: torch.device) -> None:
    """Join the process group that torchrun announced; nothing to do for a single process.

    Schedulers and shells set some of its variables too: a WORLD_SIZE of 1 without the others is a single process.
    ConfigError where there are to be more and something is missing or is no number.
    """
    if _is_announced() and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def _is_announced() -> bool:
    """Whether the environment has all that a process group needs. ConfigError where it has a part of it."""
    size = _announced_number("WORLD_SIZE")
    _announced_number("RANK"), _announced_number("MASTER_PORT")
    missing = [name for name in ANNOUNCED if not os.environ.get(name)]
    if not missing:
        return True
    require(size <= 1, f"WORLD_SIZE={size} in the environment, but no {' and no '.join(missing)}: {START}")
    return False


def _announced_number(name: str) -> int:
    """A number of the environment, 0 where it is not set; ConfigError for something else."""
    value = os.environ.get(name) or "0"
    require(value.isdecimal(), f"{name}={value} in the environment: must be a number: {START}")
    return int(value)


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """This process's number on its machine: which GPU it takes."""
    return _announced_number("LOCAL_RANK")


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return rank() == 0


def print0(*values: object) -> None:
    """Print on the main process only, at once."""
    if is_main():
        print(*values, flush=True)


def barrier() -> None:
    """Wait for every process."""
    if dist.is_initialized():
        dist.barrier()


def averaging(module: nn.Module, device: torch.device) -> nn.Module:
    """The module with gradients that become their mean over all ranks in the backward pass."""
    if world_size() == 1:
        return module
    return DistributedDataParallel(module, device_ids=[device.index] if device.type == "cuda" else None)


def micro_step(module: nn.Module, *, is_last: bool) -> contextlib.AbstractContextManager[None]:
    """One of several passes through an `averaging` module: gradients are added up, and averaged in the last one."""
    if isinstance(module, DistributedDataParallel) and not is_last:
        return module.no_sync()
    return contextlib.nullcontext()


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor summed over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def _number(value: float) -> torch.Tensor:
    """A number where the process group can reach it."""
    on_gpu = dist.is_initialized() and dist.get_backend() == "nccl"
    return torch.tensor(value, dtype=torch.float64, device="cuda" if on_gpu else "cpu")


def agree(value: float) -> float:
    """The main process's value on every rank, so that decisions by the clock are taken together."""
    tensor = _number(value)
    if dist.is_initialized():
        dist.broadcast(tensor, src=0)
    return float(tensor)


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank (a signal may reach only one of them)."""
    return bool(sum_over_ranks(_number(flag)))
