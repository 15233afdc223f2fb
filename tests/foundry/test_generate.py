"""`foundry generate`, whole: a real process asks a real server, is killed, and goes on as if nothing had been."""

import signal
from collections import Counter
from pathlib import Path

import pytest

from smelter.base.record import read_records
from tests.foundry.processes import (
    WORST,
    finish,
    largest_commitment,
    prompts_of,
    run,
    start,
    wait_until,
    write_settings,
)
from tests.foundry.stub_teacher import StubTeacher, answer_to, cost_of, usage_of


def test_records_are_as_promised_and_nothing_is_asked_twice(tmp_path: Path) -> None:
    prompts = prompts_of(20)
    out = tmp_path / "new" / "t.jsonl"
    with StubTeacher() as stub:
        settings = write_settings(tmp_path, stub, [*prompts, prompts[3]], generate='system = "Be brief."')
        code, stdout, stderr = run(settings, out)
        assert code == 0, stderr
        assert f"wrote 20 records to {out}" in stdout
        first = out.read_bytes()
        records = list(read_records(out))
        assert [record.prompt for record in records] == prompts  # in the order of the seeds
        assert len({record.id for record in records}) == 20
        for record in records:
            (response,) = record.responses
            assert (response.text, response.finish) == (answer_to(record.prompt), "stop")
            assert (response.teacher, response.weight) == ("stub/one", 1.0)
            billed = usage_of(record.prompt)
            assert dict(response.usage) == {"input": billed["prompt_tokens"], "output": billed["completion_tokens"]}
            assert response.cost == pytest.approx(cost_of(record.prompt))
            assert (record.kind, record.license, record.language) == ("instruct", "MIT", "python")
            assert record.meta["system"] == "Be brief."
        assert stub.requests[0]["messages"][0] == {"role": "system", "content": "Be brief."}
        assert len(stub.requests) == 20

        code, stdout, _ = run(settings, out)
        assert (code, len(stub.requests)) == (0, 20)
        assert out.read_bytes() == first

        out.unlink()  # the journal has it all
        write_settings(tmp_path, stub, [*prompts, "And one more."], generate='system = "Be brief."')
        assert run(settings, out)[0] == 0
        assert out.read_bytes().startswith(first)
        assert (len(stub.requests), len(list(read_records(out)))) == (21, 21)


def test_the_key_is_sent_and_written_nowhere(tmp_path: Path) -> None:
    out = tmp_path / "t.jsonl"
    with StubTeacher(key="swordfish-1") as stub:
        settings = write_settings(tmp_path, stub, ["Hello."], teacher='key_env = "STUB_KEY"')
        code, stdout, stderr = run(settings, out, STUB_KEY="swordfish-1")
        assert code == 0, stderr
        written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
        assert "swordfish" not in stdout + stderr + written.decode()

        code, _, stderr = run(settings, tmp_path / "u.jsonl", STUB_KEY="swordfish-2")
        assert code == 2
        (line,) = [line for line in stderr.splitlines() if "error" in line]
        assert "HTTP 401" in line
        assert "check the key" in line
        assert "swordfish" not in stderr
        assert not (tmp_path / "u.jsonl").exists()

        code, _, stderr = run(settings, tmp_path / "w.jsonl", STUB_KEY="swordfish-1\nswordfish-2")
        assert code == 2
        (line,) = stderr.splitlines()
        assert line.endswith(
            "STUB_KEY holds a line break or another control character: export the key alone, on one line"
        )
        assert "swordfish" not in line

        code, _, stderr = run(settings, tmp_path / "v.jsonl")
        assert code == 2
        assert stderr.splitlines()[-1].endswith('key_env = "STUB_KEY" is not set in the environment: export it')


@pytest.mark.slow
def test_kills_and_concurrency_do_not_show(tmp_path: Path) -> None:
    """Killed at six moments, or one at a time, or all at once: the same bytes, nothing lost, asked little twice."""
    prompts, in_flight = prompts_of(300), 32
    moments = [5, 40, 45, 90, 170, 290]
    whole, out, single = (tmp_path / name for name in ("whole.jsonl", "killed.jsonl", "single.jsonl"))
    total = sum(map(cost_of, prompts))
    cap = total + in_flight * (len(moments) + 1) * (WORST + 0.001)  # what a kill cuts off stays in the books
    with StubTeacher(latency=0.02) as stub:
        settings = write_settings(
            tmp_path, stub, prompts, generate=f"in_flight = {in_flight}", teacher="concurrency=64"
        )
        assert run(settings, whole)[0] == 0
        asked = Counter(stub.prompts)
        assert set(asked.values()) == {1}
        assert stub.most_in_flight <= in_flight

        stub.prompts.clear()
        stub.billed = 0.0
        journal = out.with_name(f"{out.name}.journal")
        before, num_kills = b"", 0
        for moment in moments:
            process = start(settings, out, "--max-cost", str(cap))
            wait_until(lambda moment=moment: stub.prompts.total() >= moment, process)  # type: ignore[misc]
            process.send_signal(signal.SIGKILL)
            with process:
                process.communicate()
            num_kills += process.returncode == -signal.SIGKILL
            assert not out.exists()
            after = journal.read_bytes() if journal.exists() else b""
            assert after.startswith(before)  # what was acknowledged stays
            before = after[: after.rfind(b"\n") + 1]
        assert num_kills == len(moments)
        code, _, stderr = run(settings, out, "--max-cost", str(cap))
        assert code == 0, stderr
        assert journal.read_bytes().startswith(before)
        assert out.read_bytes() == whole.read_bytes()
        records = list(read_records(out))
        assert len({record.id for record in records}) == len(records) == 300
        assert sum(count - 1 for count in stub.prompts.values()) <= in_flight * num_kills
        most, booked = largest_commitment(out)
        assert most <= cap + 1e-8
        assert stub.billed <= booked + 1e-8  # what never came back is booked too

        stub.latency = 0.0
        write_settings(tmp_path, stub, prompts, generate="in_flight = 1")
        assert run(settings, single)[0] == 0
        assert single.read_bytes() == whole.read_bytes()


OUTCOMES = {
    "429": ("stop", 2),
    "500": ("stop", 2),
    "disconnect": ("stop", 2),
    "half": ("stop", 2),
    "half_json": ("stop", 2),
    "garbage": ("stop", 2),
    "no_body": ("stop", 2),
    "empty": ("stop", 2),
    "other_shape": ("stop", 2),
    "error_200": ("stop", 2),
    "hang": ("stop", 2),
    "length": ("length", 1),
    "400": ("", 1),
    "filter": ("", 1),
    "only_reasoning": ("", 1),
}
"""Fault of the first call -> (finish of the answer in the end, calls in all)."""


@pytest.mark.slow
def test_each_fault_has_its_outcome(tmp_path: Path) -> None:
    """One seed a fault: asked again where that helps, else listed as failed; in either case nothing else suffers."""
    out = tmp_path / "t.jsonl"
    with StubTeacher(faults=lambda prompt, number: prompt if number == 0 else "") as stub:
        settings = write_settings(tmp_path, stub, [*OUTCOMES, "good"], teacher="timeout_seconds = 3")
        code, stdout, stderr = run(settings, out)
        assert code == 0, stderr
        found = {record.prompt: record.responses[0].finish for record in read_records(out)}
        assert found == {"good": "stop"} | {name: finish for name, (finish, _) in OUTCOMES.items() if finish}
        assert {name: stub.prompts[name] for name in OUTCOMES} == {name: calls for name, (_, calls) in OUTCOMES.items()}
        assert "3 seeds failed; the same command asks them again" in stdout
        most, _ = largest_commitment(out)
        assert most <= 100

        code, stdout, _ = run(settings, out)  # the failed ones, which have no fault any more
        assert (code, len(list(read_records(out)))) == (0, len(OUTCOMES) + 1)
        assert "failed" not in stdout
        assert stub.prompts["400"] == 2


def test_the_cap_holds_and_a_higher_one_goes_on(tmp_path: Path) -> None:
    prompts, out = prompts_of(20), tmp_path / "t.jsonl"
    cap = WORST + 0.002 + 8 * cost_of(prompts[0])
    with StubTeacher() as stub:
        settings = write_settings(tmp_path, stub, prompts)
        code, stdout, stderr = run(settings, out, "--max-cost", str(cap))
        assert code == 0, stderr
        assert "stopped early: the cap of $" in stdout
        assert 0 < len(list(read_records(out))) < 20
        most, booked = largest_commitment(out)
        assert most <= cap + 1e-8
        assert stub.billed == pytest.approx(booked)

        assert run(settings, out)[0] == 0
        assert [record.prompt for record in read_records(out)] == prompts
        assert set(stub.prompts.values()) == {1}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_after_an_interruption_the_same_command_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    prompts, out = prompts_of(40), tmp_path / "t.jsonl"
    with StubTeacher(latency=0.05) as stub:
        settings = write_settings(tmp_path, stub, prompts, generate="in_flight = 2\ngrace_seconds = 60")
        process = start(settings, out)
        wait_until(lambda: stub.prompts.total() >= 5, process)
        process.send_signal(number)
        code, _, stderr = finish(process)
        assert code == 128 + number, stderr
        assert "interrupted: " in stderr
        assert "the same command goes on" in stderr
        assert not out.exists()
        assert stub.prompts.total() < 40
        stub.latency = 0.0
        assert run(settings, out)[0] == 0
        assert [record.prompt for record in read_records(out)] == prompts
        assert set(stub.prompts.values()) == {1}  # calls in flight were awaited, not cut


def test_what_a_vendor_does_not_bill_uses_up_no_cap(tmp_path: Path) -> None:
    """Each seed meets refusals and failures first; a cap that holds three worst cases is enough for all ten."""
    prompts, out = prompts_of(10), tmp_path / "t.jsonl"
    free = ["500", "503", "529", "429"]
    with StubTeacher(faults=lambda prompt, number: free[number] if number < len(free) else "") as stub:
        settings = write_settings(tmp_path, stub, prompts, generate="in_flight = 1")
        code, stdout, stderr = run(settings, out, "--max-cost", str(3 * (WORST + 0.001) + sum(map(cost_of, prompts))))
        assert code == 0, stderr
        assert "stopped" not in stdout
        assert "held back" not in stderr
        assert [record.prompt for record in read_records(out)] == prompts
        assert largest_commitment(out)[1] == pytest.approx(stub.billed)


def test_what_may_have_been_billed_is_held_back_until_the_bill_is_read(tmp_path: Path) -> None:
    """The first try of each question is lost, and billed: the books hold it, and say why and how that ends."""
    prompts, out = prompts_of(12), tmp_path / "t.jsonl"
    lost = ["504", "502", "garbage", "half"]
    faults = {prompt: lost[number % 4] for number, prompt in enumerate(prompts)}
    with StubTeacher(faults=lambda prompt, number: "" if number else faults[prompt]) as stub:
        settings = write_settings(tmp_path, stub, prompts, generate="in_flight = 1")
        cap = 4 * (WORST + 0.0005)
        code, stdout, stderr = run(settings, out, "--max-cost", str(cap))
        assert code == 0, stderr
        most, booked = largest_commitment(out)
        assert stub.billed <= booked <= most <= cap + 1e-8
        (line,) = [line for line in stdout.splitlines() if line.startswith("stopped early")]
        assert "held back for calls that may have been billed: stub/one 1 x garbled ($0.00" in line
        assert "stub/one 1 x timeout ($0.00" in line
        assert "--settle-held US_DOLLARS" in line
        assert len(list(read_records(out))) == 3 - 1  # the third one's second try has no room any more

        code, _, stderr = run(settings, out, "--max-cost", str(cap), "--settle-held", "1")
        assert code == 2
        assert "--settle-held 1: only up to $0.0" in stderr.splitlines()[-1]

        code, stdout, stderr = run(settings, out, "--settle-held", str(3 * cost_of(prompts[0])))
        assert code == 0, stderr
        assert "stub/one 5 x garbled" in stderr
        assert [record.prompt for record in read_records(out)] == prompts
        assert stub.billed <= largest_commitment(out)[1]


def test_an_answer_of_no_use_is_booked_at_what_it_cost(tmp_path: Path) -> None:
    faults = ["empty", "only_reasoning", "filter"]
    out = tmp_path / "t.jsonl"
    with StubTeacher(faults=lambda prompt, number: prompt if number == 0 and prompt in faults else "") as stub:
        settings = write_settings(tmp_path, stub, [*faults, "good"])
        code, _, stderr = run(settings, out)
        assert code == 0, stderr
        assert "held back" not in stderr
        assert stub.prompts.total() == 5
        assert largest_commitment(out)[1] == pytest.approx(stub.billed)


def test_an_earlier_runs_failures_are_not_this_ones(tmp_path: Path) -> None:
    """A wrong key fails every seed. With the right one, and a cap that ends the run, nothing speaks of it any more."""
    prompts, out = prompts_of(6), tmp_path / "t.jsonl"
    with StubTeacher(key="right") as stub:
        settings = write_settings(tmp_path, stub, prompts, generate="in_flight = 1", teacher='key_env = "STUB_KEY"')
        code, _, stderr = run(settings, out, STUB_KEY="wrong")
        assert code == 2
        assert "HTTP 401" in stderr
        cap = str(WORST + 0.001 + cost_of(prompts[0]))
        code, stdout, stderr = run(settings, out, "--max-cost", cap, STUB_KEY="right")
        assert code == 0, stderr
        assert "stopped early" in stdout
        assert "401" not in stdout
        assert "failed" not in stdout
        done = len(list(read_records(out)))
        assert f"{len(prompts) - done} seeds were not asked" in stdout
