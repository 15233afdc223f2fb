"""llama.cpp's `llama-server` as a child: found, started, ready, and gone when we are, however that comes."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from smelter.base import UserError

START_SECONDS = 120
DIE_WITH_US = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != int(sys.argv[1]):
        sys.exit("whoever started this is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""
"""Starts a program that the kernel ends when we die, even by SIGKILL: argv is our process id, the program, its options.

In a process of its own, since code between fork and exec is no good where threads run (preexec_fn).
"""


@dataclass(frozen=True)
class LlamaServer:
    """A llama-server that runs and is ready."""

    process: subprocess.Popen[bytes]
    url: str
    key: str
    num_slots: int

    def tokenize(self, text: str) -> list[int]:
        """The token ids that its file has for a text, in which names of special tokens are these."""
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        body = json.dumps({"content": text, "parse_special": True}).encode()
        request = urllib.request.Request(f"{self.url}/tokenize", body, headers)
        with urllib.request.urlopen(request, timeout=START_SECONDS) as response:
            ids: list[int] = json.load(response)["tokens"]
        return ids

    def stop(self) -> None:
        """End it."""
        self.process.terminate()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def find_llama_server(program: Path | None) -> str:
    """The program's path. Raises UserError where there is none."""
    path = shutil.which(str(program or "llama-server"))
    if path is None:
        raise UserError(f"{program or 'llama-server'}: no such program: install llama.cpp, or give --llama-server PATH")
    return path


def start_llama_server(program: str, gguf: Path, *, context: int, num_slots: int, threads: int | None) -> LlamaServer:
    """Start it with `context` tokens for each of `num_slots`, and wait until the model is loaded.

    Raises UserError with its last line where it ends instead.
    """
    if not gguf.is_file():
        raise UserError(f"{gguf}: no such file: make it with smelter export --format gguf, or give --gguf FILE")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    key = secrets.token_urlsafe(32)
    command = [program, "--model", str(gguf), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--ctx-size", str(context * num_slots), "--parallel", str(num_slots)]
    command += ["--flash-attn", "off", "--cache-type-k", "f32", "--cache-type-v", "f32"]  # as the model computes
    command += ["--threads", str(threads)] if threads else []
    with tempfile.TemporaryFile() as log:
        # The key goes by the environment: command lines are everybody's to read.
        environment = os.environ | {"LLAMA_API_KEY": key}
        command = [sys.executable, "-c", DIE_WITH_US, str(os.getpid()), *command]
        # Ctrl+C is for us; we end it when what is in flight is done.
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + START_SECONDS
        while not _is_ready(port):
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                process.wait()
                log.seek(0)
                lines = [line for line in log.read().decode("utf-8", "replace").splitlines() if line.strip()]
                raise UserError(f"{program} does not start: {lines[-1] if lines else 'it says nothing'}")
            time.sleep(0.05)
    return LlamaServer(process, f"http://127.0.0.1:{port}", key, num_slots)


def _is_ready(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
            return b" 200 " in connection.recv(64)
    except OSError:
        return False
