"""The requests of clients that cannot be run here, as their sources make them, and what each takes of the answer.

Every entry names the version and the line that it was read from. Settings are those of docs/editors.md; all other
values are the client's defaults. Cursor places are gaps that the model knows (see `student`).
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.serving.clients.student import ANSWER, BLOCK, INDENTED, QUESTION, THRICE, TWICE, Gap

LLAMA_VIM = "llama.vim a1c8e6e"
LLAMA_VSCODE = "llama.vscode 0.0.63"
MINUET = "minuet-ai.nvim 479487c"
ZED = "Zed 09512d2"
LLM_LS = "llm-ls 0.5.4 (1c52b94), llm.nvim ce69731"
CONTINUE = "Continue d0a3c0b"
CMP_AI = "cmp-ai 996c765"
OLLAMA = "Ollama fb30760"

UNHURRIED = 60_000
"""Milliseconds to write in, where clients give less: what is shown may not depend on how busy a machine is."""
JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Replay:
    """A request of a client: `read` gives what it would show from the raw answer, which is to be `shown`."""

    client: str
    source: str
    path: str
    body: dict[str, Any]
    shown: str
    read: Callable[[str], str]
    headers: dict[str, str] = field(default_factory=lambda: JSON)

    def __str__(self) -> str:
        return f"{self.client}: {self.source}".replace("/", ".")


def fim(gap: Gap) -> str:
    """Qwen's template, which clients fill in themselves."""
    return f"<|fim_prefix|>{gap.prefix}<|fim_suffix|>{gap.suffix}<|fim_middle|>"


# --- how they read answers --------------------------------------------------------------------------


def _events(raw: str) -> list[dict[str, Any]]:
    """The objects of an event stream."""
    lines = [line.removeprefix("data:").strip() for line in raw.splitlines() if line.startswith("data:")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def read_llama_vim(raw: str) -> str:
    """autoload/llama.vim:907-925 and 1045-1053: the bytes are matched, then trailing line breaks go."""
    assert re.match(r"\s*{", raw)
    assert re.search(r'"content"\s*:"', raw), "Vim's \\s* stands before the colon: a space after it is not matched"
    return str(json.loads(raw)["content"]).rstrip("\n")


def read_llama_vscode(raw: str) -> str:
    """src/completion.ts:378: of a list, the different texts are offered."""
    answer = json.loads(raw)
    assert isinstance(answer, list)
    assert len(answer) == 3
    (text,) = {choice["content"] for choice in answer}
    return str(text).rstrip("\n")


def read_minuet(raw: str) -> str:
    """lua/minuet/utils.lua:566: every line that is JSON, with or without `data:`, adds choices[1].text."""
    found = []
    for line in raw.split("\n"):
        try:
            text = json.loads(line.removeprefix("data:"))["choices"][0]["text"]
        except (ValueError, LookupError, TypeError):
            continue
        found.append(text if isinstance(text, str) else "")
    return "".join(found)


def read_zed(raw: str) -> str:
    """crates/edit_prediction, RawCompletionResponse: every one of these fields is required."""
    answer = json.loads(raw)
    assert all(isinstance(answer[name], str) for name in ("id", "object", "model"))
    assert isinstance(answer["created"], int)
    assert all(isinstance(answer["usage"][f"{name}_tokens"], int) for name in ("prompt", "completion", "total"))
    return str(answer["choices"][0]["text"])


def read_first_text(raw: str) -> str:
    """choices[0].text."""
    return str(json.loads(raw)["choices"][0]["text"])


def read_text_stream(raw: str) -> str:
    """choices[0].text of every event that has it."""
    return "".join(event["choices"][0]["text"] for event in _events(raw) if event.get("choices"))


def read_content_stream(raw: str) -> str:
    """`content` of every event."""
    return "".join(event["content"] for event in _events(raw))


def read_chat(raw: str) -> str:
    """choices[0].message.content."""
    return str(json.loads(raw)["choices"][0]["message"]["content"])


def read_chat_stream(raw: str) -> str:
    """choices[0].delta.content of every event that has it."""
    return "".join(event["choices"][0]["delta"].get("content") or "" for event in _events(raw) if event["choices"])


def read_nothing(raw: str) -> str:
    """It is not looked at, but must be JSON."""
    json.loads(raw)
    return ""


# --- what they send ---------------------------------------------------------------------------------

RING = [{"text": "import sys\n\nx = 1\n", "time": [1, 500_000], "filename": "other.py"}]
FIELDS = [
    "content",
    *[
        f"timings/{what}_{unit}"
        for what in ("prompt", "predicted")
        for unit in ("n", "ms", "per_token_ms", "per_second")
    ],
    "truncated",
    "tokens_cached",
]


def _lines(gap: Gap) -> tuple[str, str]:
    """Whole lines before the cursor, and what stands before it on its own."""
    before, line_break, line = gap.prefix.rpartition("\n")
    return before + line_break, line


def llama_vim(gap: Gap, shown: str, extra: list[dict[str, Any]]) -> Replay:
    """A suggestion at a cursor."""
    lines, line = _lines(gap)
    body = {
        "id_slot": 0,
        "input_prefix": lines,
        "input_suffix": gap.suffix,
        "input_extra": extra,
        "prompt": line,
        "n_predict": 32,
        "stop": [],
        "n_indent": len(line) - len(line.lstrip()),
        "top_k": 40,
        "top_p": 0.90,
        "samplers": ["top_k", "top_p", "infill"],
        "stream": False,
        "cache_prompt": True,
        "t_max_prompt_ms": 500,
        "t_max_predict_ms": UNHURRIED,  # it sends 250
        "response_fields": FIELDS,
        "model": "",
    }
    headers = {**JSON, "Authorization": "Bearer "}
    return Replay(LLAMA_VIM, "autoload/llama.vim:796", "/infill", body, shown, read_llama_vim, headers)


def llama_vscode(gap: Gap, shown: str) -> Replay:
    """A suggestion at a cursor, in three variants."""
    lines, line = _lines(gap)
    body = {
        "id_slot": 0,
        "input_prefix": lines,
        "input_suffix": gap.suffix,
        "input_extra": [{**chunk, "time": 1_700_000_000_000} for chunk in RING],
        "prompt": line,
        "n_predict": 32,
        "n_cmpl": 3,
        "top_k": 40,
        "top_p": 0.99,
        "stream": False,
        "samplers": ["top_k", "top_p", "infill"],
        "cache_prompt": True,
        "n_indent": len(line) - len(line.lstrip()),
        "t_max_prompt_ms": 500,
        "t_max_predict_ms": UNHURRIED,  # it sends 500
    }
    return Replay(LLAMA_VSCODE, "src/llama-server.ts:200", "/infill", body, shown, read_llama_vscode)


WARM_UP = {
    "id_slot": 0,
    "input_prefix": "",
    "input_suffix": "",
    "input_extra": RING,
    "prompt": "",
    "n_predict": 0,
    "samplers": [],
    "cache_prompt": True,
    "t_max_predict_ms": 1,
}
CHAT = [{"role": "user", "content": QUESTION}]
UP_TO_LESS_INDENTED = " low\n    "
"""`n_indent` ends the answer before the next line, which is indented less than the cursor's."""
CONTINUE_STOPS = ["/src/", "#- coding: utf-8", "```"]

REPLAYS = [
    llama_vim(THRICE, THRICE.middle, RING),
    llama_vim(TWICE, TWICE.middle, []),
    llama_vim(BLOCK, BLOCK.middle, RING),
    llama_vim(INDENTED, UP_TO_LESS_INDENTED, []),
    Replay(
        LLAMA_VIM,
        "autoload/llama.vim:552",
        "/infill",
        {**WARM_UP, "temperature": 0.0, "stream": False, "t_max_prompt_ms": 1, "response_fields": [""], "model": ""},
        "",
        read_nothing,
    ),
    Replay(
        LLAMA_VIM,
        "autoload/llama.vim:1396",
        "/v1/chat/completions",
        {
            "id_slot": 0,
            "messages": CHAT,
            "samplers": [],
            "n_predict": 0,
            "stream": False,
            "cache_prompt": True,
            "response_fields": [""],
            "model": "",
        },
        "",
        read_nothing,
    ),
    Replay(
        LLAMA_VIM,
        "autoload/llama.vim:1491",
        "/v1/chat/completions",
        {
            "id_slot": 0,
            "messages": CHAT,
            "min_p": 0.1,
            "temperature": 0.1,
            "samplers": ["min_p", "temperature"],
            "stream": True,
            "cache_prompt": True,
            "model": "",
        },
        ANSWER,
        read_chat_stream,
    ),
    llama_vscode(THRICE, THRICE.middle),
    llama_vscode(BLOCK, BLOCK.middle),
    llama_vscode(INDENTED, UP_TO_LESS_INDENTED),
    Replay(LLAMA_VSCODE, "src/llama-server.ts:185", "/infill", {**WARM_UP, "t_max_prompt_ms": 500}, "", read_nothing),
    Replay(
        LLAMA_VSCODE,
        "src/llama-server.ts:157",
        "/v1/completions",
        {
            "model": "",
            "prompt": fim(THRICE),
            "max_tokens": 32,
            "temperature": 0.1,
            "top_p": 0.99,
            "stream": False,
        },
        THRICE.middle,
        read_first_text,
    ),
    Replay(
        LLAMA_VSCODE,
        "src/llama-server.ts:297",
        "/v1/chat/completions",
        {"messages": CHAT, "stream": False, "temperature": 0.8},
        ANSWER,
        read_chat,
    ),
    Replay(
        MINUET,
        "lua/minuet/backends/openai_base.lua:134",
        "/v1/completions",
        {"model": "any", "stream": True, "max_tokens": 32, "temperature": 0, "prompt": fim(THRICE)},
        THRICE.middle,
        read_minuet,
        {**JSON, "Accept": "application/json", "Authorization": "Bearer xterm"},
    ),
    Replay(
        ZED,
        "crates/edit_prediction/src/open_ai_compatible.rs:77",
        "/v1/completions",
        {
            "model": "any",
            "prompt": fim(THRICE),
            "max_tokens": 32,
            "stop": ["<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"],
        },
        THRICE.middle,
        read_zed,
    ),
    Replay(
        LLM_LS,
        "crates/llm-ls/src/backend.rs:233",
        "/v1/completions",
        {
            "temperature": 0.2,
            "top_p": 0.95,
            "max_tokens": 32,
            "prompt": fim(THRICE),
            "model": "any",
            "stream": False,
        },
        THRICE.middle,
        read_first_text,
    ),
    Replay(
        CONTINUE,
        "core/llm/llms/LlamaCpp.ts:38",
        "/completion",
        {
            "model": "any",
            "prompt": fim(THRICE),
            "stream": True,
            "n_predict": 32,
            "stop": CONTINUE_STOPS,
            "temperature": 0,
        },
        THRICE.middle,
        read_content_stream,
        {**JSON, "Authorization": "Bearer undefined"},
    ),
    Replay(
        CONTINUE,
        "core/llm/llms/OpenAI.ts:497",
        "/v1/completions",
        {
            "model": "any",
            "max_tokens": 32,
            "temperature": 0,
            "stream": True,
            "stop": CONTINUE_STOPS,
            "prompt": fim(THRICE),
        },
        THRICE.middle,
        read_text_stream,
    ),
    Replay(
        CMP_AI,  # but for its words: the conversation is one that the model knows
        "lua/cmp_ai/backends/openai.lua:37",
        "/v1/chat/completions",
        {"messages": CHAT, "model": "any", "temperature": 0.1, "n": 1},
        ANSWER,
        read_chat,
    ),
    Replay(
        OLLAMA,  # to the llama-server that it runs: what /api/generate makes of the Modelfile that export writes
        "llm/llama_server.go:1559",
        "/completion",
        {
            "prompt": fim(THRICE),
            "stream": True,
            "cache_prompt": True,
            "n_predict": -1,
            "n_keep": 4,
            "temperature": 0.8,
            "top_k": 40,
            "top_p": 0.9,
            "min_p": 0,
            "repeat_penalty": 1,
            "repeat_last_n": 64,
            "frequency_penalty": 0,
            "presence_penalty": 0,
            "typical_p": 1,
            "seed": -1,
        },
        THRICE.middle,
        read_content_stream,
    ),
]
