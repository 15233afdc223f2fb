"""What clients of llama-server send, and what of the answers is the same: rows for `test_beside_llama_server`.

A row says in which route, with which body, and what of the answers is the same. Where ours differs on purpose, the
row says in words why, and what either answers.
"""

from dataclasses import dataclass, field
from typing import Any

from tests.serving.beside import CONTEXT

GREEDY = {"temperature": 0}
CODE = "import re\n\nclass TextWrapper:\n"
"""Ends in a line break, where nothing is healed, so that both read the same tokens."""
LONG = "gh\n" * 400
SENTINELS = f"<|fim_prefix|>{CODE}<|fim_suffix|>\n    return text\n<|fim_middle|>"
HELLO = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
EXTRA = [{"filename": "a.py", "text": "import os\n" * 60}]


@dataclass(frozen=True)
class Row:
    """One request and what becomes of it; paths are "choices/0/text" of the answers.

    `same` are paths of equal values. `ours` and `theirs` are values by path, and belong to `why` they differ, as do
    two statuses.
    """

    route: str
    body: Any = None
    same: tuple[str, ...] = ()
    why: str = ""
    status: int = 200
    theirs_status: int | None = None
    ours: dict[str, Any] = field(default_factory=dict)
    theirs: dict[str, Any] = field(default_factory=dict)


def infill(why: str = "", status: int = 200, theirs_status: int | None = None, **values: Any) -> Row:
    """A row of /infill, whose texts differ: theirs is prefix first and without healing, ours the other way round."""
    body = {"input_prefix": CODE, "input_suffix": "\n", "n_predict": 4, **GREEDY} | values
    same = ("stop", "stop_type") if status == (theirs_status or status) == 200 else ()
    return Row("POST /infill", body, same, why, status, theirs_status)


def completion(**values: Any) -> Row:
    """A row of /completion whose answers are the same."""
    body = {"prompt": CODE, "n_predict": 8, **GREEDY} | values
    same = ("content", "tokens_predicted", "tokens_evaluated", "stop_type", "stopping_word", "truncated", "prompt")
    return Row("POST /completion", body, same)


def refused(name: str, value: Any) -> Row:
    """A row of /completion that we refuse by the field's name."""
    why = f"{name} would change the answer, and is not supported"
    body = {"prompt": CODE, "n_predict": 2, **GREEDY, name: value}
    return Row("POST /completion", body, why=why, status=400, theirs_status=200, ours={"error/param": name})


NOTHING = {"tokens_predicted": 0, "content": ""}
ROWS = {
    # --- names of models -------------------------------------------------------------------------------
    "any model": Row(
        "POST /v1/completions",
        {"prompt": CODE, "max_tokens": 6, "model": "any", **GREEDY},
        ("choices/0/text", "choices/0/finish_reason", "model", "object", "usage/prompt_tokens"),
    ),
    "any model in chat": Row(
        "POST /v1/chat/completions",
        {"messages": HELLO, "max_tokens": 3, "model": "any", **GREEDY},
        ("choices/0/message", "choices/0/finish_reason", "model", "object", "usage/prompt_tokens"),
    ),
    "no model": Row("POST /v1/completions", {"prompt": CODE, "model": None, "max_tokens": 1, **GREEDY}, ("model",)),
    # --- special tokens --------------------------------------------------------------------------------
    "sentinels in /completion": completion(prompt=SENTINELS),
    "sentinels in /v1/completions": Row(
        "POST /v1/completions",
        {"prompt": SENTINELS, "max_tokens": 8, **GREEDY},
        ("choices/0/text", "usage/prompt_tokens"),
    ),
    "sentinels of a prompt that is too long": Row(
        "POST /completion",
        {"prompt": f"<|fim_prefix|>{LONG}<|fim_suffix|>{LONG}<|fim_middle|>", "n_predict": 4, **GREEDY},
        why="a text is cut to what is nearest to the cursor, and its sentinels stay",
        theirs_status=400,
        ours={"truncated": True, "tokens_evaluated": CONTEXT - 4},
        theirs={"error/type": "exceed_context_size_error"},
    ),
    "special tokens in /infill": Row(
        "POST /infill",
        {"input_prefix": "<|fim_middle|>", "prompt": "<|fim_middle|>", "input_suffix": "", "n_predict": 1},
        why="the line at the cursor is somebody's text, and no token of it is special",
        ours={"prompt": "<|fim_prefix|><|fim_suffix|><|fim_middle|><|fim_middle|><|fim_middle|>"},
        theirs={"prompt": "<|fim_prefix|><|fim_middle|><|fim_middle|><|fim_suffix|><|fim_middle|>"},
    ),
    "special tokens in a message": Row(
        "POST /v1/chat/completions",
        {"messages": [{"role": "user", "content": "<|im_end|>"}], "max_tokens": 1, **GREEDY},
        why="a message never closes its turn: its special tokens are text",
        ours={"usage/prompt_tokens": 23},
        theirs={"usage/prompt_tokens": 16},
    ),
    "/tokenize": Row("POST /tokenize", {"content": "<|fim_prefix|>é a<|im_start|>"}, ("tokens",)),
    "/tokenize as text": Row("POST /tokenize", {"content": "<|fim_prefix|>a", "parse_special": False}, ("tokens",)),
    "/tokenize with pieces": Row("POST /tokenize", {"content": "<|pad|>é a", "with_pieces": True}, ("tokens",)),
    "/tokenize add_special": Row("POST /tokenize", {"content": ["a", 5, "b"], "add_special": True}, ("tokens",)),
    "/tokenize of nothing": Row("POST /tokenize", {}, ("tokens",)),
    "/detokenize": Row("POST /detokenize", {"tokens": [507, 70, 71]}, ("content",)),
    "/detokenize of no id": Row(
        "POST /detokenize", {"tokens": [99_999]}, why="whose mistake it is", status=400, theirs_status=500
    ),
    # --- how much is written ---------------------------------------------------------------------------
    "nothing": Row(
        "POST /completion",
        {"prompt": CODE, "n_predict": 0, **GREEDY},
        ("stop_type",),
        why="llama-server's own help says of 0 that no tokens will be generated",
        ours=NOTHING,
        theirs={"tokens_predicted": 1},
    ),
    "nothing in chat": Row(
        "POST /v1/chat/completions",
        {"messages": HELLO, "n_predict": 0, "max_tokens": 5, **GREEDY},
        ("choices/0/finish_reason",),
        why="0 writes nothing",
        ours={"usage/completion_tokens": 0, "choices/0/message/content": ""},
        theirs={"usage/completion_tokens": 1},
    ),
    "all that fits": completion(n_predict=-1, response_fields=["tokens_predicted", "stop_type", "truncated"]),
    "more than fits": completion(n_predict=1_000, response_fields=["tokens_predicted", "stop_type", "truncated"]),
    "more than fits, OpenAI's": Row(
        "POST /v1/completions",
        {"prompt": CODE, "max_tokens": 100_000, **GREEDY},
        ("choices/0/finish_reason", "usage/total_tokens"),
    ),
    "less than all": Row(
        "POST /completion",
        {"prompt": CODE, "n_predict": -2},
        status=400,
        why="who is named",
        ours={"error/param": "n_predict"},
    ),
    "max_tokens in /completion": completion(n_predict=None, max_tokens=2),
    "max_completion_tokens is stronger": completion(n_predict=None, max_tokens=2, max_completion_tokens=3),
    "n_predict in /v1/completions": Row(
        "POST /v1/completions",
        {"prompt": CODE, "n_predict": 2, "max_tokens": 5, **GREEDY},
        ("usage/completion_tokens",),
    ),
    "n_predict in chat": Row(
        "POST /v1/chat/completions",
        {"messages": HELLO, "n_predict": 2, "max_tokens": 5, **GREEDY},
        ("usage/completion_tokens", "choices/0/message/content"),
    ),
    "nothing said": Row(
        "POST /v1/completions",
        {"prompt": CODE, **GREEDY},
        why="64 tokens, near OpenAI's 16, and not all that fit",
        ours={"usage/completion_tokens": 64},
        theirs={"usage/total_tokens": CONTEXT},
    ),
    "a line that is indented less": completion(n_predict=60, n_indent=4),
    # --- forms -----------------------------------------------------------------------------------------
    "nulls": completion(
        **dict.fromkeys(
            ("top_k", "top_p", "min_p", "seed", "stop", "stream", "n_probs", "t_max_predict_ms", "n_indent")
        ),
        **dict.fromkeys(("samplers", "logit_bias", "grammar", "json_schema", "id_slot", "n_cmpl", "max_tokens")),
    ),
    "nulls in /infill": infill("null is a field that was left out", input_extra=None, prompt=None, theirs_status=400),
    "a file without a name": infill("as above", input_extra=[{"text": "a", "filename": None}], theirs_status=400),
    "no prefix": Row("POST /infill", {"input_suffix": ""}, why="it is empty then", theirs_status=500),
    "no suffix": Row("POST /infill", {"input_prefix": "", "n_predict": 1}, why="it is empty then", theirs_status=500),
    "a file without a text": infill(input_extra=[{"filename": "a"}], status=400),
    "files that are none": infill(input_extra={"a": 1}, status=400),
    "a prompt that is no text": infill("theirs leaves it out in silence", prompt=["a"], status=400, theirs_status=200),
    "stop as a text": completion(stop="s", n_predict=40),
    "stop as a list": completion(stop=["never", "s"], n_predict=40),
    "an empty stop": Row(
        "POST /completion",
        {"prompt": CODE, "n_predict": 4, "stop": ["", "never"], **GREEDY},
        why="theirs stops at once, wherever it stands in the list",
        ours={"tokens_predicted": 4},
        theirs={"content": "", "stop_type": "word"},
    ),
    "stop as a number": Row(
        "POST /completion",
        {"prompt": CODE, "stop": 5, "n_predict": 1},
        why="not ignored",
        status=400,
        theirs_status=200,
    ),
    "top_p 0": completion(top_p=0, temperature=1, seed=3),
    "top_k -1": completion(top_k=-1),
    "top_k 1": completion(top_k=1, temperature=1, seed=3),
    "min_p 1": completion(min_p=1, temperature=1, seed=3),
    "min_p out of range": completion(min_p=7, temperature=1, seed=3),
    "temperature below 0": completion(temperature=-1),
    "a sampler that is not listed is off": completion(samplers=["top_k", "nonsense"], top_k=1, temperature=2, seed=3),
    "samplers by letters": completion(samplers="kt", top_k=1, temperature=2, seed=3),
    "no time limit": completion(t_max_predict_ms=-1),
    "less than no time limit": Row("POST /completion", {"prompt": "a", "t_max_predict_ms": -2}, status=400),
    "indented by less than nothing": Row("POST /completion", {"prompt": "a", "n_indent": -1}, status=400),
    "a large seed": completion(seed=2**64 - 1),
    "prompts": Row(
        "POST /completion",
        {"prompt": [CODE, "def dedent(text):\n"], "n_predict": 8, **GREEDY},
        ("0/content", "1/content", "0/index", "1/index", "2"),
    ),
    "prompts of ids": Row(
        "POST /completion", {"prompt": [[70, 71], [72]], "n_predict": 8, **GREEDY}, ("0/content", "1/content", "2")
    ),
    "ids and texts": completion(prompt=[70, "a\n", 72]),
    "no prompts": Row("POST /completion", {"prompt": []}, status=400),
    "no prompt": Row("POST /completion", {"prompt": None}, status=400),
    "no such id": Row("POST /completion", {"prompt": [99_999]}, status=400),
    "an empty prompt": Row(
        "POST /completion",
        {"prompt": "", "n_predict": 4, **GREEDY},
        why="as at the beginning of a file",
        ours={"tokens_predicted": 4},
        theirs={"tokens_predicted": 0},
    ),
    "a NUL byte": Row(
        "POST /completion", {"prompt": "a\0", "n_predict": 1}, why="no code", status=400, theirs_status=200
    ),
    "three completions": Row(
        "POST /infill",
        {"input_prefix": CODE, "input_suffix": "", "n_predict": 4, "n_cmpl": 3, **GREEDY},
        ("0/index", "2/index", "3"),
    ),
    "three by OpenAI's name": Row(
        "POST /completion",
        {"prompt": CODE, "n_predict": 4, "n": 3, **GREEDY},
        ("0/content", "2/content", "2/index", "3"),
    ),
    "three of two prompts": Row(
        "POST /completion",
        {"prompt": [CODE, "a\n"], "n_predict": 4, "n_cmpl": 3, **GREEDY},
        ("2/content", "3/content", "5/index", "6"),
    ),
    "three in /v1/completions": Row(
        "POST /v1/completions", {"prompt": CODE, "max_tokens": 4, "n": 3, **GREEDY}, ("choices/2/text", "choices/3")
    ),
    "more than -np": Row(
        "POST /completion",
        {"prompt": CODE, "n_predict": 1, "n_cmpl": 5},
        why="up to 64, which wait for a slot",
        theirs_status=400,
        ours={"4/index": 4},
    ),
    "no completion": Row("POST /completion", {"prompt": CODE, "n_cmpl": 0}, status=400),
    "some fields": completion(response_fields=["content", "timings/prompt_n", "nothing"]),
    "an empty name of a field": completion(response_fields=[""]),
    # --- what would change the answer ------------------------------------------------------------------
    "neutral values": completion(
        **dict.fromkeys(("frequency_penalty", "presence_penalty", "dry_multiplier", "xtc_probability", "mirostat"), 0),
        **dict.fromkeys(("repeat_penalty", "typical_p"), 1.0),
        **{"top_n_sigma": -1, "dynatemp_range": 0, "adaptive_target": -1, "min_keep": 0, "logit_bias": [], "lora": []},
        **{"grammar": "", "ignore_eos": False, "post_sampling_probs": False, "repeat_last_n": 64, "mirostat_tau": 5},
    ),
    "grammar": refused("grammar", 'root ::= "a"'),
    "json_schema": refused("json_schema", {}),
    "logit_bias": refused("logit_bias", [[70, 5]]),
    "mirostat": refused("mirostat", 2),
    "repeat_penalty": refused("repeat_penalty", 1.1),
    "frequency_penalty": refused("frequency_penalty", 0.5),
    "presence_penalty": refused("presence_penalty", 0.5),
    "dry_multiplier": refused("dry_multiplier", 0.8),
    "xtc_probability": refused("xtc_probability", 0.5),
    "typical_p": refused("typical_p", 0.5),
    "top_n_sigma": refused("top_n_sigma", 1),
    "dynatemp_range": refused("dynatemp_range", 0.5),
    "ignore_eos": refused("ignore_eos", True),
    "post_sampling_probs": refused("post_sampling_probs", True),
    "response_format": Row(
        "POST /v1/chat/completions",
        {"messages": HELLO, "max_tokens": 1, "response_format": {"type": "json_object"}},
        why="nothing here can hold an answer to JSON",
        status=400,
        theirs_status=200,
        ours={"error/param": "response_format"},
    ),
    "response_format text": Row(
        "POST /v1/chat/completions",
        {"messages": HELLO, "max_tokens": 2, "response_format": {"type": "text"}, **GREEDY},
        ("choices/0/message",),
    ),
    "suffix": Row(
        "POST /v1/completions",
        {"prompt": CODE, "suffix": "\n", "max_tokens": 1, **GREEDY},
        why="theirs leaves suffix, echo and best_of out in silence",
        ours={"usage/prompt_tokens": 21},
        theirs={"usage/prompt_tokens": 17},
    ),
    "log-probabilities": Row(
        "POST /completion",
        {"prompt": CODE, "n_predict": 1, "n_probs": 2, **GREEDY},
        tuple(
            f"completion_probabilities/0/{path}"
            for path in ("id", "token", "bytes", "top_logprobs/1/id", "top_logprobs/1/token", "top_logprobs/2")
        ),
    ),
    # --- conversations ---------------------------------------------------------------------------------
    "a tool's answer": Row(
        "POST /apply-template",
        {
            "messages": [
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "1", "content": "x"},
            ]
        },
        ("prompt",),
    ),
    "a beginning to go on with": Row(
        "POST /apply-template", {"messages": [*HELLO, {"role": "assistant", "content": "Hel"}]}, ("prompt",)
    ),
    "a beginning, gone on with": Row(
        "POST /v1/chat/completions",
        {"messages": [*HELLO, {"role": "assistant", "content": "def f(x):\n"}], "max_tokens": 8, **GREEDY},
        ("choices/0/finish_reason", "usage/prompt_tokens"),
    ),
    "no content": Row("POST /apply-template", {"messages": [{"role": "user", "content": None}]}, ("prompt",)),
    "content left out": Row("POST /apply-template", {"messages": [{"role": "user"}]}, status=400),
    "no messages": Row("POST /apply-template", {}, status=400),
    "an image": Row(
        "POST /v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        why="whose mistake it is",
        status=400,
        theirs_status=500,
    ),
    "no tools": Row(
        "POST /v1/chat/completions",
        {"messages": HELLO, "tools": [], "max_tokens": 2, **GREEDY},
        ("choices/0/message",),
    ),
    "tools that may not be called": Row(
        "POST /v1/chat/completions",
        {"messages": HELLO, "tools": [TOOL], "tool_choice": "none", "max_tokens": 2, **GREEDY},
        ("choices/0/message",),
    ),
    "tools": Row(
        "POST /v1/chat/completions",
        {"messages": HELLO, "tools": [TOOL], "max_tokens": 2, **GREEDY},
        why="ChatML shows no tools to the model, so theirs waits for calls that never come; ours says so",
        status=400,
        theirs_status=200,
        ours={"error/param": "tools"},
    ),
    # --- longer than the context -----------------------------------------------------------------------
    "as many ids as fit": completion(prompt=[70] * (CONTEXT - 1), response_fields=["tokens_predicted", "truncated"]),
    "too many ids": Row("POST /completion", {"prompt": [70] * CONTEXT}, status=400),
    "too long a text": Row(
        "POST /completion",
        {"prompt": LONG, "n_predict": 4, **GREEDY},
        why="a text is cut to what is nearest to the cursor",
        theirs_status=400,
        ours={"truncated": True, "tokens_evaluated": CONTEXT - 4},
    ),
    "too long a conversation": Row(
        "POST /v1/chat/completions", {"messages": [{"role": "user", "content": LONG}]}, status=400
    ),
    "a long file": Row(
        "POST /infill",
        {"input_prefix": LONG, "input_suffix": LONG, "n_predict": 4, **GREEDY},
        why="theirs fills a batch (-b 256), 3 to 1, and ours the context",
        ours={"tokens_evaluated": CONTEXT - 4, "truncated": True},
        theirs={"tokens_evaluated": 257, "truncated": False},
    ),
    "a long file and others": Row(
        "POST /infill",
        {"input_prefix": LONG, "input_suffix": LONG, "input_extra": EXTRA * 9, "n_predict": 4, **GREEDY},
        why="theirs gives other files two tokens more than there are (unless started with -n)",
        theirs_status=400,
        ours={"truncated": True},
        theirs={"error/n_prompt_tokens": CONTEXT + 3},
    ),
    # --- what a server tells of itself -----------------------------------------------------------------
    "/health": Row("GET /health", None, ("status",)),
    "/v1/health": Row("GET /v1/health", None, ("status",)),
    "/models": Row("GET /models", None, ("object", "data/0/id", "data/0/object", "data/0/meta/n_vocab", "data/1")),
    "/v1/models": Row("GET /v1/models", None, ("data/0/meta/n_ctx", "data/0/meta/n_ctx_train")),
    "/v1/models/NAME": Row(
        "GET /v1/models/tiny", why="OpenAI's clients ask for it", theirs_status=404, ours={"id": "tiny"}
    ),
    "/props": Row(
        "GET /props",
        None,
        ("default_generation_settings/n_ctx", "total_slots", "model_alias", "eos_token", "modalities"),
    ),
    "/slots": Row("GET /slots", None, ("3/id", "3/n_ctx", "3/is_processing", "4")),
    "/completions": Row(
        "POST /completions", {"prompt": CODE, "n_predict": 4, **GREEDY}, ("content", "stop", "tokens_predicted")
    ),
    "/chat/completions": Row(
        "POST /chat/completions", {"messages": HELLO, "max_tokens": 2, **GREEDY}, ("choices/0/message", "object")
    ),
    "no such route": Row("POST /nowhere", {}, status=404),
    "no JSON": Row("POST /completion", b"{bad", why="whose mistake it is", status=400, theirs_status=500),
    "no object": Row("POST /completion", [], status=400),
}

LACKING = {"system_fingerprint", "timings", "models", "media_marker", "ui", "ui_settings", "chat_template_caps"} | {
    "model_ftype",
    "cors_proxy_enabled",
}
"""What llama-server tells and we do not: figures that OpenAI has not, and what is about itself."""
