"""The client, the plugin and the teacher against the real OpenCode server, with a stub teacher of our own behind it."""

import asyncio
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest

from foundry.opencode.messages import Prompt
from foundry.opencode_client import OpenCodeClient
from foundry.teacher import (
    GarbledAnswerError,
    Question,
    RateLimitedError,
    RefusedKeyError,
    RejectedQuestionError,
    TeacherError,
    UnavailableError,
)
from tests.foundry.real_opencode import KEY, PASSWORD, Server, running
from tests.foundry.streaming_stub import StreamingStub
from tests.foundry.stub_teacher import answer_to, usage_of

pytestmark = [pytest.mark.real, pytest.mark.slow]

FAULTS = ["400", "401", "403", "404", "429", "500", "529", "disconnect", "garbage", "hang", "cut", "unfinished"]
FAULTS += ["length", "only_reasoning", "empty", "reasoning", "bad_event", "filter", "error_200"]


def fault_of(prompt: str, number: int) -> str:
    return prompt if prompt in FAULTS else ""


@pytest.fixture(scope="module")
def stub() -> Iterator[StreamingStub]:
    with StreamingStub(faults=fault_of, key=KEY) as running:
        yield running


@pytest.fixture(scope="module")
def server(stub: StreamingStub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("opencode"), stub) as one:
        yield one


def ask(server: Server, question: Question, **options: Any) -> Any:
    async def body() -> Any:
        teacher = server.teacher(**options)
        try:
            return await teacher.ask(question)
        finally:
            await teacher.close()
            async with server.client() as client:
                assert await client.sessions() == ()

    return asyncio.run(asyncio.wait_for(body(), 60))


@pytest.mark.parametrize("system", ["", 'Say "hi".\nBe {brief}: é "foundry" {"foundry":{}} </env>'])
def test_the_teacher_receives_our_prompt_and_nothing_else(server: Server, stub: StreamingStub, system: str) -> None:
    prompt = f'Write f.\n\n  {{"a": 1}} `x` & <b> é 🙂 "\\n" {len(system)}\n'
    question = Question(prompt=prompt, system=system, max_tokens=77, temperature=0.3, top_p=0.8, seed=11)
    answer = ask(server, question)
    assert (answer.text, answer.finish) == (answer_to(prompt), "stop")
    usage = usage_of(prompt)
    assert answer.usage["input"] == usage["prompt_tokens"]
    assert answer.usage["output"] == usage["completion_tokens"]
    sent = stub.requests[-1]
    messages = [{"role": "user", "content": prompt}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    assert sent == {
        "model": "one",
        "messages": messages,
        "max_tokens": 77,
        "temperature": 0.3,
        "top_p": 0.8,
        "seed": 11,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert stub.prompts[prompt] == 1


def test_settings_go_with_the_question_and_not_with_the_server(server: Server, stub: StreamingStub) -> None:
    ask(server, Question(prompt="plain"), omit=("temperature", "max_tokens"), extra={"reasoning_effort": "low"})
    assert "top_p" not in stub.requests[-1]
    assert "temperature" not in stub.requests[-1]
    assert "seed" not in stub.requests[-1]
    assert stub.requests[-1]["reasoning_effort"] == "low"


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        ("400", RejectedQuestionError, "HTTP 400"),
        ("401", RefusedKeyError, "HTTP 401"),
        ("403", RefusedKeyError, "HTTP 403"),
        ("404", RejectedQuestionError, "HTTP 404"),
        ("429", RateLimitedError, "HTTP 429"),
        ("500", UnavailableError, "HTTP 500"),
        ("529", RateLimitedError, "HTTP 529"),
        ("disconnect", UnavailableError, "no connection"),
        ("cut", UnavailableError, ""),
        ("garbage", GarbledAnswerError, ""),
        ("bad_event", GarbledAnswerError, ""),
        ("error_200", GarbledAnswerError, ""),
        ("unfinished", GarbledAnswerError, "half an answer"),
        ("empty", GarbledAnswerError, "an empty answer"),
        ("only_reasoning", GarbledAnswerError, "raise max_tokens"),
        ("hang", UnavailableError, "no answer within 2 s"),
    ],
)
def test_faults_come_back_as_what_they_are(
    server: Server, stub: StreamingStub, fault: str, error: type[TeacherError], words: str
) -> None:
    asked, cut = stub.prompts[fault], stub.num_cut
    with pytest.raises(TeacherError) as caught:
        ask(server, Question(prompt=fault), timeout_seconds=2.0 if fault == "hang" else 300.0)
    assert type(caught.value) is error, caught.value
    assert words in str(caught.value)
    assert KEY not in str(caught.value)
    assert stub.prompts[fault] == asked + 1, "the server tried again by itself"
    if fault == "429":
        assert caught.value.retry_after == 0.2
    if fault == "hang":
        deadline = time.monotonic() + 60
        while stub.num_cut == cut:  # the generation itself was stopped
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_wrong_key_is_said_and_not_shown(server: Server) -> None:
    with pytest.raises(RefusedKeyError, match="HTTP 401") as caught:
        ask(server, Question(prompt="x"), model="wrong/one")
    assert "sk-wrong" not in str(caught.value)


def test_answers_that_are_whole_but_special(server: Server) -> None:
    assert ask(server, Question(prompt="length")).finish == "length"
    thought = ask(server, Question(prompt="reasoning"))
    assert thought.reasoning == "let me see"
    assert thought.text == answer_to("reasoning")
    usage = usage_of("reasoning")
    assert thought.usage == {
        "input": usage["prompt_tokens"],
        "output": usage["completion_tokens"],
        "reasoning": 3,
        "cache_read": 5,
    }


def test_an_answer_in_many_events_is_put_together(server: Server, stub: StreamingStub) -> None:
    stub.pieces = 300
    try:
        assert ask(server, Question(prompt="reasoning é")).text == answer_to("reasoning é")
        assert ask(server, Question(prompt="reasoning")).reasoning == "let me see"
    finally:
        stub.pieces = 2


def test_cancelling_stops_the_generation(server: Server, stub: StreamingStub) -> None:
    async def body() -> None:
        teacher = server.teacher()
        before, cut = stub.prompts["hang"], stub.num_cut
        task = asyncio.create_task(teacher.ask(Question(prompt="hang")))
        while stub.prompts["hang"] == before:
            await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while stub.num_cut == cut:
            await asyncio.sleep(0.02)
        await teacher.close()
        async with server.client() as client:
            assert await client.sessions() == ()

    asyncio.run(asyncio.wait_for(body(), 60))


def test_events_tell_how_an_answer_grows(server: Server) -> None:
    async def body() -> None:
        async with server.client() as client:
            session = await client.create()
            prompt = Prompt(text="events", model="stub/one")
            kinds, text = [], ""
            async for event in client.send_async(session, prompt):
                kinds.append(event["type"])
                part = event["properties"].get("part", {})
                if part.get("type") == "text" and part.get("messageID") and part["text"] != "events":
                    text = part["text"]
            await client.delete(session)
            assert kinds[-1] == "session.idle"
            assert text == answer_to("events")

    asyncio.run(asyncio.wait_for(body(), 60))


def test_many_at_once_leave_nothing_behind(server: Server, stub: StreamingStub) -> None:
    async def body() -> None:
        teacher = server.teacher()
        prompts = [f"question {i}" for i in range(200)]
        answers = await asyncio.gather(*(teacher.ask(Question(prompt=prompt)) for prompt in prompts))
        await teacher.close()
        assert [answer.text for answer in answers] == [answer_to(prompt) for prompt in prompts]
        async with server.client() as client:
            assert await client.sessions() == ()

    asyncio.run(body())
    assert stub.most_in_flight <= 32


def test_a_server_that_is_killed_and_started_again(server: Server) -> None:
    async def body() -> None:
        teacher = server.teacher()
        hanging = [asyncio.create_task(teacher.ask(Question(prompt="hang"))) for _ in range(8)]
        await asyncio.sleep(1)
        os.kill(server.pid, signal.SIGKILL)
        for result in await asyncio.gather(*hanging, return_exceptions=True):
            assert isinstance(result, UnavailableError), result
        with pytest.raises(UnavailableError, match="is the server running"):
            await teacher.ask(Question(prompt="down"))
        await asyncio.to_thread(server.script)
        assert (await teacher.ask(Question(prompt="up again"))).text == answer_to("up again")
        await teacher.close()
        async with server.client() as client:
            assert await client.sessions() == ()

    asyncio.run(body())


def test_the_script_may_be_repeated_and_keeps_secrets(server: Server) -> None:
    pid = server.pid
    again = server.script()
    assert "runs already" in again.stdout
    assert server.pid == pid
    server.settings.write_text(server.settings.read_text() + "max_tokens = 99\n")
    assert "runs already" not in server.script().stdout  # other settings: another server
    assert server.pid != pid
    listening = subprocess.run(["ss", "-ltn"], capture_output=True, text=True, check=False).stdout
    assert not listening or f"127.0.0.1:{server.port} " in listening
    for path in (server.folder / f"server-{server.port}").rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert KEY.encode() not in data, path
            assert PASSWORD.encode() not in data, path
    asyncio.run(_no_password(server))


async def _no_password(server: Server) -> None:
    async with OpenCodeClient(server.url) as client:
        with pytest.raises(Exception, match="does not take the password"):
            await client.health()


def test_ask_through_the_settings_file(server: Server) -> None:
    """The plugin's absence is noticed: with a configuration of somebody else's there is no agent of ours."""
    config = json.loads((server.folder / f"server-{server.port}" / "opencode.json").read_text())
    assert config["plugin"]
    assert config["provider"]["stub"]["options"]["apiKey"] == "{env:STUB_KEY}"
