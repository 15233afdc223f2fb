"""`smelter serve --engine llama.cpp` beside our own engine: the same model, the same requests, the same answers."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from smelter.__main__ import main
from tests import tiny
from tests.servers import ROOT, command, raw_request, running, wait_until

BUILT = sorted((Path.home() / ".cache/foundry-tests").glob("llama.cpp*/bin/llama-server"))
PROGRAM = os.environ.get("LLAMA_SERVER") or shutil.which("llama-server") or (str(BUILT[-1]) if BUILT else None)
MODEL: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "max_seq_len": 256}
# What llama.cpp computes: activations rounded in blocks, and no caps.
MODEL |= {"activation_quant": "block256", "attn_logit_soft_cap": 0.0, "final_logit_soft_cap": 0.0}
OPTIONS = ["--engine", "llama.cpp", "--llama-server", str(PROGRAM), "--threads", "1"]

pytestmark = pytest.mark.slow
needs_program = pytest.mark.skipif(PROGRAM is None, reason="no llama-server here")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("runs") / "small", tiny.model(**MODEL))


@pytest.fixture(scope="module")
def url(run: Path) -> Iterator[str]:
    """A server with llama.cpp's engine."""
    out = run / "export" / "gguf"
    assert main(["export", str(run), "--format", "gguf", "--out", str(out), "--force"]) == 0
    with command(run, *OPTIONS, "--slots", "4", "--queue", "4", "--name", "tiny") as (_, url):
        yield url


@pytest.fixture(scope="module")
def our_url() -> Iterator[str]:
    """A server with the same model and our own engine."""
    with running(model=tiny.model(**MODEL), num_slots=4, max_queue=4) as (url, _):
        yield url


# --- a table of requests ---------------------------------------------------------------------------

CODE = "def dedent(text):\n    lines = text.spl"
SUFFIX = "\n    return text\n"
LONG = "x = compute(1, 2)\n" * 200
CHAT = {"messages": [{"role": "user", "content": "Write a function."}]}


@dataclass(frozen=True)
class Case:
    """A request, and the status that both answer with; where they are to differ, why."""

    path: str
    body: dict[str, Any] | str | None = None
    status: int = 200
    differs: str = ""
    """Why what is written differs; the form does not."""
    refused: str = ""
    """Why llama.cpp's engine answers 400."""


RANDOM = "another generator of random numbers"
ROUNDING = "a model that was never trained: the least difference in rounding makes another text"
CHAOTIC: list[dict[str, Any]] = [
    {"prompt": LONG},
    {"prompt": LONG, "suffix": LONG, "max_tokens": 100_000},
    {"logprobs": 3},
    {"max_tokens": -1},
    {"n_indent": 4, "max_tokens": 40},
    {"prompt": "    lines = text.spl", "input_extra": [{"filename": "a.py", "text": "import os\n"}]},
    {"n_predict": -1},
    {"t_max_predict_ms": 1, "n_predict": 100},
]
CASES = [
    Case("/health"),
    Case("/v1/health"),
    Case("/v1/models"),
    Case("/v1/models/tiny"),
    Case("/models"),
    Case("/props"),
    Case("/slots"),
    Case("/none", status=404),
    Case("/tokenize", {"content": "import os <|fim_prefix|>", "with_pieces": True}),
    Case("/detokenize", {"tokens": [72, 300, 507]}),
    Case("/apply-template", CHAT),
    *(
        Case(
            "/v1/completions",
            {"prompt": CODE, "max_tokens": 12, "temperature": 0} | more,
            differs=ROUNDING if more in CHAOTIC else "",
        )
        for more in (
            *CHAOTIC[:5],
            {},
            {"model": "any"},
            {"suffix": SUFFIX},
            {"suffix": SUFFIX.replace("\n", "\r\n"), "prompt": CODE.replace("\n", "\r\n")},
            {"suffix": ""},
            {"prompt": [300, 301, 302]},
            {"prompt": [CODE, "import "], "n": 2},
            {"prompt": "<|fim_prefix|>import <|fim_suffix|>\n<|fim_middle|>"},
            {"prompt": ""},
            {"logprobs": 0},
            {"logprobs": True},
            {"max_tokens": 0},
            {"max_tokens": 1},
            {"echo": True},
            {"echo": True, "max_tokens": 0},
            {"stop": ["e"]},
            {"stop": "\n", "suffix": SUFFIX},
            {"stream": True},
            {"stream": True, "suffix": SUFFIX, "stream_options": {"include_usage": True}},
            {"stream": True, "logprobs": 2, "n": 2, "stop": ["e"]},
        )
    ),
    Case("/v1/completions", {"prompt": CODE, "max_tokens": 12, "seed": 1, "n": 3}, differs=RANDOM),
    Case("/v1/completions", {"prompt": CODE, "max_tokens": 8, "temperature": 0.8, "seed": 1}, differs=RANDOM),
    Case("/v1/completions", {"prompt": "a\0"}, status=400),
    Case("/v1/completions", {"prompt": [1] * 300}, status=400),
    Case("/v1/completions", {"prompt": [1_000_000]}, status=400),
    Case("/v1/completions", {"prompt": "a", "frequency_penalty": 1.5}, status=400),
    Case("/v1/completions", {"prompt": "a", "suffix": "b", "echo": True}, status=400),
    Case("/v1/completions", "{", status=400),
    Case(
        "/v1/completions",
        {"prompt": CODE, "echo": True, "logprobs": 1, "max_tokens": 0},
        refused="llama-server tells no log-probabilities of a prompt",
    ),
    Case("/v1/chat/completions", CHAT | {"max_tokens": 8, "temperature": 0}),
    Case("/v1/chat/completions", CHAT | {"n_predict": 8, "temperature": 0, "logprobs": True, "top_logprobs": 2}),
    Case("/v1/chat/completions", CHAT | {"max_tokens": 8, "temperature": 0, "stream": True, "n": 2}),
    Case("/v1/chat/completions", {"messages": []}, status=400),
    *(
        Case(
            "/infill",
            {"input_prefix": "def dedent(text):\n", "input_suffix": SUFFIX, "n_predict": 12} | more,
            differs=ROUNDING if more in CHAOTIC else "",
        )
        for more in (
            *CHAOTIC[5:],
            {},
            {"n_predict": 0},
            {"n_probs": 2},
            {"n_cmpl": 3},
            {"stream": True},
            {"stop": ["e"]},
            {"response_fields": ["content", "timings/prompt_n"]},
            {"samplers": ["top_k", "top_p", "infill"], "top_k": 40, "top_p": 0.9},
            {"samplers": ["infill"], "prompt": "    lines = text.spl"},
        )
    ),
    Case("/completion", {"prompt": CODE, "n_predict": 12}),
    Case("/completion", {"prompt": [[300, 301], CODE], "n_predict": 4}),
    Case("/completion", {"prompt": CODE, "n_predict": 12, "temperature": 0.8, "min_p": 0.1, "seed": 3}, differs=RANDOM),
    Case("/completion", {"prompt": CODE, "grammar": "root ::= .*"}, status=400),
    Case("/completion", {}, status=400),
]
VOLATILE = {"id", "created", "seed", "timings", "timings/prompt_n", "cached_tokens"}
"""What differs from one answer to the next; its type does not."""
WRITTEN = {"text", "content", "tokens", "finish_reason", "completion_tokens", "total_tokens", "tokens_predicted"}
WRITTEN |= {"tokens_cached", "has_new_line", "stop_type", "stopping_word"}
WRITTEN |= {"text_offset", "token_logprobs", "top_logprobs"}
"""What depends on the tokens that were chosen."""


def form_of(value: Any, volatile: set[str], *, is_volatile: bool = False) -> Any:
    """The value with numbers that are not exact, and all that stands at volatile keys, by their types alone."""
    if isinstance(value, dict) and is_volatile and all(isinstance(item, float) for item in value.values()):
        return "log-probabilities by token"
    if isinstance(value, dict):
        return {
            key: form_of(item, volatile, is_volatile=is_volatile or key in volatile)
            for key, item in sorted(value.items())
        }
    if isinstance(value, list):
        items = [form_of(item, volatile, is_volatile=is_volatile) for item in value]
        return sorted({json.dumps(item) for item in items}) if is_volatile else items
    return type(value).__name__ if isinstance(value, float) or is_volatile else value


def forms_of(response: httpx.Response, volatile: set[str]) -> list[Any]:
    """Of an answer or, in the order of the answers that they belong to, of a stream's events."""
    if not response.headers["content-type"].startswith("text/event-stream"):
        return [form_of(response.json(), volatile)]
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    messages = [form_of(json.loads(event), volatile) for event in events if event != "[DONE]"]
    ended = events[-1] == "[DONE]"
    return [*sorted(messages, key=_answer_of), ended]


def _answer_of(message: Any) -> int:
    (choice,) = message.get("choices") or [message]
    return int(choice.get("index", 99))


def ask(url: str, case: Case) -> httpx.Response:
    if case.body is None:
        return httpx.get(url + case.path, timeout=60)
    content = case.body if isinstance(case.body, str) else json.dumps(case.body)
    return httpx.post(url + case.path, content=content, timeout=60)


@pytest.mark.real
@needs_program
@pytest.mark.parametrize("case", CASES, ids=[f"{i}{case.path}" for i, case in enumerate(CASES)])
def test_both_engines_answer_alike(url: str, our_url: str, case: Case) -> None:
    ours, theirs = ask(our_url, case), ask(url, case)
    assert ours.status_code == case.status
    if case.refused:
        assert theirs.status_code == 400
        assert theirs.json()["error"]["message"]
        return
    assert theirs.status_code == case.status
    assert theirs.headers["content-type"] == ours.headers["content-type"]
    assert b'": ' not in theirs.content.replace(b'\\"', b"")  # compact
    volatile = VOLATILE | WRITTEN if case.differs else VOLATILE
    assert forms_of(theirs, volatile) == forms_of(ours, volatile)


def test_forms_are_compared() -> None:
    """What the comparison above passes over, and what it sees."""
    here = {"id": "a", "text": "b", "logprob": -1.5, "list": [1, None]}
    assert form_of(here, VOLATILE) == form_of(here | {"id": "c", "logprob": -2.0}, VOLATILE)
    for other in ({"id": 1}, {"text": "c"}, {"logprob": None}, {"logprob": 1}, {"list": [1]}, {"more": 1}):
        assert form_of(here, VOLATILE) != form_of(here | other, VOLATILE)


@pytest.mark.real
@needs_program
def test_they_find_the_same_likely(url: str, our_url: str) -> None:
    """Log-probabilities, also of the token that is taken back at the cursor and spelled again."""
    for prompt in (CODE, "import os\n", [300, 301, 302]):
        body = {"prompt": prompt, "n_predict": 1, "n_probs": 3}
        ours, theirs = [
            httpx.post(f"{server}/completion", json=body, timeout=60).json()["completion_probabilities"]
            for server in (our_url, url)
        ]
        for here, there in zip(ours, theirs, strict=True):
            assert there["id"] == here["id"]
            assert there["logprob"] == pytest.approx(here["logprob"], abs=0.5, rel=0.05)
            assert there["top_logprobs"][0]["id"] == here["top_logprobs"][0]["id"]


# --- what only llama.cpp's engine has to get right -------------------------------------------------


@pytest.mark.real
@needs_program
def test_a_character_of_several_tokens(url: str) -> None:
    """llama-server tells only of its last token."""
    text = "名前 = '日本'\n" * 4
    body = {"prompt": text + "名", "n_predict": 16, "n_probs": 2}
    answer = httpx.post(f"{url}/completion", json=body, timeout=60).json()
    assert answer["content"]
    tokens = [token["bytes"] for token in answer["completion_probabilities"]]
    assert b"".join(map(bytes, tokens)).decode("utf-8", "replace") == answer["content"]


@pytest.mark.real
@needs_program
def test_who_goes_away_is_not_waited_for(url: str) -> None:
    body = b'{"prompt":[5,6],"max_tokens":250,"temperature":0,"stream":true}'
    connections = [raw_request(url, body) for _ in range(6)]
    for connection in connections:
        connection.close()
    at_rest = {"status": "ok", "active": 0, "slots": 4, "waiting": 0}
    wait_until(lambda: httpx.get(f"{url}/health").json() == at_rest, 60)


@pytest.mark.real
@needs_program
def test_more_than_slots_and_queue_are_refused(url: str) -> None:
    answer = httpx.post(f"{url}/v1/completions", json={"prompt": "a", "n": 9}, timeout=60)
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "1"
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        assert len(client.completions.create(model="any", prompt="a", n=8, max_tokens=3).choices) == 8


def child_of(process: subprocess.Popen[str]) -> Path:
    """The llama-server of a `smelter serve`, in /proc."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (child,) = [Path(f"/proc/{pid}") for pid in children if "llama-server" in Path(f"/proc/{pid}/comm").read_text()]
    return child


@pytest.mark.real
@needs_program
def test_no_key_is_in_the_list_of_processes(run: Path, url: str) -> None:
    """Neither ours nor llama-server's own. `url` made the file."""
    with command(run, *OPTIONS, environment={"SMELTER_API_KEY": "our-secret"}) as (process, url_):
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
    with command(run, *OPTIONS) as (process, _):
        child = child_of(process)
        process.kill()
        wait_until(lambda: not child.exists() or "Z (zombie)" in (child / "status").read_text())


@pytest.mark.real
@needs_program
def test_where_llama_server_dies_it_is_said(run: Path, url: str) -> None:
    """`url` made the file."""
    with command(run, *OPTIONS) as (process, url_):
        connection = raw_request(url_, b'{"prompt":[5,6],"max_tokens":250,"temperature":0,"n":8}')
        wait_until(lambda: httpx.get(f"{url_}/health").json()["active"] > 0, 60)
        os.kill(int(child_of(process).name), signal.SIGKILL)
        with connection, connection.makefile("rb") as file:
            assert b"the engine failed; the server's log says more" in file.read()
        wait_until(lambda: httpx.get(f"{url_}/health").status_code == 500, 60)
        answer = httpx.post(f"{url_}/infill", json={"input_prefix": "a"}, timeout=60)
        assert answer.status_code == 503
        assert answer.json()["error"]["message"] == "llama-server has ended with status -9"


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


@pytest.mark.real
@needs_program
@pytest.mark.usefixtures("url")
def test_a_file_with_another_tokenizer(run: Path, tmp_path: Path) -> None:
    """`url` made the file."""
    other = tiny.checkpoint(tmp_path / "other", tiny.model(**MODEL, vocab_size=400), tiny.tokenizer(400))
    (gguf,) = (run / "export" / "gguf").glob("*.gguf")
    line = [sys.executable, "-m", "smelter", "serve", str(other), "--port", "0", *OPTIONS, "--gguf", str(gguf)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "has another tokenizer than" in done.stderr
