"""Records to shards and back: nothing lost, nothing leaked, bad input named with its line."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smelter.__main__ import main
from smelter.base.errors import DataError
from smelter.tokens import tokenize as write_shards
from smelter.tokens.documents import Document, Records
from smelter.tokens.shards import ShardSet
from smelter.tokens.sides import Sides
from smelter.tokens.tokenize import chunks
from smelter.tokens.tokenizer import Tokenizer
from tests import tiny

PIECES = [piece + "\n\n" for piece in tiny.CODE.split("\n\n") if piece]


def record(number: int, **changes: Any) -> dict[str, Any]:
    """Text record `number`."""
    values = {
        "id": f"id{number}",
        "kind": "text",
        "text": PIECES[number % len(PIECES)] + str(number),
        "source": f"source{number}",
        "split": "val" if number % 5 == 0 else "train",
    }
    return {key: value for key, value in (values | changes).items() if value is not None}


def write_lines(path: Path, records: list[Any]) -> Path:
    """A JSONL file; bytes are written as they are."""
    lines = [item if isinstance(item, bytes) else json.dumps(item).encode() for item in records]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def tokenize(*arguments: object) -> int:
    """`smelter tokenize`."""
    return main(["tokenize", *map(str, arguments)])


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """40 records, a fifth of them held out."""
    return write_lines(tmp_path / "corpus.jsonl", [record(i) for i in range(40)])


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize("shard_tokens", [100_000_000, 300, 1])
def test_every_document_comes_back(corpus: Path, shard_tokens: int) -> None:
    out = corpus.parent / "shards"
    assert tokenize(corpus, "--out", out, "--vocab-size", 400, "--shard-tokens", shard_tokens) == 0
    shards = ShardSet.open(out, verify=True)
    assert shards.tokenizer.vocab_size == 400
    all_texts = []
    for name in ("train", "val"):
        split = shards.split(name)
        texts = [shards.tokenizer.decode(split.doc(i)) for i in range(split.num_docs)]
        all_texts += texts
        assert split.num_bytes == sum(split.doc_num_bytes) == sum(len(text.encode()) for text in texts)
        assert split.num_tokens == sum(len(split.doc(i)) + 1 for i in range(split.num_docs)) == split.offsets[-1]
        assert all(split.doc_with_eos(i)[-1] == shards.tokenizer.eos_id for i in range(split.num_docs))
        assert not any(shards.tokenizer.eos_id in split.doc(i) for i in range(split.num_docs))
        assert [split.doc_hash(i) for i in range(split.num_docs)] == [
            hashlib.sha256(text.encode()).hexdigest() for text in texts
        ]
        wanted = [record(i)["source"] for i in range(40) if record(i)["split"] == name]
        assert split.sources == wanted
        assert split.weights is None
    assert sorted(all_texts) == sorted(record(i)["text"] for i in range(40))
    num_files = len(list(out.glob("train_*.bin")))
    assert num_files == {100_000_000: 1, 1: 32}.get(shard_tokens, num_files)
    assert num_files > 1 or shard_tokens > 300


def test_the_same_input_gives_the_same_bytes(corpus: Path) -> None:
    for name in ("a", "b"):
        assert tokenize(corpus, "--out", corpus.parent / name, "--vocab-size", 400) == 0
    one, two = (sorted((corpus.parent / name).iterdir()) for name in ("a", "b"))
    assert [path.name for path in one] == [path.name for path in two]
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_instruct_records_become_a_document_per_response(tmp_path: Path) -> None:
    responses = [
        {"teacher": "a", "text": "yes", "weight": 0.25, "finish": "stop", "usage": {"in": 3}, "cost": 0},
        {"teacher": "b", "text": "no"},
        {"teacher": "c", "text": "never", "weight": 0},
    ]
    instruct = {"kind": "instruct", "prompt": "Is it?", "responses": responses, "source": "q", "split": "train"}
    path = write_lines(tmp_path / "r.jsonl", [instruct, record(0)])
    records = Records([path])
    answers = [(d.prompt, d.text, d.content, d.weight, d.teacher) for d in records][:2]
    assert answers == [("Is it?", "yes", "Is it?\nyes", 0.25, "a"), ("Is it?", "no", "Is it?\nno", 1.0, "b")]
    assert records.skipped == {"weight 0": 1}
    assert tokenize(path, "--out", tmp_path / "s", "--vocab-size", 300) == 0
    weights = ShardSet.open(tmp_path / "s").split("train").weights
    assert weights is not None
    assert weights.tolist() == [0.25, 1.0]


def test_ids_take_four_bytes_where_two_are_too_few(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tokenizer, "vocab_size", property(lambda self: 65_537))
    assert tokenize(corpus, "--out", corpus.parent / "wide", "--vocab-size", 400) == 0
    monkeypatch.undo()
    assert tokenize(corpus, "--out", corpus.parent / "narrow", "--vocab-size", 400) == 0
    wide, narrow = (ShardSet.open(corpus.parent / name).split("train") for name in ("wide", "narrow"))
    assert [str(split.doc(3).dtype) for split in (wide, narrow)] == ["uint32", "uint16"]
    assert wide.doc(3).tolist() == narrow.doc(3).tolist()


def test_a_given_tokenizer_is_used_and_its_notices_are_told(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.tokenizer().save(corpus.parent / "tokenizer.json")
    arguments = ["--tokenizer", corpus.parent / "tokenizer.json", "--fim-prefix-token", "<PRE>"]
    assert tokenize(corpus, "--out", corpus.parent / "s", *arguments) == 0
    assert ShardSet.open(corpus.parent / "s").tokenizer.hash == tiny.tokenizer().hash
    assert "the fim_prefix token is '<|fim_prefix|>'" in capsys.readouterr().out


def test_the_tokenizer_is_trained_on_the_train_side_only(tmp_path: Path) -> None:
    held_out = record(0, text="zqzqzqzq " * 500, split="val")
    assert tokenize(write_lines(tmp_path / "r.jsonl", [record(1), held_out]), "--out", tmp_path / "s") == 0
    tokenizer = ShardSet.open(tmp_path / "s").tokenizer
    assert len(tokenizer.encode("zqzqzqzq")) == 8


# ---------------------------------------------------------------- the split


@given(sources=st.lists(st.text(max_size=5), max_size=20), more=st.lists(st.text(max_size=5), max_size=20))
def test_a_source_has_one_side_whatever_else_there_is(sources: list[str], more: list[str]) -> None:
    def sides(names: list[str]) -> list[str]:
        split = Sides(0.4)
        for name in names:
            split.hear(Document("x", name, "", 1.0))
        return [split.of(Document("y", name, "", 1.0)) for name in sources]

    assert sides(sources) == sides(more + sources)
    by_source = dict(zip(sources, sides(sources), strict=True))
    assert [by_source[name] for name in sources] == sides(sources)


def test_about_the_asked_share_is_held_out() -> None:
    split = Sides(0.1)
    held_out = sum(split.of(Document("x", f"file{i}", "", 1.0)) == "val" for i in range(5_000))
    assert 400 < held_out < 600


def test_a_source_follows_the_word_of_one_of_its_records(tmp_path: Path) -> None:
    lines = [record(1, source="same", split=None), record(2, source="same", split="val"), record(3, split="train")]
    assert tokenize(write_lines(tmp_path / "r.jsonl", lines), "--out", tmp_path / "s", "--val-fraction", "1e-9") == 0
    assert ShardSet.open(tmp_path / "s").split("val").sources == ["same", "same"]


@pytest.mark.parametrize(("side", "way"), [("train", "lower"), ("val", "raise")])
def test_an_empty_side_is_an_error(side: str, way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = "val" if side == "train" else "train"
    path = write_lines(tmp_path / "r.jsonl", [record(i, split=other) for i in range(3)])
    assert tokenize(path, "--out", tmp_path / "s") == 2
    error = capsys.readouterr().err
    assert f"none of 3 documents is in '{side}'" in error
    assert f"{way} --val-fraction" in error
    assert not (tmp_path / "s").exists()


# ---------------------------------------------------------------- bad options and folders


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.jsonl"], "none.jsonl: no such file"),
        (["."], "no *.jsonl"),
        ([], "input"),
        (["r", "--val-fraction", "1"], "--val-fraction = 1"),
        (["r", "--max-line-mb", "0"], "--max-line-mb = 0"),
        (["r", "--vocab-size", "100"], "263 or more"),
        (["r", "--vocab-size", "300", "--tokenizer", "t.json"], "only one of the two"),
        (["r", "--tokenizer", "t.json"], "t.json: cannot read"),
        (["r", "--fim-prefix-token", "<|pad|>"], "must differ"),
        (["r", "--vocabsize", "300"], "--vocab-size"),
        (["r", "--out", "r"], "not a folder"),
    ],
)
def test_bad_options_are_explained(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if arguments[:1] == ["r"]:
        write_lines(tmp_path / "r", [record(0), record(1)])
    assert tokenize(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_shards_are_replaced_but_nothing_else(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = corpus.parent / "s"
    assert tokenize(corpus, "--out", out, "--vocab-size", 300, "--shard-tokens", 100) == 0
    assert tokenize(corpus, "--out", out, "--vocab-size", 320) == 0
    assert ShardSet.open(out, verify=True).tokenizer.vocab_size == 320
    assert {path.name for path in out.glob("*.bin")} == {"train_00000.bin", "val_00000.bin"}
    before = {path: path.read_bytes() for path in out.iterdir()}
    (out / "notes.txt").write_text("mine")
    assert tokenize(corpus, "--out", out) == 2
    assert "also holds 'notes.txt'" in capsys.readouterr().err
    assert tokenize(corpus, "--out", corpus.parent) == 2
    assert "not empty and not shards" in capsys.readouterr().err
    assert before.items() <= {path: path.read_bytes() for path in out.iterdir()}.items()


def test_a_failure_on_the_way_leaves_the_old_shards(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = corpus.parent / "s"
    assert tokenize(corpus, "--out", out, "--vocab-size", 300) == 0
    before = {path: path.read_bytes() for path in out.iterdir()}

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device", "x.bin")

    monkeypatch.setattr(write_shards._SplitWriter, "finish", fail)
    assert tokenize(corpus, "--out", out, "--vocab-size", 320) == 2
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    assert {path.name for path in corpus.parent.iterdir()} == {"corpus.jsonl", "s"}


KILLED = """
import os, sys
from smelter.tokens import tokenize as write_shards
from smelter.__main__ import main
write_shards._SplitWriter.finish = lambda self: os._exit(9)
main(["tokenize", *sys.argv[1:]])
"""


def test_killed_on_the_way_the_next_run_is_whole(corpus: Path) -> None:
    out = corpus.parent / "s"
    arguments = [str(corpus), "--out", str(out), "--vocab-size", "300"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False, cwd=os.getcwd())
    assert killed.returncode == 9
    assert not out.exists()
    assert tokenize(*arguments) == 0
    ShardSet.open(out, verify=True)
    assert {path.name for path in corpus.parent.iterdir()} == {"corpus.jsonl", "s"}


def test_input_that_changes_meanwhile_is_refused(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = write_shards.encode_documents

    def grown(*arguments: Any) -> Any:
        with corpus.open("a") as file:
            file.write(json.dumps(record(99)) + "\n")
        return original(*arguments)

    monkeypatch.setattr(write_shards, "encode_documents", grown)
    assert tokenize(corpus, "--out", corpus.parent / "s", "--vocab-size", 300) == 2


# ---------------------------------------------------------------- damaged shards


def _edit(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | changes))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no index": lambda s: (s / "index.json").unlink(),
    "cut index": lambda s: (s / "index.json").write_text((s / "index.json").read_text()[:200]),
    "other json": lambda s: (s / "index.json").write_text("[]"),
    "other version": lambda s: _edit(s / "index.json", version=3),
    "version 1": lambda s: _edit(s / "index.json", version=1),
    "no splits": lambda s: _edit(s / "index.json", splits={}, sha256=""),
    "no splits, as older versions wrote it": lambda s: (s / "index.json").write_text(
        json.dumps(
            {k: v for k, v in json.loads((s / "index.json").read_text()).items() if k not in ("splits", "sha256")}
        )
    ),
    "other teacher weights": lambda s: _edit(s / "index.json", teacher_weights={"a": 0.5}),
    "cut shard": lambda s: os.truncate(s / "train_00000.bin", 100),
    "no shard": lambda s: (s / "val_00000.bin").unlink(),
    "cut table": lambda s: os.truncate(s / "train_documents.npy", 200),
    "odd table": lambda s: np.save(s / "val_documents.npy", np.zeros(8)),
    "other tokenizer": lambda s: tiny.tokenizer().save(s / "tokenizer.json"),
    "no tokenizer": lambda s: (s / "tokenizer.json").unlink(),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(name: str, corpus: Path) -> None:
    out = corpus.parent / "s"
    assert tokenize(corpus, "--out", out, "--vocab-size", 300) == 0
    DAMAGE[name](out)
    with pytest.raises(DataError, match=r"tokenize( again|r)?") as caught:
        ShardSet.open(out)
    assert str(out) in str(caught.value)


def test_verifying_finds_a_flipped_bit(corpus: Path) -> None:
    out = corpus.parent / "s"
    assert tokenize(corpus, "--out", out, "--vocab-size", 300) == 0
    raw = bytearray((out / "train_00000.bin").read_bytes())
    raw[77] ^= 1
    (out / "train_00000.bin").write_bytes(raw)
    ShardSet.open(out)
    with pytest.raises(DataError, match=r"train_00000\.bin: contents have changed"):
        ShardSet.open(out, verify=True)


# ---------------------------------------------------------------- long documents


@given(text=st.lists(st.sampled_from(["a", " ", "\n", "\n\n", "\r\n", "漢", ");", "\t", "\x85", "b c\n"])).map("".join))
@settings(max_examples=300)
def test_encoding_in_parts_changes_no_id(text: str) -> None:
    tokenizer = tiny.tokenizer()
    parts = list(chunks(text, 5))
    assert "".join(parts) == text
    assert [i for part in parts for i in tokenizer.encode(part)] == tokenizer.encode(text)


def test_a_long_document_is_cut_into_parts() -> None:
    text = tiny.CODE * 3
    parts = list(chunks(text, 1_000))
    assert "".join(parts) == text
    assert len(parts) >= 9
    assert max(map(len, parts)) < 2 * len(tiny.CODE)
