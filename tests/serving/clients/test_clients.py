"""Programs and packages that people have, run as they are against both servers; what they show is compared.

What our server does and llama-server does not: `suffix` of /v1/completions, which llama-server ignores.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from smelter.decoding.generate import Prompt, complete_many
from smelter.decoding.prompts import FimOrder
from smelter.run.load import load_model
from tests.serving.clients.programs import Served, clients_folder, run_client, run_node, run_python
from tests.serving.clients.student import ANSWER, CONTEXT, GAPS, PAGE, QUESTION, THRICE, Gap, tokenizer

pytestmark = pytest.mark.real

PROMPT = "import os\n\nfor name in"
REST = PAGE.removeprefix(PROMPT)
GIVEN = {
    "prompt": PROMPT,
    "ids": tokenizer().encode(PROMPT),
    "fim": f"<|fim_prefix|>{THRICE.prefix}<|fim_suffix|>{THRICE.suffix}<|fim_middle|>",
    "prefix": THRICE.prefix,
    "suffix": THRICE.suffix,
    "question": QUESTION,
}


def check(found: dict[str, Any], expected: dict[str, Any], server: Served) -> None:
    """All that a client found is as expected, but for `suffix` from llama-server, which goes on with the prefix."""
    suffix = found.pop("suffix")
    assert (suffix == THRICE.middle) == server.is_ours, suffix
    assert suffix
    assert found == expected


def test_the_model_knows_its_pages(run: Path) -> None:
    """What `smelter complete` writes: else nothing that follows would mean anything."""
    model, tokens, _ = load_model(run)
    prompts = [Prompt(gap.prefix, gap.suffix) for gap in GAPS]
    orders: tuple[FimOrder, ...] = ("psm", "spm")
    for order in orders:
        found = complete_many(model, tokens, prompts, max_tokens=64, order=order)
        assert found == [gap.middle for gap in GAPS], order
    assert complete_many(model, tokens, [Prompt(PROMPT)], max_tokens=64) == [REST]
    plain = complete_many(model, tokens, [Prompt(gap.prefix) for gap in GAPS], max_tokens=64)
    assert not any(text == gap.middle for text, gap in zip(plain, GAPS, strict=True))
    assert max(len(tokens.encode(gap.prefix + gap.suffix)) for gap in GAPS) < CONTEXT // 8


def test_openai_for_python(server: Served, tmp_path: Path) -> None:
    found = run_python("ask_openai.py", server, tmp_path, **GIVEN)
    (model,) = found["models"]
    errors = {name: ["BadRequestError", True] for name in ("too long", "no prompt", "text for a number")}
    expected = {
        "models": [model],
        "plain": REST,
        "plain, model": model,  # that of /v1/models, though the client said "any"
        "plain, finish": "stop",
        "plain, total": 0,
        "limited": tokenizer().decode(tokenizer().encode(REST)[:2]),
        "limited, finish": "length",
        "limited, tokens": 2,
        "beyond": REST,
        "stopped": REST.partition("print")[0],
        "several": [REST, REST, THRICE.middle, THRICE.middle],
        "several, indices": [0, 1, 2, 3],
        "ids": REST,
        "tokens in the prompt": THRICE.middle,
        "stream": THRICE.middle,
        "stream, finish": "stop",
        # llama-server counts the token that ends the text.
        "stream, tokens": len(tokenizer().encode(THRICE.middle)) + (not server.is_ours),
        "chat": ANSWER,
        "chat, role": "assistant",
        "chat, finish": "stop",
        "chat, logprobs": ANSWER,
        "chat, sure": True,
        "chat, alternatives": True,
        "chat, stream": ANSWER,
        "mistakes": errors,
        "together": [THRICE.middle] * 8,
    }
    check(found, expected, server)


def test_openai_for_node(server: Served, tmp_path: Path) -> None:
    expected = {
        "models": 1,
        "plain": REST,
        "plain, finish": "stop",
        "stream": THRICE.middle,
        "chat": ANSWER,
        "chat, stream": ANSWER,
        "mistake": True,
    }
    check(run_node("ask_openai.mjs", server, tmp_path, **GIVEN), expected, server)


def test_continues_adapters(server: Served, tmp_path: Path) -> None:
    """Provider `openai`'s own infilling goes to /fim/completions, which neither server has: hence the template."""
    expected = {
        "models": 1,
        "plain": REST,
        "stream": THRICE.middle,
        "stream, llama.cpp": THRICE.middle,
        "chat": ANSWER,
        "chat, stream": ANSWER,
        "fim/completions": "refused",
    }
    check(run_node("ask_continue.mjs", server, tmp_path, **GIVEN), expected, server)


def test_litellm(server: Served, tmp_path: Path) -> None:
    expected = {
        "plain": REST,
        "plain, finish": "stop",
        "plain, counts": True,
        "stream": THRICE.middle,
        "chat": ANSWER,
        "chat, stream": ANSWER,
    }
    check(run_python("ask_litellm.py", server, tmp_path, **GIVEN), expected, server)


def test_langchain(server: Served, tmp_path: Path) -> None:
    found = run_python("ask_langchain.py", server, tmp_path, **GIVEN)
    assert found == {
        "plain": REST,
        "batch": [REST, THRICE.middle],
        "stop": REST.partition("print")[0],
        "stream": THRICE.middle,
        "chat": ANSWER,
        "chat, counts": True,
        "chat, stream": ANSWER,
    }


def test_llm(server: Served, tmp_path: Path) -> None:
    """The command, with the file of models that docs/serve.md shows: a streamed text, a whole conversation."""
    models = [
        {"model_id": "student", "model_name": "any", "api_base": f"{server.url}/v1", "completion": True},
        {"model_id": "student-chat", "model_name": "any", "api_base": f"{server.url}/v1"},
    ]
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps(models))  # JSON is YAML
    program = [str(clients_folder() / "bin" / "llm"), "--key", "none"]
    environment = {"LLM_USER_PATH": str(tmp_path)}
    greedy = ["-o", "temperature", "0", "-o", "max_tokens", "64"]
    text = run_client([*program, "-m", "student", *greedy], tmp_path, stdin=PROMPT, environment=environment)
    assert text.rstrip() == REST.rstrip()
    chat = run_client(
        [*program, "--no-stream", "-m", "student-chat", *greedy, QUESTION], tmp_path, environment=environment
    )
    assert chat.rstrip() == ANSWER


@pytest.mark.parametrize("gap", [THRICE, GAPS[0], GAPS[4]], ids=["thrice", "twice", "a block"])
def test_neovim_as_llama_vim(server: Served, tmp_path: Path, gap: Gap) -> None:
    """At a cursor in a file; what is saved is the whole file."""
    file = tmp_path / "code.py"
    file.write_text(gap.prefix + gap.suffix)
    row, column = gap.prefix.count("\n") + 1, len(gap.prefix.rpartition("\n")[2])
    script = str(Path(__file__).parent / "infill.lua")
    program = [str(clients_folder() / "bin" / "nvim"), "--clean", "--headless", "-l", script]
    run_client([*program, server.url, str(file), str(row), str(column)], tmp_path)
    assert file.read_text() == gap.prefix + gap.middle + gap.suffix
