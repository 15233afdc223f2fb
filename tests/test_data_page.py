"""docs/data.md: its commands run as they stand, its records are records, its conversation is what the program makes."""

import email
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from smelter.tokens.chat import ChatFormat, head
from smelter.tokens.documents import Records
from smelter.tokens.shards import ShardSet
from smelter.tokens.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
LINES = [line.strip() for line in PAGE.splitlines() if line.startswith("    ")]


def test_the_records_are_records(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    file.write_text("\n".join(line for line in LINES if line.startswith("{")) + "\n")
    found = [(document.prompt, document.text, document.weight) for document in Records([file])]
    assert found == [("", "def f(x): ...", 1.0), ("Reverse a list.", "xs[::-1]", 2.0)]


def test_the_conversation_is_one() -> None:
    tokenizer = Tokenizer.train([], 300)
    ids, _ = ChatFormat(tokenizer).document(
        tokenizer.encode(head("user") + "Reverse a list."), tokenizer.encode("xs[::-1]")
    )
    shown = tokenizer.decode(ids, skip_special_tokens=False)
    begin = LINES.index("<|im_start|>user")
    assert shown == "\n".join(LINES[begin : begin + 4]) + "<|endoftext|>"


@pytest.mark.slow
def test_the_commands_run(tmp_path: Path) -> None:
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    commands = [line for line in LINES if line.startswith(("foundry ", "smelter ")) and "complete" not in line]
    assert len(commands) == 4
    part = f"email={Path(email.__file__).parent}"  # of the library: seconds instead of a minute
    for command in (each.replace("--source stdlib", f"--source {part}") for each in commands):
        run = subprocess.run(
            [sys.executable, "-m", *shlex.split(command)],
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stderr
    split = ShardSet.open(tmp_path / "shards").split("train")
    assert split.num_prompt is not None
    assert 0 < (split.num_prompt > 0).sum() < split.num_docs
    assert split.weights is not None
    assert set(split.weights.tolist()) == {0.5, 1.0}
    assert json.loads((tmp_path / "shards" / "index.json").read_text())["teacher_weights"] == {"local/miner": 0.5}
