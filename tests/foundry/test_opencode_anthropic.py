"""A teacher with Anthropic's interface behind the real OpenCode server, as Azure's Claude and MiniMax have it."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from foundry.opencode_client import OpenCodeClient
from foundry.settings import TeacherSettings
from foundry.teacher import Answer, Question, RateLimitedError
from foundry.teachers.opencode import OpenCodeTeacher
from tests.foundry.anthropic_stub import AnthropicStub, text_of
from tests.foundry.real_opencode import KEY, PASSWORD, SCRIPT, free_port, link_program
from tests.foundry.stub_teacher import answer_to, usage_of

pytestmark = [pytest.mark.real, pytest.mark.slow]


@pytest.fixture(scope="module")
def stub() -> Iterator[AnthropicStub]:
    with AnthropicStub(key=KEY, faults=lambda prompt, number: prompt) as one:
        yield one


@pytest.fixture(scope="module")
def url(stub: AnthropicStub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("opencode")
    link_program(folder)
    address = f"http://127.0.0.1:{free_port()}"
    settings = folder / "foundry.toml"
    settings.write_text(
        f'[[teacher]]\nname = "claude"\nbackend = "opencode"\nmodel = "azure-claude/claude-sonnet-4-5"\n'
        f'base_url = "{stub.anthropic_url}"\nkey_env = "CLAUDE_KEY"\nserver_url = "{address}"\n'
    )
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "FOUNDRY_SERVER_DIR": str(folder),
        "OPENCODE_SERVER_PASSWORD": PASSWORD,
        "CLAUDE_KEY": KEY,
    }
    command = [str(SCRIPT), "--config", str(settings)]
    subprocess.run(command, env=environment, check=True)
    yield address
    subprocess.run([*command, "--stop"], env=environment, check=True)


def ask(url: str, question: Question) -> Answer:
    async def body() -> Answer:
        settings = TeacherSettings(
            name="claude",
            backend="opencode",
            model="azure-claude/claude-sonnet-4-5",
            server_url=url,
            timeout_seconds=60,
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OPENCODE_SERVER_PASSWORD", PASSWORD)
            teacher = OpenCodeTeacher(settings)
        try:
            return await teacher.ask(question)
        finally:
            await teacher.close()
            async with OpenCodeClient(url, password=PASSWORD) as client:
                assert await client.sessions() == ()

    return asyncio.run(body())


@pytest.mark.parametrize("system", ["", "Be brief."])
def test_the_teacher_receives_our_prompt_and_nothing_else(url: str, stub: AnthropicStub, system: str) -> None:
    prompt = f"Write f.\n {{}} é {len(system)}"
    answer = ask(url, Question(prompt=prompt, system=system, max_tokens=77, temperature=0.3))
    assert (answer.text, answer.finish, answer.reasoning) == (answer_to(prompt), "stop", "let me see")
    usage = usage_of(prompt)
    assert answer.usage["input"] == usage["prompt_tokens"]
    assert answer.usage["output"] == usage["completion_tokens"]
    sent = stub.requests[-1]
    assert [(message["role"], text_of(message["content"])) for message in sent.pop("messages")] == [("user", prompt)]
    assert text_of(sent.pop("system", "")) == system
    assert sent == {"model": "claude-sonnet-4-5", "max_tokens": 77, "temperature": 0.3, "stream": True}
    assert stub.prompts[prompt] == 1


def test_an_answer_that_is_cut_and_an_overload(url: str, stub: AnthropicStub) -> None:
    assert ask(url, Question(prompt="length")).finish == "length"
    with pytest.raises(RateLimitedError, match="HTTP 529"):
        ask(url, Question(prompt="529"))
    assert stub.prompts["529"] == 1
