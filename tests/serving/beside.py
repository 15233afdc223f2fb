"""llama-server and `smelter serve` with the same model, for requests that are put to both."""

import contextlib
import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from smelter.export.gguf import write_gguf
from smelter.model import Model
from tests import tiny
from tests.export.real_llama_cpp import llama_cpp_folder
from tests.servers import command

CONTEXT, SLOTS = 512, 4
SURENESS = 0.35
"""What the learnt logits are multiplied by: a model that is sure of every token would never end for want of one."""


def learnt_model(steps: int = 60) -> Model:
    """A random model whose output head has learnt a module of the standard library: it writes words and lines.

    In llama.cpp's numerics (no soft-caps, activations rounded by blocks), so that both write the same.
    """
    shape: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "max_seq_len": CONTEXT}
    numerics: dict[str, Any] = {"activation_quant": "block256", "attn_logit_soft_cap": 0.0, "final_logit_soft_cap": 0.0}
    model = tiny.model(tie_embeddings=False, **shape, **numerics)
    ids = torch.tensor(tiny.tokenizer().encode(tiny.CODE))
    rows = ids[: len(ids) // 128 * 128].view(-1, 128)
    with torch.no_grad():
        hidden = model(rows)[:, :-1].flatten(0, 1)
    head = torch.zeros_like(model.lm_head.weight, requires_grad=True)
    optimizer = torch.optim.Adam([head], lr=3e-2)
    for _ in range(steps):
        loss = F.cross_entropy(hidden @ head.T, rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        model.lm_head.weight.copy_(head * SURENESS)
    return model


@dataclass(frozen=True)
class Reply:
    """A server's answer: its status, its bytes, and what JSON they are, if any."""

    status: int
    raw: bytes

    @property
    def json(self) -> Any:
        """The body parsed."""
        return json.loads(self.raw)

    def events(self) -> list[Any]:
        """The JSON of a stream's events."""
        lines = [line[6:] for line in self.raw.decode().splitlines() if line.startswith("data: {")]
        return [json.loads(line) for line in lines]

    def at(self, path: str) -> Any:
        """What stands at "choices/0/text"; None where nothing does."""
        value = self.json
        for key in path.split("/"):
            if isinstance(value, list):
                value = value[int(key)] if int(key) < len(value) else None
            else:
                value = value.get(key) if isinstance(value, dict) else None
        return value


def ask(url: str, route: str, body: Any = None, **headers: str) -> Reply:
    """The reply to "POST /infill"; a body that is bytes goes as it is, another as JSON with its Content-Type."""
    method, path = route.split(" ")
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    if not isinstance(body, bytes):
        headers = {"Content-Type": "application/json"} | headers
    request = urllib.request.Request(url + path, data, headers, method=method)
    if not headers:
        request.add_unredirected_header("Content-Type", "")  # else urllib adds a form's
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return Reply(response.status, response.read())
    except urllib.error.HTTPError as error:
        return Reply(error.code, error.read())


@contextlib.contextmanager
def llama_server(gguf: Path, log: Path) -> Iterator[str]:
    """The URL of llama-server with the options that several completions to one request take."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    program = llama_cpp_folder() / "bin" / "llama-server"
    options = ["-m", gguf, "--port", port, "-c", CONTEXT * SLOTS, "-np", SLOTS, "-kvu", "-b", 256, "-ub", 256]
    options += ["-fa", "off", "-ctk", "f32", "-ctv", "f32", "--threads", 1, "--alias", "tiny"]
    with log.open("w") as file:
        process = subprocess.Popen([str(part) for part in (program, *options)], stdout=file, stderr=file)
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 60
        while True:
            with contextlib.suppress(urllib.error.URLError):
                if ask(url, "GET /health").status == 200:
                    break
            assert process.poll() is None, log.read_text()[-2_000:]
            assert time.monotonic() < deadline, log.read_text()[-2_000:]
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(30)


@contextlib.contextmanager
def both(folder: Path) -> Iterator[tuple[str, str]]:
    """The URLs of ours and theirs."""
    model = learnt_model()
    run = tiny.checkpoint(folder / "tiny", model)
    gguf = folder / "tiny.gguf"
    write_gguf(gguf, model, tiny.tokenizer(), name="tiny", gguf_type="TQ2_0", embedding_type="F32")
    with llama_server(gguf, folder / "log") as theirs, command(run, "--slots", str(SLOTS)) as (_, ours):
        yield ours, theirs
