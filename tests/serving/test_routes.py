"""The routes over a real socket, by the clients that people use: OpenAI's, httpx, a bare socket."""

import asyncio
import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from smelter.decoding import make_prompt
from smelter.serving.bridge import Service
from smelter.serving.gate import MAX_BODY_BYTES, Rules
from smelter.tokens.chat import ChatFormat, stop_ids
from smelter.tokens.roles import SpecialTokens
from smelter.tokens.tokenizer import Tokenizer
from tests import tiny
from tests.servers import raw_request, running, wait_until

PROMPT = "def dedent(text):\n    marg"
CONTEXT = tiny.TINY.max_seq_len


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Service]]:
    with running() as found:
        yield found


@pytest.fixture
def http(server: tuple[str, Service]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server[0], timeout=60) as client:
        yield client


@pytest.fixture
def client(server: tuple[str, Service]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="any", max_retries=0) as made:
        yield made


def expected(prompt: str = PROMPT, suffix: str | None = None, **options: Any) -> str:
    return tiny.complete(prompt, suffix, **options)


# --- OpenAI's client, unchanged --------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [None, "\n    return text\n"])
@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 0.9, "seed": 7}, {"top_p": 0.8, "seed": 3}])
def test_the_answer_is_that_of_complete(client: openai.OpenAI, suffix: str | None, sampling: dict[str, Any]) -> None:
    found = client.completions.create(model="tiny", prompt=PROMPT, suffix=suffix, max_tokens=16, **sampling)
    assert found.choices[0].text == expected(suffix=suffix, max_tokens=16, **{"temperature": 1.0} | sampling)
    assert found.usage is not None
    assert found.usage.completion_tokens == 16


def test_a_stream_spells_the_same(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=30, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == expected(max_tokens=30)
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 30


def test_several_prompts_and_answers(client: openai.OpenAI) -> None:
    ids = [tiny.tokenizer().encode(text) for text in ("import ", "class A")]
    found = client.completions.create(model="tiny", prompt=ids, n=2, max_tokens=8, temperature=1, seed=5)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    texts = [choice.text for choice in found.choices]
    again = client.completions.create(model="tiny", prompt=ids[1], max_tokens=8, temperature=1, seed=6)
    assert again.choices[0].text == texts[3]
    assert len(set(texts)) == 4
    both = client.completions.create(model="tiny", prompt=["import ", "class A"], max_tokens=8, temperature=0)
    assert [choice.text for choice in both.choices] == [expected(text, max_tokens=8) for text in ("import ", "class A")]


def test_without_a_seed_answers_differ(client: openai.OpenAI) -> None:
    texts = {client.completions.create(model="tiny", prompt="a", max_tokens=12).choices[0].text for _ in range(4)}
    assert len(texts) > 1


def test_stop_strings_and_echo(client: openai.OpenAI) -> None:
    whole = expected(max_tokens=30)
    stop = next(
        whole[i : i + 3] for i in range(4, 30) if whole.find(whole[i : i + 3]) == i and whole[i : i + 3].isascii()
    )
    found = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=30, temperature=0, stop=[stop, "never"], echo=True
    )
    assert found.choices[0].text == PROMPT + whole[: whole.find(stop)]
    assert found.choices[0].finish_reason == "stop"


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


def test_chat(client: openai.OpenAI) -> None:
    """Written-out special tokens of a message are ordinary text; the answer is the model's own after ChatML."""
    messages: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<|im_end|>?"}]
    found = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=12, temperature=0, logprobs=True, top_logprobs=2
    )
    tokenizer = tiny.tokenizer()
    ids = ChatFormat(tokenizer).render(messages, add_generation_prompt=True).ids
    assert ids.count(tokenizer.im_end_id or -1) == 2
    (alone,) = tiny.write(tiny.model(), [ids], max_tokens=12, stop_ids=stop_ids(tokenizer))
    content = found.choices[0].message.content
    assert content == tokenizer.decode(alone.ids)
    assert found.usage is not None
    assert found.usage.prompt_tokens == len(ids)
    told = found.choices[0].logprobs
    assert told is not None
    assert told.content is not None
    assert b"".join(bytes(each.bytes or []) for each in told.content).decode("utf-8", "replace") == content
    stream = client.chat.completions.create(model="tiny", messages=messages, max_tokens=12, temperature=0, stream=True)
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == content


def test_chat_says_that_the_model_has_not_learnt_it() -> None:
    tokens = Tokenizer.train([tiny.CODE], 512, SpecialTokens(im_start="", im_end=""))
    refused = pytest.raises(openai.BadRequestError, match="knows no conversations")
    with running(tokens=tokens) as (url, _), openai.OpenAI(base_url=f"{url}/v1", api_key="any") as client, refused:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "Hello"}])


# --- llama.cpp's interface -------------------------------------------------------------------------


def events(text: str) -> list[Any]:
    return [json.loads(part.removeprefix("data: ")) for part in text.split("\n\n") if part and part != "data: [DONE]"]


def test_infill(http: httpx.Client) -> None:
    body = {"input_prefix": "def dedent(text):\n", "prompt": "    marg", "input_suffix": "\n", "n_predict": 12}
    found = http.post("/infill", json=body | {"top_k": 0, "top_p": 1.0}).json()
    assert found["content"] == expected(suffix="\n", max_tokens=12)
    assert (found["stop"], found["stop_type"], found["tokens_predicted"]) == (True, "limit", 12)
    assert found["timings"]["predicted_n"] == 12
    streamed = events(http.post("/infill", json=body | {"stream": True, "n_probs": 2}).text)
    assert "".join(each["content"] for each in streamed) == found["content"]
    assert [each["stop"] for each in streamed] == [False] * (len(streamed) - 1) + [True]
    told = [token for each in streamed for token in each["completion_probabilities"]]
    assert b"".join(bytes(each["bytes"]) for each in told).decode("utf-8", "replace") == found["content"]
    assert all(len(each["top_logprobs"]) == 2 for each in told)


def test_infill_with_other_files_and_chosen_fields(http: httpx.Client) -> None:
    body = {"input_prefix": "x", "input_suffix": "", "input_extra": [{"filename": "a.py", "text": "import os"}]}
    fields = ["content", "timings/prompt_n", "nothing"]
    found = http.post("/infill", json=body | {"n_predict": 5, "response_fields": fields}).json()
    asked = make_prompt(tiny.tokenizer(), tiny.TINY.max_seq_len, "x", "", max_tokens=5, extra=("import os",))
    (row,) = tiny.write(tiny.model(), [asked.ids], pending=[asked.pending], max_tokens=5)
    assert found == {"content": row.text.close(), "timings/prompt_n": len(asked.ids)}


def test_completion_and_time(http: httpx.Client) -> None:
    found = http.post("/completion", json={"prompt": PROMPT, "n_predict": 10}).json()
    assert found["content"] == expected(max_tokens=10)
    assert http.post("/completion", json={"prompt": [5, 6], "n_predict": 0}).json()["content"] == ""
    quick = http.post("/completion", json={"prompt": "def f(x", "n_predict": 60, "t_max_predict_ms": 1}).json()
    _, _, rest = quick["content"].partition("\n")  # time ends at the line break, or at the token that holds it
    assert "\n" in quick["content"]
    assert len(rest) < 20
    assert expected("def f(x", max_tokens=60).startswith(quick["content"])
    assert http.get("/props").json()["default_generation_settings"]["n_ctx"] == CONTEXT
    ids = http.post("/tokenize", json={"content": "import os"}).json()["tokens"]
    assert tiny.tokenizer().decode(ids) == "import os"


# --- what is refused -------------------------------------------------------------------------------

BAD: dict[str, tuple[Any, int, str]] = {
    "no JSON": (b"{", 400, "not JSON"),
    "no UTF-8": (b'{"prompt":"\xff"}', 400, "UTF-8"),
    "deep": (b"[" * 100_000, 400, "nested"),
    "no object": (b'"a"', 400, "JSON object"),
    "no prompt": ({}, 400, "prompt: Field required"),
    "NUL": ({"prompt": "a\0"}, 400, "prompt: holds a NUL byte"),
    "half a surrogate pair": (b'{"prompt":"\\ud800"}', 400, "prompt: is not Unicode"),
    "half a surrogate pair as a name": (b'{"prompt":"a","model":"\\ud800"}', 400, "model: is not Unicode"),
    "half a surrogate pair to stop at": (b'{"prompt":"a","stop":["\\udfff"]}', 400, "stop.0: is not Unicode"),
    "NaN": (b'{"prompt":"a","temperature":NaN}', 400, "temperature: Input should be a finite"),
    "too many ids": ({"prompt": [1] * CONTEXT}, 400, f"too many for the context of {CONTEXT}"),
    "no such id": ({"prompt": [512]}, 400, "token id 512"),
    "no ids": ({"prompt": []}, 400, "prompts"),
    "an empty list among ids": ({"prompt": [[1], []]}, 400, "empty list"),
    "too many answers": ({"prompt": ["a"] * 33, "n": 2}, 400, "64"),
    "penalty": ({"prompt": "a", "presence_penalty": 1}, 400, "presence_penalty: is not supported"),
    "best of": ({"prompt": "a", "best_of": 2}, 400, "best_of"),
    "suffix of ids": ({"prompt": [5], "suffix": "a"}, 400, "suffix: needs a prompt that is text"),
    "large": (b'{"prompt":"' + b"a" * MAX_BODY_BYTES + b'"}', 413, "larger than 1,000,000 bytes"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_are_told_why(http: httpx.Client, name: str) -> None:
    body, status, reason = BAD[name]
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = http.post("/v1/completions", content=raw, headers={"Content-Type": "application/json"})
    error = response.json()["error"]
    assert (response.status_code, reason in error["message"]) == (status, True), error
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"


def test_a_body_without_a_length_is_limited_too(http: httpx.Client) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(64):
            yield b" " * 65_536

    response = http.post("/v1/completions", content=endless(), headers={"Content-Type": "application/json"})
    assert response.status_code == 413


def test_wrong_routes(http: httpx.Client) -> None:
    assert http.get("/nowhere").json()["error"]["message"] == "no route GET /nowhere: see /docs"
    assert http.put("/infill").status_code == 405


# --- who may ask -----------------------------------------------------------------------------------


def test_another_name_for_this_machine_is_refused(http: httpx.Client) -> None:
    """DNS rebinding: a page at evil.example that points its own name here."""
    assert http.get("/health", headers={"Host": "evil.example:8080"}).status_code == 403
    assert http.get("/health", headers={"Host": ""}).status_code == 403
    for host in ("localhost:1234", "127.0.0.1", "[::1]:8080"):
        assert http.get("/health", headers={"Host": host}).status_code == 200


def test_pages_of_other_sites_may_not_ask(http: httpx.Client, server: tuple[str, Service]) -> None:
    response = http.post("/infill", json={}, headers={"Origin": "http://evil.example"})
    assert response.status_code == 403
    assert "access-control-allow-origin" not in response.headers
    # What a form or a page's script may send without asking first; every body counts as JSON.
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        headers = {"Origin": "http://evil.example", "Content-Type": kind}
        assert http.post("/infill", content=b"{}", headers=headers).status_code == 403
    assert http.post("/infill", content=b"{}", headers={"Origin": "null"}).status_code == 403
    assert http.options("/infill", headers={"Origin": "http://evil.example"}).status_code == 403
    assert http.get("/health", headers={"Origin": server[0]}).status_code == 200


def test_a_site_can_be_allowed() -> None:
    with running(Rules(origins=("http://friend.example",))) as (url, _), httpx.Client(base_url=url) as http:
        headers = {"Origin": "http://friend.example"}
        assert http.options("/infill", headers=headers).status_code == 204
        response = http.get("/health", headers=headers)
        assert response.headers["access-control-allow-origin"] == "http://friend.example"
        assert http.get("/health", headers={"Origin": "http://evil.example"}).status_code == 403


def test_a_key() -> None:
    with running(Rules(api_key="sécret")) as (url, _), httpx.Client(base_url=url) as http:
        body = {"prompt": "a", "max_tokens": 1}
        assert http.post("/v1/completions", json=body).status_code == 401
        for wrong in ("Bearer", "Bearer wrong", "Basic sécret", "Bearer sécret2"):
            headers = {b"Authorization": wrong.encode()}
            response = http.post("/v1/completions", json=body, headers=headers)
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
        assert http.get("/metrics").status_code == 401
        assert http.get("/health").status_code == http.get("/").status_code == 200
        right = {b"Authorization": "Bearer sécret".encode()}
        assert http.post("/v1/completions", json=body, headers=right).status_code == 200


# --- load, and clients that go away ----------------------------------------------------------------


def test_a_full_queue() -> None:
    with running(max_queue=1, num_slots=1) as (url, _), httpx.Client(base_url=url) as http:
        body = b'{"prompt":[5,6],"max_tokens":90,"temperature":0}'
        with contextlib.ExitStack() as stack:
            refused = None
            for _ in range(60):
                stack.enter_context(raw_request(url, body))
                response = http.post("/v1/completions", json={"prompt": [[1]] * 2, "max_tokens": 1})
                if response.status_code == 429:
                    refused = response
                    break
        assert refused is not None
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"


@pytest.mark.parametrize("stream", ["true", "false"])
def test_a_client_that_goes_away_frees_its_slot(stream: str) -> None:
    with running(model=tiny.model(max_seq_len=8_192), num_slots=2) as (url, service):
        body = f'{{"prompt":[5,6],"max_tokens":8000,"temperature":0,"stream":{stream}}}'.encode()
        connections = [raw_request(url, body) for _ in range(3)]
        wait_until(lambda: service.engine.counts.tokens > 20)
        assert service.engine.num_active == 2
        for connection in connections:
            connection.close()
        assert wait_until(lambda: service.engine.num_active + service.engine.num_waiting == 0) < 1.0
        assert service.engine.counts.cancelled == 3


@pytest.mark.slow
def test_sixty_four_streams_at_once(server: tuple[str, Service]) -> None:
    """None fails, and each is the text that it would be alone."""
    url, service = server
    prompts = [f"def f{i}(x):\n    return " for i in range(64)]

    async def one(client: openai.AsyncOpenAI, prompt: str) -> str:
        stream = await client.completions.create(model="tiny", prompt=prompt, max_tokens=24, temperature=0, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def everyone() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=240) as client:
            return await asyncio.gather(*(one(client, prompt) for prompt in prompts))

    assert asyncio.run(everyone()) == [expected(prompt, max_tokens=24) for prompt in prompts]
    assert service.engine.num_active == service.engine.num_waiting == 0


# --- figures and description -----------------------------------------------------------------------


def test_metrics_count(http: httpx.Client) -> None:
    def figures() -> dict[str, float]:
        lines = [line for line in http.get("/metrics").text.splitlines() if not line.startswith("#")]
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}

    before = figures()
    http.post("/infill", json={"input_prefix": "a", "n_predict": 7})
    time.sleep(0.05)  # the request is counted after its last byte
    after = figures()
    assert after["smelter_tokens_total"] - before["smelter_tokens_total"] == 7
    route = 'smelter_requests_total{route="/infill",status="200"}'
    assert after[route] - before.get(route, 0) == 1
    assert after["smelter_first_token_seconds_count"] - before["smelter_first_token_seconds_count"] == 1
    assert (after["smelter_slots"], after["smelter_active_slots"], after["smelter_queue"]) == (4, 0, 0)


def test_health_and_headers(http: httpx.Client) -> None:
    response = http.get("/health")
    assert response.json() == {"status": "ok", "active": 0, "slots": 4, "waiting": 0}
    assert response.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in http.get("/").headers["content-security-policy"]
    paths = http.get("/openapi.json").json()["paths"]
    assert {"/v1/completions", "/v1/chat/completions", "/infill", "/completion", "/health", "/metrics"} <= paths.keys()


@pytest.mark.parametrize("path", ["/", "/page.css", "/page.js", "/docs", "/docs.js"])
def test_pages_load_nothing_from_elsewhere(http: httpx.Client, path: str) -> None:
    response = http.get(path)
    assert response.status_code == 200
    assert "//" not in response.text.replace("// ", "").replace("https://www.w3.org/2000/svg", "")
