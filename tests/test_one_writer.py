"""Each command that writes a folder over a long time keeps a second process out of it, and says who is there."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from smelter.__main__ import main
from smelter.base.lock import only_writer
from tests import tiny
from tests.distillation.chunking import other_teacher
from tests.distillation.teaching import make_shards
from tests.test_train import SHAPE, write_records

Command = Callable[[Path, Path], list[str]]


def tokenize(folder: Path, out: Path) -> list[str]:
    return ["tokenize", str(write_records(folder / "r.jsonl")), "--out", str(out), "--vocab-size", "512"]


def train(folder: Path, out: Path) -> list[str]:
    shards = make_shards(folder)
    return ["train", *SHAPE, "--num-steps", "2", "--shards", str(shards), "--run-dir", str(out)]


def teach(folder: Path, out: Path) -> list[str]:
    teacher = tiny.checkpoint(folder / "teacher", tiny.model())
    return ["teach", "--teacher", str(teacher), "--shards", str(make_shards(folder)), "--rows", "4", "--out", str(out)]


def teach_chunks(folder: Path, out: Path) -> list[str]:
    teacher, shards = other_teacher(folder / "teacher"), make_shards(folder)
    return ["teach", "--method", "chunks", "--teacher", str(teacher), "--shards", str(shards), "--out", str(out)]


def export(folder: Path, out: Path) -> list[str]:
    model = tiny.model(attn_logit_soft_cap=0.0, final_logit_soft_cap=0.0)
    return ["export", str(tiny.checkpoint(folder / "run", model)), "--format", "hf", "--out", str(out)]


@contextmanager
def spied(monkeypatch: pytest.MonkeyPatch, out: Path) -> Iterator[list[bool]]:
    """Whether the folder was locked whenever something took its name."""
    locked: list[bool] = []
    original = os.replace

    def replace(source: Any, target: Any) -> None:
        if out.name in str(target):
            locked.append(any(path.exists() for path in (out / ".lock", out.with_name(f"{out.name}.lock"))))
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)
    yield locked
    monkeypatch.undo()


@pytest.mark.parametrize("command", [tokenize, train, teach, teach_chunks, export])
def test_a_second_process_is_told_who_is_there(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, option = tmp_path / "result", "--run-dir" if command is train else "--out"
    words = command(tmp_path, out)
    capsys.readouterr()
    with only_writer(out, "--out", beside=command is tokenize):
        assert main(words) == 2
    said = f"error: {out}: process {os.getpid()} is writing there: wait for its end, or choose another {option}\n"
    assert capsys.readouterr().err.endswith(said)
    assert not out.exists()
    with spied(monkeypatch, out) as locked:
        assert main(words) == 0
    assert locked
    assert all(locked)
    assert out.is_dir()
    assert not list(tmp_path.rglob("*.lock"))
