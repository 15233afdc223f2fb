"""What is held out was not trained on, whichever sources a text stands in, or it is said."""

import json
from pathlib import Path
from typing import Any

import pytest

from smelter.__main__ import main
from smelter.tokens.shards import ShardSet

VAL_FRACTION = 0.3


def sides_of(folder: Path, records: list[dict[str, Any]]) -> dict[str, list[str]]:
    """The contents of train and val after `smelter tokenize`."""
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps({"id": f"id{i}"} | record) + "\n" for i, record in enumerate(records)))
    options = ["--out", str(folder / "s"), "--vocab-size", "263", "--val-fraction", str(VAL_FRACTION)]
    assert main(["tokenize", str(path), *options]) == 0
    shards = ShardSet.open(folder / "s")
    splits = {name: shards.split(name) for name in ("train", "val")}
    return {
        name: [shards.tokenizer.decode(split.doc(i)) for i in range(split.num_docs)] for name, split in splits.items()
    }


def record(text: str, source: str, split: str | None = None) -> dict[str, Any]:
    """A text record."""
    return {"kind": "text", "text": text, "source": source} | ({"split": split} if split else {})


def test_one_text_of_several_sources_is_on_one_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two repositories hold the same 200 files, of which each holds one more that is its own."""
    numbers = range(200)
    own = [record(f"own {repository}{i}", f"{repository}/{i}") for i in numbers for repository in "ab"]
    alone = sides_of(tmp_path, own)
    copies = [record(f"shared {i}", f"{repository}/{i}") for repository in "ab" for i in numbers]
    sides = sides_of(tmp_path, own + copies)
    shared = {name: {text for text in texts if text.startswith("shared")} for name, texts in sides.items()}
    assert shared["train"] & shared["val"] == set()
    assert len(shared["train"]) + len(shared["val"]) == 200
    assert 30 < len(shared["val"]) < 90
    # A text of one source alone stays where its source is.
    for name, texts in sides.items():
        assert [text for text in texts if text.startswith("own")] == alone[name]
    index = ShardSet.open(tmp_path / "s").index
    assert index["val_documents_in_train"] == 0
    torn = sum((f"own a{i}" in alone["val"]) != (f"own b{i}" in alone["val"]) for i in numbers)
    assert f"{torn} text(s) stand in sources on both sides" in capsys.readouterr().out


def test_copies_follow_the_word_of_one_record_or_source(tmp_path: Path) -> None:
    told = [record(f"told {i}", f"x/{i}", "val") for i in range(40)]
    source = [record(f"the source's {i}", f"y/{i}", "val") for i in range(40)]
    rest = [record(f"of the source {i}", f"y/{i}") for i in range(40)]
    copies = [record(f"told {i}", f"a/{i}") for i in range(40)] + [
        record(f"of the source {i}", f"b/{i}") for i in range(40)
    ]
    sides = sides_of(tmp_path, [*told, *source, *rest, *copies, record("alone", "z", "train")])
    assert sides["train"] == ["alone"]
    assert len(sides["val"]) == 200


def test_one_prompt_of_several_sources_is_on_one_side(tmp_path: Path) -> None:
    def asked(number: int, source: str, answer: str) -> dict[str, Any]:
        responses = [{"teacher": "t", "text": answer}]
        return {"kind": "instruct", "prompt": f"Q{number}?", "responses": responses, "source": source}

    numbers = range(100)
    sides = sides_of(tmp_path, [asked(i, f"{name}{i}", f"by {name}") for i in numbers for name in "ab"])
    prompts = {name: {text.split("?")[0] for text in texts} for name, texts in sides.items()}
    assert prompts["train"] & prompts["val"] == set()
    assert len(sides["train"]) + len(sides["val"]) == 200


def test_copies_that_records_put_on_both_sides_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [record(f"text {i}", f"{side}/{i}", side) for i in range(5) for side in ("train", "val")]
    rows += [record(f"only {side}", f"{side}/only", side) for side in ("train", "val")]
    sides = sides_of(tmp_path, rows)
    assert len(sides["val"]) == len(sides["train"]) == 6
    assert ShardSet.open(tmp_path / "s").index["val_documents_in_train"] == 5
    out = capsys.readouterr().out
    assert "warning: text or prompt of 5 of 6 held-out documents (30 bytes) is in train, too" in out
    assert "stand in sources" not in out
