"""Clients that no registry has: their requests, to both servers, and what they would show."""

import http.client
import json

import httpx
import pytest

from tests.serving.clients.programs import Served
from tests.serving.clients.replayed import REPLAYS, WARM_UP, Replay, llama_vim
from tests.serving.clients.student import ANSWER, QUESTION, THRICE, tokenizer

pytestmark = pytest.mark.real


def ask(server: Served, replay: Replay) -> str:
    """The raw answer. httpx would not send llama.vim's `Bearer ` without a key."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
    connection.request("POST", replay.path, json.dumps(replay.body), replay.headers)
    answer = connection.getresponse()
    raw = answer.read().decode()
    connection.close()
    assert answer.status == 200, raw
    return raw


@pytest.mark.parametrize("replay", REPLAYS, ids=str)
def test_what_it_shows(server: Served, replay: Replay) -> None:
    assert replay.read(ask(server, replay)) == replay.shown


def test_the_ring_is_warm(server: Served) -> None:
    """What was read for the ring of chunks is not read again for the next suggestion."""
    chunks = [{"text": f"def unused{i}(a, b):\n    return a\n", "time": [1, 2], "filename": "o.py"} for i in range(4)]
    warm = {**WARM_UP, "input_extra": chunks, "temperature": 0.0, "response_fields": [""]}
    assert httpx.post(f"{server.url}/infill", json=warm, timeout=60).status_code == 200
    body = llama_vim(THRICE, THRICE.middle, chunks).body | {"response_fields": ["timings/cache_n", "timings/prompt_n"]}
    answer = httpx.post(f"{server.url}/infill", json=body, timeout=60).json()
    assert answer["timings/cache_n"] > answer["timings/prompt_n"]


def test_what_llama_vscode_asks_besides(server: Served) -> None:
    """src/llama-server.ts:619-757, 1502: how long is the context, how many tokens has a conversation, is it alive."""
    with httpx.Client(base_url=server.url, timeout=60) as http:
        assert http.get("/health").json()["status"] == "ok"
        assert len(http.get("/v1/models").json()["data"]) == 1
        assert http.get("/props").json()["default_generation_settings"]["n_ctx"] >= 512
        messages = [{"role": "user", "content": QUESTION}]
        prompt = http.post("/apply-template", json={"messages": messages, "model": "any"}).json()["prompt"]
        assert QUESTION in prompt
        body = {"content": prompt, "add_special": False, "parse_special": True}
        ids = http.post("/tokenize", json=body).json()["tokens"]
        assert tokenizer().decode(ids, skip_special_tokens=False) == prompt
        assert ids[0] == tokenizer().im_start_id
        assert ANSWER.startswith(http.post("/completion", json={"prompt": ids, "n_predict": 3}).json()["content"])
