"""Shards come whole and on the disk, or not at all."""

import json
from pathlib import Path

import pytest

from smelter.__main__ import main


def tokenize(folder: Path, text: str, out: Path) -> int:
    """`smelter tokenize` of records with the text over and over, in `folder`."""
    records = [{"kind": "text", "text": f"{text}{i}", "split": "val" if i % 5 else "train"} for i in range(20)]
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return main(["tokenize", str(path), "--out", str(out), "--vocab-size", "263"])


def test_shards_are_on_the_disk_before_they_have_their_name(tmp_path: Path, disk_events: list[str]) -> None:
    """And a link to where they are to lie stays one."""
    out, folder = tmp_path / "link", tmp_path / "large disk"
    folder.mkdir()
    out.symlink_to(folder / "shards")
    assert tokenize(tmp_path, "x = 1\n", out) == 0
    place = disk_events.index("-> shards")
    assert {path.name for path in out.iterdir()} <= set(disk_events[:place])
    assert disk_events[place + 1 :] == ["large disk"]
    assert tokenize(tmp_path, "x = 2\n", out) == 0
    assert out.is_symlink()
    assert [path.name for path in folder.iterdir()] == ["shards"]


def test_a_full_disk_is_named_by_the_folder_of_shards(
    small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tokenize(tmp_path, "x = 1\n" * 40_000, small_disk / "s") == 2
    assert f"error: {small_disk / 's'}: No space left on device: " in capsys.readouterr().err
    assert list(small_disk.iterdir()) == []
