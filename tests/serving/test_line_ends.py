"""Line ends on their way through the server: those of a file, and those that must not cut an event in two."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.servers import running


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running() as (found, _):
        yield found


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as made:
        yield made


def events(text: str) -> list[Any]:
    return [json.loads(part.removeprefix("data: ")) for part in text.split("\n\n") if part and part != "data: [DONE]"]


@pytest.mark.parametrize("path", ["/infill", "/v1/completions"])
def test_an_event_is_one_line_whatever_ends_a_line(http: httpx.Client, path: str) -> None:
    """Some clients split a stream where Unicode has a line end, and not only at those of server-sent events."""
    marks = "\x85\u2028\u2029"
    body = {"input_prefix": marks, "prompt": marks, "n_predict": 2, "stream": True, "stop": ["\u2028"], "echo": True}
    streamed = http.post(path, json=body).text
    assert streamed.splitlines() == [*streamed.rstrip("\n").split("\n"), ""]
    assert any(marks in json.dumps(event, ensure_ascii=False) for event in events(streamed))


CRLF_ROUTES: dict[str, dict[str, Any]] = {
    "/infill": {"input_prefix": "class A:\n", "prompt": "    def g(self):\n        ", "input_suffix": "\n", "seed": 1},
    "/completion": {"prompt": "import os\n", "seed": 2},
    "/v1/completions": {"prompt": "import os\n", "seed": 2},
}


@pytest.mark.parametrize("path", CRLF_ROUTES)
def test_a_file_with_crlf_gets_crlf(http: httpx.Client, path: str) -> None:
    """The model is asked what it is asked for the file with LF; streamed and with log-probabilities, too."""
    others = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "n_predict": 40}
    body = CRLF_ROUTES[path] | others
    windows = {name: value.replace("\n", "\r\n") if type(value) is str else value for name, value in body.items()}

    def text_of(message: dict[str, Any]) -> str:
        return str(message["content"] if "content" in message else message["choices"][0]["text"])

    expected = text_of(http.post(path, json=body).json())
    assert "\n" in expected
    found = http.post(path, json=windows | {"logprobs": 1}).json()
    assert text_of(found) == expected.replace("\n", "\r\n")
    told = found.get("completion_probabilities")
    if told:
        assert b"".join(bytes(token["bytes"]) for token in told).decode("utf-8", "replace") == text_of(found)
    streamed = events(http.post(path, json=windows | {"stream": True}).text)
    assert "".join(map(text_of, streamed)) == text_of(found)
    stopped = http.post(path, json=windows | {"stop": ["\r\n"]}).json()
    assert text_of(stopped) == expected.partition("\n")[0]
    assert stopped.get("stopping_word", "\r\n") == "\r\n"
