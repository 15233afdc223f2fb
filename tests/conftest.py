"""What every test gets: one thread, no network beyond this machine, GPU tests only where a GPU is."""

import gc
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before anything imports torch: small models are fastest on one thread, and test processes do not fight.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Libraries that would look for models or report home.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import pytest
from hypothesis import settings

# Shared machines are slow now and then; a slow example is not a wrong one.
settings.register_profile("smelter", deadline=None)
settings.load_profile("smelter")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests without a GPU, unless SMELTER_REQUIRE_GPU demands one."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items or os.environ.get("SMELTER_REQUIRE_GPU"):
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish() -> None:
    """Modules and collected tests are no garbage: looking through them takes 0.3 s whenever somebody collects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that reaches for another machine fails, and says where to."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test connects to {address}: no network in tests")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture
def disk_events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is fsynced (its name; `~` for a temporary file) and renamed (`-> ` and its new name), in order."""
    events: list[str] = []
    originals: dict[str, Callable[..., Any]] = {"replace": os.replace, "rename": Path.rename, "fsync": os.fsync}

    def spy_fsync(descriptor: int) -> None:
        name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append("~" if name.endswith(".tmp") else name)
        originals["fsync"](descriptor)

    def spy_replace(source: Path, target: Path) -> None:
        events.append(f"-> {target.name}")
        originals["replace"](source, target)

    def spy_rename(self: Path, target: Path) -> Path:
        events.append(f"-> {target.name}")
        renamed: Path = originals["rename"](self, target)
        return renamed

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    monkeypatch.setattr(Path, "rename", spy_rename)
    return events


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 2 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no permission to mount: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)
