"""Suggestions over HTTP: our own server gives what the model gives in process; what goes wrong is one line."""

import socket
import threading
from typing import Any

import pytest

from smelter.base import UserError
from smelter.evaluation.places import PLACE_KINDS, Place, choose_places
from smelter.evaluation.servers import KEY_VARIABLE, Server, ServerKind, ask_server
from smelter.evaluation.suggestions import Asked, ask
from tests import tiny
from tests.evaluation.completion_stub import stub
from tests.servers import running

TEXT = "def one(first):\n    return first.second\n\n\ndef two():\n    pass\n"
PLACE = Place(0, TEXT, TEXT.index("first.") + 2, TEXT.index("\n\n\n"))


def one_line(server: Server, kind: ServerKind | None = None) -> str:
    with pytest.raises(UserError) as error:
        ask_server(server, [PLACE], kind or "auto", characters=400)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("kind", "order"), [("infill", "spm"), ("completions", "spm"), ("plain", "plain"), ("auto", "spm")]
)
def test_our_server_suggests_what_the_model_does_in_process(kind: Any, order: Asked) -> None:
    model, tokenizer = tiny.model(max_seq_len=256), tiny.tokenizer()
    places = [place for what in PLACE_KINDS for place in choose_places(1, lambda _: tiny.CODE, 4, what)]
    expected = ask(model, tokenizer, places, order, characters=200)
    with running(model=model) as (url, _):
        used, suggestions = ask_server(Server("ours", url), places, kind, characters=200)
    assert used == ("infill" if kind == "auto" else kind)
    assert [(made.text, made.ended) for made in suggestions] == [(made.text, made.ended) for made in expected]
    assert all(made.seconds and 0 < made.seconds < 60 for made in suggestions)
    assert len({made.text for made in suggestions}) > 6, "or equality says nothing"


def test_the_key_and_what_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "secret-of-mine")
    answer = (200, {"content": "rst.second", "stop_type": "word"})
    with stub({"/infill": answer, "/v1/models": (200, {"data": [{"id": "the-model"}]})}) as (server, asked):
        used, (made,) = ask_server(server, [PLACE], characters=400)
        assert (used, made.text, made.ended) == ("infill", "rst.second", True)
        path, body, key = asked[-1]
        assert (path, key) == ("/infill", "Bearer secret-of-mine")
        assert body == {
            "input_prefix": "def one(first):\n",
            "prompt": "    return fi",
            "input_suffix": "\n\n\ndef two():\n    pass\n",
            "model": "the-model",
            "n_predict": 64,
            "temperature": 0,
            "stop": ["\n"],
            "stream": False,
        }
        ask_server(Server("named", server.url, "another"), [PLACE], characters=400)
        assert asked[-1][1]["model"] == "another"


def test_a_key_of_two_lines_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "one\ntwo")
    with stub({}) as (server, asked):
        with pytest.raises(UserError, match=f"^--url: {KEY_VARIABLE} holds a line break .* on one line$"):
            ask_server(server, [PLACE], characters=400)
        assert not asked
    monkeypatch.setenv(KEY_VARIABLE, "one\n")
    with stub({"/infill": (200, {"content": "", "stop_type": "eos"})}) as (server, asked):
        ask_server(server, [PLACE], "infill", characters=400)
        assert asked[-1][2] == "Bearer one"


def test_a_server_is_asked_in_the_first_way_that_it_has(capsys: pytest.CaptureFixture[str]) -> None:
    completion = {"choices": [{"text": "rst", "finish_reason": "length"}]}

    def no_suffix(body: dict[str, Any]) -> tuple[int, Any]:
        return (400, {"error": {"message": "Unsupported param: suffix"}}) if "suffix" in body else (200, completion)

    unable = (501, {"error": {"message": "Infill is not supported by this model"}})
    with stub({"/v1/completions": no_suffix}) as (server, asked):
        used, (made,) = ask_server(server, [PLACE], characters=400)
        assert (used, made.text, made.ended) == ("plain", "rst", False)
        assert "suffix" not in asked[-1][1]
        assert asked[-1][1]["prompt"] == "def one(first):\n    return fi"
        said = capsys.readouterr().err
        assert "answers 404 to /infill (none such): asking /v1/completions with suffix\n" in said
        assert "answers 400 to /v1/completions with suffix (Unsupported param: suffix): asking" in said
    with stub({"/infill": unable, "/v1/completions": (200, completion)}) as (server, asked):
        assert ask_server(server, [PLACE], characters=400)[0] == "plain"
        assert not any("suffix" in body for _, body, _ in asked), "it would not be read"
        assert "asking /v1/completions without suffix\n" in capsys.readouterr().err
        assert "answers 501 (Infill is not" in one_line(server, "infill")
    with stub({"/v1/completions": (200, completion)}) as (server, asked):
        assert ask_server(server, [PLACE], characters=400)[0] == "completions"
        assert asked[-1][1]["suffix"] == "\n\n\ndef two():\n    pass\n"


def test_less_is_shown_where_a_context_is_too_small() -> None:
    text = "".join(f"line_{i:02d} = {i:02d}\n" for i in range(60))  # 13 characters each
    place = Place(0, text, 40 * 13, 40 * 13 + 12)
    most = 200

    def small(body: dict[str, Any]) -> tuple[int, Any]:
        if len(body["input_prefix"] + body["prompt"] + body["input_suffix"]) > most:
            return 400, {"error": {"message": "request exceeds the available context size"}}
        return 200, {"content": "", "stop_type": "eos"}

    with stub({"/infill": small}) as (server, asked):
        assert ask_server(server, [place], characters=800)[1][0].ended
        sent = [len(body.get("input_prefix", "")) for path, body, _ in asked if path == "/infill"][1:]
        assert sent == [520, 299, 143]
        most = 40
        with pytest.raises(UserError, match=r"answers 400 .*context size\): give a smaller --editor-characters"):
            ask_server(server, [place], characters=800)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((401, {"error": "who are you"}), f"refuses the key (401): set {KEY_VARIABLE}"),
        ((200, b"<html>hello</html>"), "not an answer with a completion"),
        ((200, {"text": "x"}), "not an answer with a completion"),
        ((200, {"content": None}), "not an answer with a completion"),
        ((503, {"error": {"message": "Loading model"}}), "answers 503 (Loading model)"),
        ((502, b"<html>\nbad gateway\n</html>"), "answers 502 (<html> bad gateway </html>)"),
    ],
)
def test_what_goes_wrong_is_one_line(answer: tuple[int, Any], words: str) -> None:
    with stub({"/infill": answer}) as (server, _):
        assert words in one_line(server)


def test_nobody_there_and_no_http() -> None:
    with stub({}) as (server, _):
        pass
    assert "cannot connect" in one_line(server)
    assert "start the server" in one_line(server)


def test_what_speaks_no_http() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            with listener.accept()[0] as connection:
                connection.recv(1_000)
                connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        said = one_line(Server("x", f"http://127.0.0.1:{listener.getsockname()[1]}"))
        thread.join()
    assert "no HTTP answer (" in said


@pytest.mark.parametrize(
    ("text", "server"),
    [
        ("http://localhost:8012", Server("localhost:8012", "http://localhost:8012")),
        ("http://localhost:8012/v1/", Server("localhost:8012", "http://localhost:8012")),
        ("ours=https://a.b/c", Server("ours", "https://a.b/c")),
        ("http://h:1#qwen2.5-coder:0.5b", Server("h:1 qwen2.5-coder:0.5b", "http://h:1", "qwen2.5-coder:0.5b")),
        ("a b=http://[::1]:1#m", Server("a b", "http://[::1]:1", "m")),
    ],
)
def test_addresses(text: str, server: Server) -> None:
    assert Server.parse(text) == server


@pytest.mark.parametrize("text", ["localhost:8012", "ftp://x", "", "a=b", "http://", "=http://x", "http://x y"])
def test_no_addresses(text: str) -> None:
    with pytest.raises(UserError, match=r"give \[NAME=\]URL\[#MODEL\]"):
        Server.parse(text)
