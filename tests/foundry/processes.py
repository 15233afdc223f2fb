"""`foundry generate` as a process of its own, for tests that watch, kill and repeat it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from foundry.ledger import Ledger
from tests.foundry.stub_teacher import StubTeacher

ROOT = Path(__file__).resolve().parents[2]
WORST = 300 * 10 / 1e6
"""US dollars of an answer of max_tokens, without its question."""


def write_settings(
    folder: Path, stub: StubTeacher, prompts: list[str], *, generate: str = "", teacher: str = "", name: str = "f.toml"
) -> Path:
    (folder / "seeds.jsonl").write_text(
        "".join(json.dumps({"prompt": prompt, "license": "MIT"}) + "\n" for prompt in prompts)
    )
    path = folder / name
    path.write_text(
        f"""
[generate]
max_cost = 100
{generate}
[seeds]
builtin = false
files = ["{folder / "seeds.jsonl"}"]
count = 100_000
[[teacher]]
name = "stub/one"
model = "stub-1"
base_url = "{stub.url}"
price_input = 1
price_output = 10
max_tokens = 300
{teacher}
"""
    )
    return path


def start(settings: Path, out: Path, *arguments: str, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "foundry", "generate", str(settings), "--out", str(out), *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    with process:
        try:
            stdout, stderr = process.communicate(timeout=300)
        finally:
            process.kill()  # else a test that fails would wait for it
    assert "Traceback" not in stderr, stderr
    return process.returncode, stdout, stderr


def run(settings: Path, out: Path, *arguments: str, **environment: str) -> tuple[int, str, str]:
    return finish(start(settings, out, *arguments, **environment))


def wait_until(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    while process.poll() is None and not condition():
        time.sleep(0.002)


def entries(out: Path) -> list[dict[str, Any]]:
    lines = out.with_name(f"{out.name}.journal").read_bytes().splitlines()
    return [json.loads(line[9:]) for line in lines]


def largest_commitment(out: Path) -> tuple[float, float]:
    """(most that was ever settled + reserved, what of it is left at the end), from the journal."""
    ledger, most = Ledger(0), 0.0
    for entry in entries(out):
        key = bytes.fromhex(entry.get("key", ""))
        match entry["t"]:
            case "reserve":
                ledger.reserve(key, entry["usd"])
            case "release":
                ledger.release(key)
            case "answer" | "unusable":
                ledger.settle(key, entry["cost"])
        most = max(most, ledger.settled + ledger.reserved)
    return most, ledger.settled + ledger.reserved


def kill(process: "subprocess.Popen[str]") -> bool:
    """SIGKILL; whether it was still running."""
    process.kill()
    with process:
        process.communicate()
    return process.returncode < 0


def prompts_of(number: int) -> list[str]:
    return [f"Write function number {i}." for i in range(number)]
