"""Foundry through a real OpenCode server: up to a trained model, with a server that is killed, with faulty teachers."""

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from foundry.__main__ import main as foundry
from smelter.__main__ import main as smelter
from smelter.base.record import read_records
from smelter.run.metrics import read_metrics
from tests.foundry.processes import finish, run, start, wait_until
from tests.foundry.real_opencode import KEY, Server, running
from tests.foundry.streaming_stub import StreamingStub
from tests.foundry.stub_teacher import answer_to

pytestmark = [pytest.mark.real, pytest.mark.slow]

OUTCOMES = {
    "429": ("stop", 2),
    "500": ("stop", 2),
    "disconnect": ("stop", 2),
    "cut": ("stop", 2),
    "unfinished": ("stop", 2),
    "bad_event": ("stop", 2),
    "garbage": ("stop", 2),
    "empty": ("stop", 2),
    "hang": ("stop", 2),
    "length": ("length", 1),
    "400": ("", 1),
    "only_reasoning": ("", 1),
}
"""Fault of the first call -> (finish of the answer in the end, calls in all)."""


def fault_of(prompt: str, number: int) -> str:
    return prompt if prompt in OUTCOMES and number == 0 else ""


@pytest.fixture(scope="module")
def stub() -> Iterator[StreamingStub]:
    with StreamingStub(faults=fault_of, key=KEY) as one:
        yield one


@pytest.fixture(scope="module")
def server(stub: StreamingStub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("opencode"), stub) as one:
        yield one


@pytest.fixture(autouse=True)
def _environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.secrets.items():
        monkeypatch.setenv(name, value)


def settings(folder: Path, server: Server, stub: StreamingStub, seeds: str, *, model: str = "stub/one") -> Path:
    path = folder / "foundry.toml"
    path.write_text(
        f'[generate]\nin_flight = 32\nmax_cost = 100\nsystem = "Be brief."\n{seeds}\n[[teacher]]\nname = "oc/one"\n'
        f'backend = "opencode"\nmodel = "{model}"\nbase_url = "{stub.url}"\nkey_env = "STUB_KEY"\n'
        f'server_url = "{server.url}"\nprice_input = 1\nprice_output = 10\ntimeout_seconds = 5\n'
    )
    return path


def given(folder: Path, prompts: list[str]) -> str:
    file = folder / "seeds.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return f'[seeds]\nbuiltin = false\nfiles = ["{file}"]\ncount = 10_000'


def sessions(server: Server) -> tuple[str, ...]:
    async def ask() -> tuple[str, ...]:
        async with server.client() as client:
            return await client.sessions()

    return asyncio.run(ask())


def test_from_a_teacher_behind_opencode_to_fifty_training_steps(
    server: Server, stub: StreamingStub, tmp_path: Path
) -> None:
    answers, kept, shards, folder = (str(tmp_path / name) for name in ("raw.jsonl", "clean.jsonl", "shards", "run"))
    stub.requests.clear()
    assert foundry(["generate", str(settings(tmp_path, server, stub, "[seeds]\ncount = 120")), "--out", answers]) == 0
    asked = {record.prompt for record in read_records(answers)}
    assert len(asked) == len(stub.requests) == 120
    # What the teacher got is what the records say that was asked, and not a byte more.
    for request in stub.requests:
        system, user = request["messages"]
        assert system == {"role": "system", "content": "Be brief."}
        assert user["role"] == "user"
        asked.remove(user["content"])
        assert not {"tools", "tool_choice"} & set(request)
    assert not asked
    assert sessions(server) == ()
    assert foundry(["clean", answers, "--out", kept, "--near-duplicates", "0"]) == 0
    records = list(read_records(kept))
    assert len(records) >= 100
    assert {response.teacher for record in records for response in record.responses} == {"oc/one"}
    assert smelter(["tokenize", kept, "--out", shards, "--vocab-size", "512", "--val-fraction", "0.1"]) == 0
    shape = "--hidden-size=32 --num-layers=2 --num-heads=2 --num-kv-heads=1 --head-dim=16 --intermediate-size=64"
    rest = "--vocab-size=512 --max-seq-len=64 --total-batch-size=512 --num-steps=50 --warmup-steps=5 --log-every=1"
    plain = ["--no-use-torch-compile", "--precision=fp32", "--device=cpu", "--eval-every=0", "--eval-tokens=256"]
    assert smelter(["train", *shape.split(), *rest.split(), *plain, "--shards", shards, "--run-dir", folder]) == 0
    losses = [row["loss"] for row in read_metrics(Path(folder) / "metrics.jsonl")]
    assert len(losses) == 50
    assert losses[-1] < losses[0] - 0.5


def test_each_fault_has_its_outcome(server: Server, stub: StreamingStub, tmp_path: Path) -> None:
    stub.prompts.clear()
    out = tmp_path / "t.jsonl"
    code, stdout, stderr = run(settings(tmp_path, server, stub, given(tmp_path, [*OUTCOMES, "good"])), out)
    assert code == 0, stderr
    found = {record.prompt: record.responses[0].finish for record in read_records(out)}
    assert found == {"good": "stop"} | {name: finish for name, (finish, _) in OUTCOMES.items() if finish}
    assert {name: stub.prompts[name] for name in OUTCOMES} == {name: calls for name, (_, calls) in OUTCOMES.items()}
    assert "2 seeds failed; the same command asks them again" in stdout
    assert sessions(server) == ()


def test_a_wrong_key_and_an_unknown_model_end_the_run(server: Server, stub: StreamingStub, tmp_path: Path) -> None:
    seeds = given(tmp_path, ["Hello."])
    for model, said in [("wrong/one", "HTTP 401"), ("stub/on", "did you mean 'stub/one'")]:
        code, _, stderr = run(settings(tmp_path, server, stub, seeds, model=model), tmp_path / "t.jsonl")
        assert code == 2
        assert said in stderr.splitlines()[-1]
        assert "sk-wrong" not in stderr
        assert not (tmp_path / "t.jsonl").exists()


def test_the_server_is_killed_and_started_again(server: Server, stub: StreamingStub, tmp_path: Path) -> None:
    """The run waits for it, and goes on; every answer is kept and none is asked twice that came."""
    prompts, out = [f"Explain number {i}." for i in range(200)], tmp_path / "t.jsonl"
    stub.prompts.clear()
    stub.latency = 0.1
    process = start(settings(tmp_path, server, stub, given(tmp_path, prompts)), out)
    wait_until(lambda: stub.prompts.total() >= 80, process)
    os.kill(server.pid, signal.SIGKILL)
    server.script()
    code, stdout, stderr = finish(process)
    assert code == 0, stderr
    assert "failed" not in stdout
    records = list(read_records(out))
    assert [record.prompt for record in records] == prompts
    assert [record.responses[0].text for record in records] == [answer_to(prompt) for prompt in prompts]
    assert 0 < stub.prompts.total() - len(prompts) <= 32
    assert sessions(server) == ()
