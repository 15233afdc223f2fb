"""`smelter serve` as a process: how it starts, how it ends, and what it says where it cannot."""

import asyncio
import importlib.util
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from smelter.__main__ import main
from smelter.base.errors import UserError
from smelter.run.checkpoint import load_checkpoint
from smelter.serving.gate import LOOPBACK_NAMES
from smelter.serving.serve import ServeOptions, _name, is_loopback, listen, rules_of
from tests import tiny
from tests.servers import ROOT, command, raw_request, wait_until


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("runs") / "small", tiny.model(max_seq_len=4_096))


LONG = b'{"prompt":[5,6],"max_tokens":1000,"temperature":0}'


def read_all(connection: socket.socket) -> bytes:
    with connection, connection.makefile("rb") as file:
        return file.read()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_finishes_what_is_in_flight(run: Path, number: signal.Signals) -> None:
    with command(run, "--slots", "1") as (process, url):
        connections = [raw_request(url, LONG) for _ in range(2)]  # one is decoded, one waits
        wait_until(lambda: httpx.get(f"{url}/health").json()["waiting"] == 1)
        process.send_signal(number)
        for connection in connections:
            answer = read_all(connection)
            assert b" 200 OK" in answer
            assert json.loads(answer.partition(b"\r\n\r\n")[2])["usage"]["completion_tokens"] == 1_000
        out, err = process.communicate(timeout=30)
        assert process.returncode == 0, err
        assert err == "smelter serve: finishing what is in flight; once more to stop at once\n"
        assert out == ""


@pytest.mark.slow
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_second_signal_ends_at_once(run: Path, second: signal.Signals) -> None:
    with command(run) as (process, url):
        connection = raw_request(url, LONG.replace(b"1000", b"4000"))
        wait_until(lambda: httpx.get(f"{url}/health").json()["active"] == 1)
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        process.stderr.readline()
        start = time.monotonic()
        process.send_signal(second)
        assert process.wait(timeout=30) == 128 + second
        assert time.monotonic() - start < 2
        connection.close()


@pytest.mark.slow
@pytest.mark.parametrize("place", ["environment", "file"])
def test_what_it_says_and_the_key(run: Path, tmp_path: Path, place: str) -> None:
    file = tmp_path / "key"
    file.write_text("secret\n")
    options = ["--api-key-file", str(file)] if place == "file" else []
    environment = {"SMELTER_API_KEY": "secret"} if place == "environment" else {}
    with command(run, "--name", "mine", *options, environment=environment) as (process, url):
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", url)
        assert httpx.get(f"{url}/v1/models").status_code == 401
        headers = {"Authorization": "Bearer secret"}
        assert httpx.get(f"{url}/v1/models", headers=headers).json()["data"][0]["id"] == "mine"
        if (line := Path(f"/proc/{process.pid}/cmdline")).exists():
            assert b"smelter" in line.read_bytes()
            assert b"secret" not in line.read_bytes()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0


@pytest.mark.slow
def test_files_that_an_editor_sends_ahead_are_read_once(run: Path) -> None:
    """As llama.vim and llama.vscode do it: the files alone, nothing to be written; then the cursor's surroundings."""
    extra = [{"filename": "a.py", "text": tiny.CODE[:2_000]}, {"filename": "b.py", "text": tiny.CODE[2_000:3_000]}]
    with command(run) as (_, url):
        warm = {"input_prefix": "", "input_suffix": "", "prompt": "", "input_extra": extra, "n_predict": 0}
        first = httpx.post(f"{url}/infill", json=warm).raise_for_status().json()
        assert (first["content"], first["tokens_predicted"], first["stop_type"]) == ("", 0, "limit")
        assert first["timings"]["cache_n"] == 0
        for prefix, suffix in (("def f(te", "\n"), ("class A:\n    ", ""), ("def f(text", "\n")):
            body = {"input_prefix": prefix, "input_suffix": suffix, "input_extra": extra, "n_predict": 4}
            answer = httpx.post(f"{url}/infill", json=body).raise_for_status().json()
            assert answer["timings"]["cache_n"] >= first["tokens_evaluated"] - 1
        assert answer["tokens_predicted"] == 4


# --- what it cannot do -----------------------------------------------------------------------------


def one_line(capsys: Any) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return str(captured.err)


def test_a_port_in_use(run: Path, capsys: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(run), "--port", str(port)]) == 2
    assert f"cannot listen at 127.0.0.1 port {port}: Address already in use" in one_line(capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "70000"], "cannot listen at 127.0.0.1 port 70000"),
        (["--host", "256.1.1.1"], "cannot listen at 256.1.1.1"),
        (["--slots", "0"], "--slots = 0: must be at least 1"),
        (["--queue", "-1"], "--queue = -1"),
        (["--threads", "0"], "--threads = 0"),
    ],
)
def test_options_out_of_range(run: Path, capsys: Any, options: list[str], message: str) -> None:
    assert main(["serve", str(run), *options]) == 2
    assert message in one_line(capsys)


def test_no_such_run(tmp_path: Path, capsys: Any) -> None:
    assert main(["serve", str(tmp_path / "none"), "--port", "0"]) == 2
    assert "none" in one_line(capsys)


def test_without_the_extra(run: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find_spec(name))
    assert main(["serve", str(run)]) == 2
    assert "the server needs uvicorn: pip install 'smelter-foundry[serve]'" in one_line(capsys)


def test_the_command_alone_does_not_load_the_extra() -> None:
    code = (
        "import sys, smelter.serving.serve; "
        "print([name for name in ('fastapi', 'uvicorn', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_who_may_ask() -> None:
    assert is_loopback("127.0.0.1")
    assert is_loopback("::1")
    assert is_loopback("localhost")
    assert not is_loopback("0.0.0.0")
    assert not is_loopback("example.org")
    assert rules_of(ServeOptions(Path())).hosts == LOOPBACK_NAMES
    assert rules_of(ServeOptions(Path(), host="127.0.0.2")).hosts == LOOPBACK_NAMES | {"127.0.0.2"}
    assert rules_of(ServeOptions(Path(), host="0.0.0.0")).hosts is None


@pytest.fixture
def environment_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMELTER_API_KEY", "from the environment")


@pytest.mark.usefixtures("environment_key")
def test_a_file_with_the_key_goes_first(tmp_path: Path) -> None:
    assert rules_of(ServeOptions(Path())).api_key == "from the environment"
    file = tmp_path / "key"
    file.write_text(" from-the-file \r\n")
    assert rules_of(ServeOptions(Path(), api_key_file=file)).api_key == "from-the-file"


def test_a_key_of_two_lines_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMELTER_API_KEY", "one\r\ntwo")
    with pytest.raises(UserError, match=r"^SMELTER_API_KEY holds a line break"):
        rules_of(ServeOptions(Path()))


@pytest.mark.parametrize("content", [b"", b"\n", b"one\ntwo\n", b"\xff"])
def test_a_file_without_a_key(run: Path, tmp_path: Path, capsys: Any, content: bytes) -> None:
    file = tmp_path / "key"
    file.write_bytes(content)
    assert main(["serve", str(run), "--port", "0", "--api-key-file", str(file)]) == 2
    assert f"{file}: must hold the key and nothing else, on one line" in one_line(capsys)


def test_no_file_and_no_key_on_the_command_line(run: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["serve", str(run), "--port", "0", "--api-key-file", str(tmp_path / "none")]) == 2
    assert "none: No such file or directory" in one_line(capsys)
    assert main(["serve", str(run), "--port", "0", "--api-key", "secret"]) == 2
    assert "did you mean --api-key-file?" in one_line(capsys)


def test_ipv6() -> None:
    try:
        listener = listen("::1", 0)
    except Exception as error:
        pytest.skip(f"no IPv6 here: {error}")
    assert listener.getsockname()[0] == "::1"
    listener.close()


def test_answers_are_sent_at_once() -> None:
    """Without TCP_NODELAY the body of an answer waits for the client to acknowledge its head: 40 ms on Linux."""

    async def option() -> int:
        answered: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connection = writer.get_extra_info("socket")
            answered.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listener = listen("127.0.0.1", 0)
        async with await asyncio.start_server(accepted, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            is_set = await answered
            writer.close()
            return is_set

    assert asyncio.run(option()) != 0


def test_the_models_name_is_its_folders(tmp_path: Path) -> None:
    """Also in a copy of the run, or after it was renamed; a checkpoint by itself has the name of its run."""
    run = tiny.checkpoint(tmp_path / "first", tiny.model())
    copied = tmp_path / "second"
    shutil.copytree(run, copied)
    alone = shutil.copytree(run / "checkpoints" / "step_0000007", tmp_path / "alone")
    for path, name in ((run, "first"), (copied, "second"), (alone, "first")):
        options = ServeOptions(path)
        assert _name(options, load_checkpoint(path, with_state=False)) == name
    assert _name(ServeOptions(run, name="mine"), load_checkpoint(run, with_state=False)) == "mine"
