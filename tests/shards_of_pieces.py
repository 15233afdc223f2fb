"""Shards with four held-out documents, one shorter than a window, made with `tiny.tokenizer()`."""

import json
from pathlib import Path

from smelter.__main__ import main
from tests import tiny

PIECES = [tiny.CODE[i : i + size] for i, size in ((0, 900), (4_000, 60), (5_000, 400), (6_000, 700), (9_000, 8_000))]
LANGUAGES = ["", "python", "", "c++", ""]


def make_shards(folder: Path) -> Path:
    """Write records, a tokenizer and the shards made of both; the folder of the shards."""
    with (folder / "corpus.jsonl").open("w") as file:
        for i, (text, language) in enumerate(zip(PIECES, LANGUAGES, strict=True)):
            split = "train" if i == 4 else "val"
            record = {"kind": "text", "text": text, "source": f"piece/{i}", "split": split, "language": language}
            file.write(json.dumps(record) + "\n")
    tiny.tokenizer().save(folder / "tokenizer.json")
    arguments = [str(folder / "corpus.jsonl"), "--out", str(folder / "shards")]
    assert main(["tokenize", *arguments, "--tokenizer", str(folder / "tokenizer.json")]) == 0
    return folder / "shards"
