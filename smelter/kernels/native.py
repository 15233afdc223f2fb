"""The C++ kernels of the CPU: compiled on the machine, once, and loaded.

They use instructions that PyTorch does not offer by themselves (AVX-512 BF16), and no header of PyTorch, so one
library serves any version of it. torch.compile needs a C++ compiler on a CPU in any case; where there is none, or it
fails, a line says so and the paths in Python are taken.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from torch import Tensor

SOURCES = Path(__file__).with_name("cpu")

FEATURES = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512bf16", "avx512vnni")
"""Instruction sets that the kernels use."""

FLAGS = ("-std=c++20", "-O3", "-fopenmp", "-shared", "-fPIC", "-mfma", *(f"-m{name}" for name in FEATURES))
TIMEOUT = 300
"""Seconds; it takes 5."""


def compiler() -> str | None:
    """The C++ compiler: what CXX names, g++, or clang++; None where there is none."""
    names = [os.environ.get("CXX", ""), "g++", "clang++"]
    return next((path for name in names if name and (path := shutil.which(name))), None)


def cache_folder() -> Path:
    """Where compiled kernels are kept: under XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smelter"


def build(command: str, folder: Path) -> Path:
    """The library in `folder`, compiled by `command` if it is not there yet.

    Its name holds a hash of the sources, the flags and the compiler's version. OSError where the folder cannot be
    written; subprocess.SubprocessError where the compiler fails or does not end.
    """

    def run(*arguments: str) -> str:
        line = [command, *arguments]
        return subprocess.run(line, capture_output=True, text=True, check=True, timeout=TIMEOUT).stdout

    sources = sorted(SOURCES.iterdir())
    parts = [run("--version").encode(), " ".join(FLAGS).encode(), *(path.read_bytes() for path in sources)]
    library = folder / f"kernels-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:16]}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    if sys.stderr.isatty():
        print("compiling the C++ kernels, once, some seconds", file=sys.stderr)
    # Under another name first: processes that start together each make one, and the last to finish replaces it.
    with tempfile.TemporaryDirectory(dir=folder) as room:
        compiled = Path(room) / library.name
        run(*FLAGS, *(str(path) for path in sources if path.suffix == ".cpp"), "-o", str(compiled))
        compiled.replace(library)
    return library


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None, with a line on stderr that says why, where they cannot be had."""
    if platform.system() != "Linux":
        reason = "they are for Linux"
    elif not (command := compiler()):
        reason = "no C++ compiler found (g++ or clang++; CXX names another)"
    else:
        try:
            return ctypes.CDLL(str(build(command, cache_folder())))
        except subprocess.CalledProcessError as error:
            lines = str(error.stderr or error).strip().splitlines()
            reason = f"{command} failed: {next((line for line in lines if 'error' in line), lines[-1])}"
        except subprocess.SubprocessError as error:
            reason = str(error)
        except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
            reason = f"{error} (XDG_CACHE_HOME names another folder to keep them in)"
    print(f"no C++ kernels, slower ones instead: {reason}", file=sys.stderr)
    return None


def address(tensor: Tensor | None) -> ctypes.c_void_p:
    """Where a contiguous tensor's numbers begin, for a call; null for None."""
    if tensor is None:
        return ctypes.c_void_p(None)
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())
