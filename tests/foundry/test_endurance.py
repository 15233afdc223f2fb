"""What a long job meets: a hundred kills, a teacher that is down for a minute, a disk that fills up."""

import json
import random
import time
from collections import Counter
from pathlib import Path

import pytest

from smelter.base.record import read_records
from tests.foundry.processes import (
    WORST,
    entries,
    finish,
    kill,
    largest_commitment,
    prompts_of,
    run,
    start,
    wait_until,
    write_settings,
)
from tests.foundry.stub_teacher import StubTeacher, cost_of

pytestmark = [pytest.mark.real, pytest.mark.slow]


def test_a_hundred_kills(tmp_path: Path) -> None:
    """4,000 records, 64 in flight, SIGKILL at 100 random moments; then the same bytes as without."""
    prompts, in_flight, kills = prompts_of(4_000), 64, 100
    chance = random.Random(0)
    whole, out = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    journal = out.with_name(f"{out.name}.journal")
    # Room for each record once, for what each kill cut off, and for 64 worst cases at a time: no more.
    cap = sum(map(cost_of, prompts)) + in_flight * (kills + 1) * (WORST + 0.001)
    with StubTeacher(latency=0.05) as stub:
        settings = write_settings(tmp_path, stub, prompts, generate=f"in_flight = {in_flight}")
        assert run(settings, whole, "--max-cost", str(cap))[0] == 0

        stub.prompts.clear()
        stub.billed = 0.0
        acknowledged, num_kills = b"", 0
        while num_kills < kills:
            process = start(settings, out, "--max-cost", str(cap))
            enough = stub.prompts.total() + chance.randint(1, 130)
            wait_until(lambda enough=enough: stub.prompts.total() >= enough, process)  # type: ignore[misc]
            time.sleep(chance.uniform(0, 0.06))
            assert kill(process), "finished before a hundred kills: ask for more records"
            num_kills += 1
            assert not out.exists()
            after = journal.read_bytes() if journal.exists() else b""
            assert after.startswith(acknowledged), "an acknowledged entry is lost"
            acknowledged = after[: after.rfind(b"\n") + 1]
            assert stub.billed <= cap
        code, _, stderr = run(settings, out, "--max-cost", str(cap))
        assert code == 0, stderr

        assert journal.read_bytes().startswith(acknowledged)
        assert out.read_bytes() == whole.read_bytes()
        records = list(read_records(out))
        assert len({record.id for record in records}) == len(records) == len(prompts)
        reissued = stub.prompts.total() - len(prompts)
        assert reissued <= in_flight * num_kills
        answered = Counter(entry["key"] for entry in entries(out) if entry["t"] == "answer")
        assert set(answered.values()) == {1}  # what was acknowledged was never asked again
        most, booked = largest_commitment(out)
        assert most <= cap + 1e-8
        assert stub.billed <= booked + 1e-8
    print(f"{num_kills} kills, {reissued} calls reissued (at most {in_flight * num_kills}), ${most:.4f} of ${cap:.4f}")


def test_a_teacher_that_is_down_for_a_minute(tmp_path: Path) -> None:
    """HTTP 500 for 60 s: few calls are wasted on it, and every seed is answered afterwards."""
    prompts, out = prompts_of(200), tmp_path / "t.jsonl"
    begin = time.monotonic()
    with StubTeacher(faults=lambda prompt, number: "500" if time.monotonic() - begin < 60 else "") as stub:
        settings = write_settings(tmp_path, stub, prompts, generate="in_flight = 64")
        code, stdout, stderr = run(settings, out)
        assert code == 0, stderr
        assert time.monotonic() - begin >= 60
        assert [record.prompt for record in read_records(out)] == prompts
        assert "failed" not in stdout
        assert "waiting: stub/one: HTTP 500" in stderr
        assert stub.prompts.total() - len(prompts) < 150  # the first 64, then one at a time
        most, booked = largest_commitment(out)
        assert stub.billed <= booked <= most <= 100


def test_a_full_disk_loses_nothing(tmp_path: Path, small_disk: Path) -> None:
    prompts, out = prompts_of(3_000), small_disk / "t.jsonl"
    with StubTeacher() as stub:
        settings = write_settings(tmp_path, stub, prompts, generate="in_flight = 64")
        code, _, stderr = finish(start(settings, out))
        assert code == 2
        last = stderr.splitlines()[-1]
        assert f"{out}.journal: cannot write: No space left on device" in last
        assert "Make room, then the same command goes on" in last
        assert not out.exists()
        done = sum(entry["t"] == "answer" for entry in entries(out))
        asked = stub.prompts.total()
        assert 0 < done <= asked <= done + 64
        # Room is made: the job moves to a larger disk.
        larger = tmp_path / "larger" / "t.jsonl"
        larger.parent.mkdir()
        larger.with_name("t.jsonl.journal").write_bytes(out.with_name("t.jsonl.journal").read_bytes())
        code, _, stderr = finish(start(settings, larger))
        assert code == 0, stderr
        assert [record.prompt for record in read_records(larger)] == prompts
        assert stub.prompts.total() <= len(prompts) + 64


def test_the_journal_fits_but_the_output_does_not(tmp_path: Path, small_disk: Path) -> None:
    """The disk fills up only when the records are written: the answers stay, and no half of a file does."""
    prompts, out = prompts_of(900), small_disk / "t.jsonl"
    with StubTeacher() as stub:
        settings = write_settings(tmp_path, stub, prompts)
        code, _, stderr = finish(start(settings, out))
        assert code == 2, stderr
        assert "No space left on device" in stderr.splitlines()[-1]
        assert [path.name for path in small_disk.iterdir()] == ["t.jsonl.journal"]
        assert sum(entry["t"] == "record" for entry in entries(out)) == len(prompts)
        moved = tmp_path / "t.jsonl"
        moved.with_name("t.jsonl.journal").write_bytes(out.with_name("t.jsonl.journal").read_bytes())
        assert finish(start(settings, moved))[0] == 0
        assert stub.prompts.total() == len(prompts)
        assert len(json.loads(moved.read_text().splitlines()[0])["responses"]) == 1
