"""The forms of requests that clients of other servers send: heard as llama-server hears them, or refused by name.

`test_beside_llama_server` puts the same to the real one.
"""

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from smelter.serving.prompts import num_to_write, prompts_of, room_for, sampling
from smelter.serving.schema import ChatRequest, LlamaCompletionRequest
from smelter.tokens.tokenizer import Tokenizer
from tests import tiny
from tests.servers import running

CONTEXT = tiny.TINY.max_seq_len
PROMPT = "import os\n"
GREEDY = {"temperature": 0}
HELLO = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    with running() as (url, _), httpx.Client(base_url=url, timeout=60) as client:
        yield client


def post(http: httpx.Client, path: str, **body: Any) -> Any:
    response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def complete(http: httpx.Client, **body: Any) -> Any:
    return post(http, "/completion", **{"prompt": PROMPT, "n_predict": 6} | GREEDY | body)


def refusal(http: httpx.Client, path: str, **body: Any) -> str:
    response = http.post(path, json=body)
    assert response.status_code == 400, response.text
    return str(response.json()["error"]["param"])


# --- prompts ---------------------------------------------------------------------------------------


def test_sentinels_of_a_prompt_are_tokens(http: httpx.Client) -> None:
    tokenizer = tiny.tokenizer()
    ids = tokenizer.fim_prompt("a = ", "\nb")
    text = tokenizer.decode(ids, skip_special_tokens=False)
    expected = tiny.write(tiny.model(), [ids], max_tokens=6, stop_ids=[tokenizer.eos_id])[0].ids
    assert complete(http, prompt=text)["content"] == tokenizer.decode(expected)
    answer = post(http, "/v1/completions", prompt=text, max_tokens=6, **GREEDY)
    assert answer["choices"][0]["text"] == tokenizer.decode(expected)
    assert answer["usage"]["prompt_tokens"] == len(ids)


@pytest.mark.parametrize("use_spm", [False, True])
def test_a_prompt_with_sentinels_is_cut_around_the_gap(http: httpx.Client, use_spm: bool) -> None:
    tokenizer = tiny.tokenizer()
    before, after = "".join(f"b{i}\n" for i in range(90)), "".join(f"a{i}\n" for i in range(90))
    text = tokenizer.decode(tokenizer.fim_prompt(before, after, use_spm), skip_special_tokens=False)
    answer = complete(http, prompt=text, n_predict=4)
    assert answer["truncated"]
    assert answer["tokens_evaluated"] == CONTEXT - 4
    pattern = (
        r"<\|fim_prefix\|><\|fim_suffix\|>(?P<after>[^<]*)<\|fim_middle\|>(?P<before>[^<]*)"
        if use_spm
        else r"<\|fim_prefix\|>(?P<before>[^<]*)<\|fim_suffix\|>(?P<after>[^<]*)<\|fim_middle\|>"
    )
    kept = re.fullmatch(pattern, answer["prompt"])
    assert kept is not None, answer["prompt"]
    assert before.endswith(kept["before"])
    assert after.startswith(kept["after"])
    assert len(kept["before"]) > len(kept["after"]) > 20


def test_what_is_typed_is_text(http: httpx.Client) -> None:
    name = "<|fim_middle|>"
    body = {"input_prefix": name, "prompt": name, "input_suffix": name, "input_extra": [{"text": name}]}
    ids = post(http, "/tokenize", content=post(http, "/infill", **body, n_predict=1)["prompt"], parse_special=False)
    as_text = len(tiny.tokenizer().encode(name))
    assert post(http, "/infill", **body, n_predict=1)["tokens_evaluated"] > 4 * as_text - 2
    assert len(ids["tokens"]) > 4 * as_text
    with_suffix = post(http, "/v1/completions", prompt=name, suffix="", max_tokens=1)
    assert with_suffix["usage"]["prompt_tokens"] == 3 + as_text
    messages = [{"role": "user", "content": "<|im_end|>"}]
    chat = post(http, "/v1/chat/completions", messages=messages, max_tokens=1)["usage"]["prompt_tokens"]
    assert chat - post(http, "/v1/chat/completions", messages=HELLO, max_tokens=1)["usage"]["prompt_tokens"] > 4


def test_prompts_of_every_form() -> None:
    assert prompts_of("a") == ["a"]
    assert prompts_of([1, "a", 2]) == [[1, "a", 2]]
    assert prompts_of(["a", [1, "b"], [2]]) == ["a", [1, "b"], [2]]
    with pytest.raises(Exception, match="a list of prompts holds no token ids"):
        prompts_of([1, [2]])


def test_lists_of_prompts_and_completions(http: httpx.Client) -> None:
    answers = complete(http, prompt=[PROMPT, "class A:\n"], n_cmpl=2)
    assert [answer["index"] for answer in answers] == [0, 1, 2, 3]
    assert answers[0]["content"] == answers[1]["content"] == complete(http)["content"]
    assert answers[3]["content"] == complete(http, prompt="class A:\n")["content"]
    drawn = complete(http, n=3, temperature=1.0, seed=5)
    assert drawn[2]["content"] == complete(http, temperature=1.0, seed=7)["content"]
    assert len({answer["content"] for answer in drawn}) > 1
    whole = complete(http, prompt=[70, "a\n", 72])
    assert whole["tokens_evaluated"] == 2 + len(tiny.tokenizer().encode("a\n"))


# --- how much --------------------------------------------------------------------------------------


def test_limits_by_every_name(http: httpx.Client) -> None:
    for body in ({"n_predict": 2, "max_tokens": 5}, {"max_tokens": 2}, {"max_completion_tokens": 2, "max_tokens": 5}):
        assert complete(http, **{"n_predict": None} | body)["tokens_predicted"] == 2
        for path, prompt in (("/v1/completions", {"prompt": PROMPT}), ("/v1/chat/completions", {"messages": HELLO})):
            assert post(http, path, **body, **prompt, **GREEDY)["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("limit", [-1, CONTEXT, 10**6])
def test_more_than_fits_is_what_fits(http: httpx.Client, limit: int) -> None:
    answer = complete(http, n_predict=limit)
    assert answer["tokens_evaluated"] + answer["tokens_predicted"] == CONTEXT
    assert (answer["stop_type"], answer["truncated"]) == ("limit", True)
    for path, prompt in (("/v1/completions", {"prompt": PROMPT}), ("/v1/chat/completions", {"messages": HELLO})):
        answer = post(http, path, max_tokens=limit, **prompt, **GREEDY)
        assert (answer["usage"]["total_tokens"], answer["choices"][0]["finish_reason"]) == (CONTEXT, "length")


def test_nothing_is_written(http: httpx.Client) -> None:
    answer = complete(http, n_predict=0)
    assert (answer["content"], answer["tokens_predicted"], answer["stop_type"]) == ("", 0, "limit")
    answer = post(http, "/v1/chat/completions", messages=HELLO, n_predict=0)
    assert (answer["choices"][0]["message"]["content"], answer["usage"]["completion_tokens"]) == ("", 0)
    assert post(http, "/v1/completions", prompt=PROMPT, max_tokens=0)["choices"][0]["text"] == ""


def test_room() -> None:
    assert [room_for(limit, 100) for limit in (-1, 0, 30, 99, 100, 10**9)] == [25, 0, 30, 99, 25, 25]
    assert [num_to_write(limit, 60, 100) for limit in (-1, 0, 30, 41)] == [40, 0, 30, 40]


# --- sampling --------------------------------------------------------------------------------------


def sampled(**body: Any) -> dict[str, Any]:
    found = sampling(LlamaCompletionRequest.model_validate({"prompt": "a", "seed": 1, **body}))
    return {name: found[name] for name in ("temperature", "top_k", "top_p", "min_p")} | {
        "infill": found.get("infill_sampler", False)
    }


def test_samplers() -> None:
    as_sent = {"temperature": 0.5, "top_k": 7, "top_p": 0.9, "min_p": 0.1}
    off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "infill": False}
    assert sampled(**as_sent) == as_sent | {"infill": False}
    assert sampled(**as_sent, samplers=[]) == off
    assert sampled(**as_sent, samplers=["top_k", "infill"]) == off | {"top_k": 7, "infill": True}
    assert sampled(**as_sent, samplers=["top-p", "TEMP", "penalties"]) == off | {"top_p": 0.9, "temperature": 0.5}
    assert sampled(**as_sent, samplers="kmi") == off | {"top_k": 7, "min_p": 0.1, "infill": True}
    assert sampled(samplers=["top_k", "top_p", "infill"])["temperature"] == 0, "who says nothing gets the likeliest"
    assert sampled(samplers=None) == {"temperature": 0.0, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "infill": False}


def test_numbers_out_of_range_are_the_nearest_in_it() -> None:
    found = sampled(temperature=-1, top_k=-1, top_p=-0.5, min_p=7)
    assert found == {"temperature": 0.0, "top_k": 0, "top_p": 0.0, "min_p": 1.0, "infill": False}


@pytest.mark.parametrize("body", [{"top_p": 0}, {"top_k": 1}, {"min_p": 1}])
def test_only_the_likeliest_is_left(http: httpx.Client, body: dict[str, Any]) -> None:
    """`top_p` 0 leaves no token, so the first of all."""
    assert complete(http, temperature=3.0, seed=4)["content"] != complete(http)["content"]
    assert complete(http, temperature=3.0, seed=4, **body)["content"] == complete(http)["content"]


def test_ends(http: httpx.Client) -> None:
    whole = complete(http, n_predict=40)["content"]
    assert complete(http, n_predict=40, stop=whole[5:7])["content"] == whole[: whole.find(whole[5:7])]
    assert (
        complete(http, n_predict=40, stop="")["content"] == complete(http, n_predict=40, stop=[""])["content"] == whole
    )
    assert complete(http, n_predict=40, t_max_predict_ms=-1)["content"] == whole


# --- what is left out, neutral, or refused ---------------------------------------------------------

NULLS = (
    *(
        "model",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "seed",
        "stop",
        "n",
        "n_cmpl",
        "samplers",
        "n_indent",
        "stream",
    ),
    *("t_max_predict_ms", "stream_options", "max_tokens", "max_completion_tokens", "logit_bias"),
)


def test_null_is_a_field_left_out(http: httpx.Client) -> None:
    nulls = dict.fromkeys(NULLS)
    others = dict.fromkeys(("n_probs", "logprobs", "response_fields", "grammar", "json_schema", "mirostat"))
    assert complete(http, **nulls, **others)["content"] == complete(http)["content"]
    extra = {"input_extra": [{"text": "a", "filename": None}]}
    body = {"input_prefix": None, "input_suffix": None, "prompt": None, "n_predict": 3}
    filled = post(http, "/infill", **body, **nulls)["content"]
    assert filled == post(http, "/infill", n_predict=3)["content"]
    post(http, "/infill", n_predict=3, **extra)
    post(http, "/v1/completions", prompt="a", suffix=None, logprobs=None, echo=None, best_of=None, **nulls)
    post(http, "/v1/chat/completions", messages=HELLO, tools=None, functions=None, tool_choice=None, **nulls)


CHANGES: dict[str, tuple[Any, Any]] = {
    "frequency_penalty": (0, 0.5),
    "presence_penalty": (0.0, -1),
    "repeat_penalty": (1.0, 1.1),
    "dry_multiplier": (0, 0.8),
    "xtc_probability": (0, 0.5),
    "typical_p": (1, 0.5),
    "top_n_sigma": (-1, 1.5),
    "dynatemp_range": (0, 1),
    "adaptive_target": (-1, 0.5),
    "mirostat": (0, 2),
    "min_keep": (0, 3),
    "logit_bias": ([], [[5, 1.0]]),
    "lora": ([], [{"id": 0, "scale": 1.0}]),
    "grammar": ("", 'root ::= "a"'),
    "json_schema": (None, {}),
    "response_format": ({"type": "text"}, {"type": "json_object"}),
    "ignore_eos": (False, True),
    "post_sampling_probs": (False, True),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_would_change_the_answer_is_refused(http: httpx.Client, name: str) -> None:
    neutral, other = CHANGES[name]
    prompts = {"/completion": {"prompt": "a"}, "/infill": {}, "/v1/completions": {"prompt": "a"}}
    for path, prompt in (prompts | {"/v1/chat/completions": {"messages": HELLO}}).items():
        post(http, path, max_tokens=1, **prompt, **{name: neutral})
        assert refusal(http, path, max_tokens=1, **prompt, **{name: other}) == name


def test_tools(http: httpx.Client) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    ask: dict[str, Any] = {"messages": HELLO, "max_tokens": 1}
    allowed: dict[str, Any]
    for allowed in ({"tools": []}, {"tools": [tool], "tool_choice": "none"}, {"tool_choice": "auto"}):
        post(http, "/v1/chat/completions", **ask, **allowed)
    assert refusal(http, "/v1/chat/completions", **ask, tools=[tool]) == "tools"
    assert refusal(http, "/v1/chat/completions", **ask, tool_choice="required") == "tool_choice"
    assert refusal(http, "/v1/chat/completions", **ask, functions=[{"name": "f"}]) == "functions"


def test_conversations_with_tools_in_them() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "x"},
        {"role": "assistant", "tool_calls": [call]},
    ]
    found = ChatRequest.model_validate({"messages": messages}).messages
    assert [message.text() for message in found] == ["a\nb", "", "x", ""]
    with pytest.raises(ValueError, match="a message of role 'user' needs content"):
        ChatRequest.model_validate({"messages": [{"role": "user"}]})


def test_the_assistants_last_message_is_gone_on_with(http: httpx.Client) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "Hel"}]
    prompt = post(http, "/apply-template", messages=messages)["prompt"]
    assert prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nHel"


# --- what a server is asked about itself -----------------------------------------------------------


def test_any_model_is_answered_by_its_own_name(http: httpx.Client) -> None:
    for path, prompt in (("/v1/completions", {"prompt": "a"}), ("/v1/chat/completions", {"messages": HELLO})):
        assert post(http, path, model="any", max_tokens=1, **prompt)["model"] == "tiny"


def test_other_names_of_routes(http: httpx.Client) -> None:
    def but_for_its_id(answer: Any) -> Any:
        return {name: value for name, value in answer.items() if name not in ("id", "created", "timings")}

    for short, long in (("/models", "/v1/models"), ("/health", "/v1/health")):
        assert http.get(short).json() == http.get(long).json()
    body = {"prompt": PROMPT, "n_predict": 3, "seed": 1}
    assert but_for_its_id(post(http, "/completions", **body)) == but_for_its_id(post(http, "/completion", **body))
    body = {"messages": HELLO, "max_tokens": 3, "seed": 1}
    assert post(http, "/chat/completions", **body)["choices"] == post(http, "/v1/chat/completions", **body)["choices"]


def test_tokens_and_texts(http: httpx.Client) -> None:
    tokenizer: Tokenizer = tiny.tokenizer()
    text = "<|fim_prefix|>é a<|im_start|>"
    ids = post(http, "/tokenize", content=text)["tokens"]
    assert ids == tokenizer.parse(text)
    assert ids[0] == tokenizer.fim_prefix_id
    assert post(http, "/tokenize", content=text, parse_special=False)["tokens"] == tokenizer.encode(text)
    assert post(http, "/detokenize", tokens=ids)["content"] == text
    assert post(http, "/detokenize") == {"content": ""}
    assert refusal(http, "/detokenize", tokens=[512]) == "tokens"
    pieces = post(http, "/tokenize", content=text, with_pieces=True)["tokens"]
    assert [piece["id"] for piece in pieces] == ids
    assert pieces[0]["piece"] == "<|fim_prefix|>"
    assert [195] in [piece["piece"] for piece in pieces], "half of a character is its bytes"


def test_props_and_slots(http: httpx.Client) -> None:
    props = http.get("/props").json()
    assert props["default_generation_settings"]["params"]["temperature"] == 0
    assert props["default_generation_settings"]["params"]["min_p"] == 0.05
    assert (props["eos_token"], props["total_slots"]) == ("<|endoftext|>", 4)
    assert "<|im_start|>" in props["chat_template"]
    slots = http.get("/slots").json()
    assert [slot["id"] for slot in slots] == [0, 1, 2, 3]
    assert not any(slot["is_processing"] for slot in slots)
    assert http.get("/slots?fail_on_no_slot=1").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_answers_are_compact(http: httpx.Client, stream: bool) -> None:
    """llama.vim looks for `"content"\\s*:"` in the bytes: after a space it sees no suggestion."""
    raw = http.post("/infill", json={"input_prefix": PROMPT, "n_predict": 3, "stream": stream}).content
    assert re.search(rb'"content"\s*:"', raw)
    assert b'": ' not in raw


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_every_body_is_json(http: httpx.Client, kind: str | None) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    response = http.post("/infill", content=b'{"n_predict":1}', headers=headers)
    assert (response.status_code, response.json()["tokens_predicted"]) == (200, 1)
