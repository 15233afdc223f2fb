"""The real llama.cpp for tests: where `scripts/build_llama_cpp.sh` put it, its server, its logits."""

import contextlib
import json
import os
import shlex
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from smelter.export.card import server_command

ROOT = Path(__file__).resolve().parents[2]
VERSION = "0.3.36"


def llama_cpp_folder() -> Path:
    """The folder with bin/, lib/ and include/; skips the test where it was not built."""
    default = Path.home() / ".cache" / "foundry-tests" / f"llama.cpp-{VERSION}"
    folder = Path(os.environ.get("LLAMA_CPP_DIR") or default)
    if not (folder / "bin" / "llama-server").exists():
        pytest.skip(f"no llama.cpp in {folder}: run scripts/build_llama_cpp.sh first")
    return folder


def build_program(folder: Path, source: Path, out: Path) -> Path:
    """A program of one C++ file, compiled against the library."""
    program, lib = out / source.stem, folder / "lib"
    libraries = [str(lib / f"lib{name}.a") for name in ("llama", "ggml", "ggml-cpu", "ggml-base")]
    command = ["c++", "-std=c++17", "-O1", "-I", str(folder / "include"), str(source), *libraries]
    subprocess.run([*command, "-fopenmp", "-lpthread", "-ldl", "-o", str(program)], check=True)
    return program


def llama_logits(
    program: Path, model: Path, windows: Sequence[Tensor], work: Path, kv_cache: str = "f16"
) -> list[Tensor]:
    """llama.cpp's logits [T, V] of each window of token ids [1, T]."""
    rows = [np.array([window.shape[1], *window[0].tolist()], dtype=np.int32) for window in windows]
    (work / "ids").write_bytes(np.concatenate(rows).tobytes())
    run = subprocess.run(
        [str(program), str(model), str(work / "ids"), str(work / "logits"), kv_cache],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    values = torch.from_numpy(np.fromfile(work / "logits", dtype=np.float32))
    lengths = [window.shape[1] for window in windows]
    return list(values.view(sum(lengths), -1).split(lengths))


class Server:
    """A llama-server, started with the line that export prints; from `serve`."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def ask(self, path: str, values: dict[str, Any] | None = None) -> dict[str, Any]:
        """The answer to a GET, or to a POST of `values`."""
        data = None if values is None else json.dumps(values).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as response:
            answer: dict[str, Any] = json.load(response)
        return answer


@contextlib.contextmanager
def serve(folder: Path, model: Path, context: int, log: Path) -> Iterator[Server]:
    """llama-server on a free port until the block ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    program, *options = shlex.split(server_command(model, context))
    options[options.index("--port") + 1] = str(port)
    options += ["--threads", "1"]  # a small model is no faster with two, and tests share the machine
    with log.open("w") as file:
        process = subprocess.Popen([str(folder / "bin" / program), *options], stdout=file, stderr=file)
    try:
        server, deadline = Server(port), time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError):
                if server.ask("/health") == {"status": "ok"}:
                    break
            assert process.poll() is None, log.read_text()[-2_000:]
            assert time.monotonic() < deadline, log.read_text()[-2_000:]
            time.sleep(0.2)
        yield server
    finally:
        process.terminate()
        process.wait(30)
