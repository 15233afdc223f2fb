"""`smelter serve --engine llama.cpp`: the real llama-server behind our routes, with the file that we export."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from smelter.__main__ import main
from tests import tiny
from tests.servers import command, raw_request, wait_until

BUILT = sorted((Path.home() / ".cache/foundry-tests").glob("llama.cpp*/bin/llama-server"))
PROGRAM = os.environ.get("LLAMA_SERVER") or shutil.which("llama-server") or (str(BUILT[-1]) if BUILT else None)

pytestmark = pytest.mark.slow
needs_program = pytest.mark.skipif(PROGRAM is None, reason="no llama-server here")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny.model(hidden_size=256, intermediate_size=512, head_dim=64, max_seq_len=512)
    return tiny.checkpoint(tmp_path_factory.mktemp("runs") / "small", model)


@pytest.fixture(scope="module")
def url(run: Path) -> Iterator[str]:
    out = run / "export" / "gguf"
    assert main(["export", str(run), "--format", "gguf", "--out", str(out), "--force"]) == 0
    options = ["--engine", "llama.cpp", "--llama-server", str(PROGRAM), "--slots", "2", "--queue", "1"]
    with command(run, *options) as (_, url):
        yield url


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)


PROMPT, SUFFIX = "def dedent(text):\n    ", "\n    return text\n"


@pytest.mark.real
@needs_program
def test_the_same_routes(url: str) -> None:
    asked = client(url)
    model = asked.models.list().data[0].id
    assert model == "small"
    found = asked.completions.create(model=model, prompt=PROMPT, max_tokens=12, temperature=0)
    assert found.usage is not None
    assert found.usage.completion_tokens == 12
    body = {"input_prefix": PROMPT, "input_suffix": SUFFIX, "n_predict": 12, "top_k": 0, "top_p": 1.0}
    filled = httpx.post(f"{url}/infill", json=body, timeout=60).json()
    assert filled["tokens_predicted"] == 12
    with_suffix = asked.completions.create(model=model, prompt=PROMPT, suffix=SUFFIX, max_tokens=12, temperature=0)
    assert with_suffix.choices[0].text == filled["content"]
    assert with_suffix.choices[0].finish_reason == "length"
    stream = asked.completions.create(
        model=model,
        prompt=PROMPT,
        suffix=SUFFIX,
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == filled["content"]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12
    asked.close()


@pytest.mark.real
@needs_program
def test_the_same_limits(url: str) -> None:
    with httpx.Client(base_url=url, timeout=60) as http:
        assert http.get("/health", headers={"Host": "evil.example"}).status_code == 403
        assert http.post("/v1/completions", json={"prompt": "a\0"}).status_code == 400
        assert http.post("/v1/completions", json={"prompt": "a", "max_tokens": 512}).status_code == 400
        assert http.post("/v1/completions", json={"prompt": "a", "model": "b"}).status_code == 404
        assert "smelter_requests_total" in http.get("/metrics").text
        assert http.get("/").status_code == 200


@pytest.mark.real
@needs_program
def test_who_goes_away_is_not_waited_for(url: str) -> None:
    body = b'{"prompt":[5,6],"max_tokens":500,"temperature":0,"stream":true,"logit_bias":null,"ignore_eos":true}'
    connections = [raw_request(url, body) for _ in range(3)]
    for connection in connections:
        connection.close()
    wait_until(lambda: httpx.get(f"{url}/health").json()["active"] == 0)


def child_of(process: subprocess.Popen[str]) -> Path:
    """The llama-server of a `smelter serve`, in /proc."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (child,) = [Path(f"/proc/{pid}") for pid in children if "llama-server" in Path(f"/proc/{pid}/comm").read_text()]
    return child


@pytest.mark.real
@needs_program
def test_no_key_is_in_the_list_of_processes(run: Path, url: str) -> None:
    """Neither ours nor llama-server's own. `url` made the file."""
    options = ["--engine", "llama.cpp", "--llama-server", str(PROGRAM)]
    with command(run, *options, environment={"SMELTER_API_KEY": "our-secret"}) as (process, url_):
        child = child_of(process)
        variables = dict(line.split(b"=", 1) for line in (child / "environ").read_bytes().split(b"\0") if line)
        lines = (child / "cmdline").read_bytes() + Path(f"/proc/{process.pid}/cmdline").read_bytes()
        assert b"--parallel" in lines
        for secret in (variables[b"LLAMA_API_KEY"], b"our-secret"):
            assert len(secret) > 9
            assert secret not in lines
        port = lines.split(b"\0")[lines.split(b"\0").index(b"--port") + 1].decode()
        assert httpx.post(f"http://127.0.0.1:{port}/completion", json={"prompt": "a"}).status_code == 401
        assert httpx.get(f"{url_}/v1/models").status_code == 401
        headers = {"Authorization": "Bearer our-secret"}
        assert httpx.get(f"{url_}/v1/models", headers=headers).json()["data"][0]["id"] == "small"


@pytest.mark.real
@needs_program
def test_killed_it_leaves_no_llama_server(run: Path, url: str) -> None:
    """`url` made the file."""
    with command(run, "--engine", "llama.cpp", "--llama-server", str(PROGRAM)) as (process, _):
        child = child_of(process)
        process.kill()
        wait_until(lambda: not child.exists() or "Z (zombie)" in (child / "status").read_text())


def one_line(run: Path, capfd: pytest.CaptureFixture[str], *options: str) -> str:
    assert main(["serve", str(run), "--port", "0", "--engine", "llama.cpp", *options]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    return err


def test_what_is_missing_is_said(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "no such program: install llama.cpp" in one_line(run, capfd, "--llama-server", str(tmp_path / "none"))
    broken = tmp_path / "llama-server"
    broken.write_text("#!/bin/sh\necho 'unknown model architecture' >&2\nexit 1\n")
    broken.chmod(0o755)
    gguf = tmp_path / "model.gguf"
    missing = one_line(run, capfd, "--llama-server", str(broken), "--gguf", str(gguf))
    assert "model.gguf: no such file" in missing
    gguf.write_bytes(b"GGUF")
    said = one_line(run, capfd, "--llama-server", str(broken), "--gguf", str(gguf))
    assert "does not start: unknown model architecture" in said
