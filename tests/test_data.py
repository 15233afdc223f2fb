"""Shards and batches: nothing lost, nothing leaked, every batch a pure function of its number."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from smelter.__main__ import main
from smelter.config import DataConfig
from smelter.data import IGNORED, BatchStream, apply_fim, eval_windows, prefetch, undo_fim
from smelter.errors import DataError
from smelter.records import MAX_LINE_BYTES
from smelter.shards import ShardSet, TokenizeOptions, tokenize

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=300)


def write_records(path: Path, count: int = 40) -> Path:
    lines = tiny.CODE.splitlines(keepends=True)
    size = len(lines) // count
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            text = "".join(lines[i * size : (i + 1) * size])
            record = {"id": str(i), "kind": "text", "text": text, "source": f"{i % 20}.py"}
            file.write(json.dumps(record) + "\n")
    return path


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    folder = tmp_path_factory.mktemp("data")
    records = write_records(folder / "records.jsonl")
    tokenize(TokenizeOptions(records=(records,), out=folder / "shards", vocab_size=512, val_fraction=0.2))
    return ShardSet.open(folder / "shards")


def stream(shards: ShardSet, *, batch: int = 2, rows: int = 8, rate: float = 0.5, seed: int = 0) -> BatchStream:
    return BatchStream(
        shards.split("train"),
        shards.tokenizer,
        DataConfig(fim_rate=rate),
        seq_len=64,
        seed=seed,
        device_batch_size=batch,
        rows_per_step=rows,
    )


def test_every_byte_of_every_record_is_in_one_split(shards: ShardSet) -> None:
    texts = []
    sources = []
    for name in ("train", "val"):
        split = shards.split(name)
        sources.append(set(split.sources))
        for i in range(split.num_docs):
            raw = shards.tokenizer.decode_bytes(split.doc(i))
            assert len(raw) == split.doc_num_bytes[i]
            texts.append(raw.decode())
    assert not sources[0] & sources[1]
    lines = tiny.CODE.splitlines(keepends=True)
    assert len("".join(texts)) == len("".join(lines[: len(lines) // 40 * 40]))


@given(
    TEXT.filter(lambda text: text.encode("utf-8", "ignore").decode() == text), st.integers(0, 2**32), st.floats(0, 1)
)
def test_fim_gives_back_every_byte(text: str, seed: int, spm_rate: float) -> None:
    tokenizer = tiny.tokenizer()
    ids = apply_fim(tokenizer, text, np.random.default_rng(seed), spm_rate)
    assert ids[-1] == tokenizer.eos_id
    assert ids.count(tokenizer.fim_middle_id) == 1
    if ids[1] != tokenizer.fim_suffix_id or spm_rate == 0:
        assert undo_fim(tokenizer, ids) == text.encode()
    else:  # suffix first: what follows the middle token is prefix and middle in one
        cut = ids.index(tokenizer.fim_middle_id)
        assert tokenizer.decode_bytes(ids[cut + 1 : -1]) + tokenizer.decode_bytes(ids[2:cut]) == text.encode()


@given(st.integers(0, 50), st.sampled_from([(1, 1), (2, 2), (4, 1), (1, 4), (8, 1)]))
@settings(deadline=None, max_examples=25)
def test_a_step_has_the_same_rows_however_they_are_shared(shards: ShardSet, step: int, shape: tuple[int, int]) -> None:
    batch, world_size = shape
    whole = stream(shards, batch=8).batch(step, 0, 0, 1).inputs
    parts = [stream(shards, batch=batch).step(step, rank, world_size) for rank in range(world_size)]
    rows = [micro.inputs for micros in zip(*parts, strict=True) for micro in micros]
    np.testing.assert_array_equal(np.concatenate(rows), whole)


@given(st.integers(0, 200), st.floats(0, 1))
@settings(deadline=None, max_examples=40)
def test_rows_are_full_of_text_and_targets_follow_inputs(shards: ShardSet, row: int, rate: float) -> None:
    tokenizer = shards.tokenizer
    ids, docs = stream(shards, rate=rate).row(row)
    assert ids.shape == docs.shape == (65,)
    padding = docs < 0
    assert (ids[padding] == tokenizer.pad_id).all()
    assert (ids[~padding] != tokenizer.pad_id).all()
    assert not padding[: 65 - 24].any()
    used = docs[~padding]
    assert (np.diff(used) >= 0).all()
    for number in np.unique(used):
        piece = ids[docs == number].tolist()
        if piece[0] == tokenizer.fim_prefix_id:
            assert piece[-1] == tokenizer.eos_id  # the middle is never cut


def test_without_fim_an_epoch_is_the_text_itself(shards: ShardSet) -> None:
    plain = stream(shards, rate=0.0, rows=1, batch=1)
    targets = np.concatenate([plain.batch(i, 0, 0, 1).targets[0] for i in range(plain.rows_per_epoch)])
    assert (targets != IGNORED).all()
    seen = np.bincount(targets, minlength=512)
    split = shards.split("train")
    expected = np.bincount(split.read(0, split.num_tokens), minlength=512)
    assert np.abs(seen - expected).sum() <= 64  # all but the incomplete last row


def test_seeds_and_epochs_differ(shards: ShardSet) -> None:
    a, b = stream(shards), stream(shards, seed=1)
    assert not np.array_equal(a.row(0)[0], b.row(0)[0])
    assert not np.array_equal(a.row(0)[0], a.row(a.rows_per_epoch)[0])


def test_prefetch_is_the_stream_and_raises_its_errors(shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    source = stream(shards)
    batches = prefetch(source, 3, 0, 1)
    for step in (3, 4, 5):
        for got, want in zip(next(batches), source.step(step, 0, 1), strict=True):
            np.testing.assert_array_equal(got.inputs, want.inputs)
    batches.close()

    def broken(step: int, rank: int, world_size: int) -> None:
        raise DataError("gone")

    monkeypatch.setattr(source, "step", broken)
    with pytest.raises(DataError, match="gone"):
        next(prefetch(source, 0, 0, 1))


@given(st.integers(4, 80), st.integers(1, 80))
@settings(deadline=None, max_examples=25)
def test_evaluation_scores_each_token_once(shards: ShardSet, seq_len: int, stride: int) -> None:
    split = shards.split("val")
    scored = [targets[targets != IGNORED] for _, targets in eval_windows(split, seq_len, min(stride, seq_len))]
    docs = [split.doc(i) for i in range(split.num_docs)]
    np.testing.assert_array_equal(np.concatenate(scored), np.concatenate(docs))


GOOD = {"id": "a", "kind": "text", "text": "x = 1\n", "source": "a.py", "split": "train"}
OTHER = {"id": "b", "kind": "text", "text": "y = 1\n", "source": "b.py", "split": "val"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not JSON"),
        (b"", "blank line"),
        (b'{"kind": "text", "text": "\xff"}', "not UTF-8"),
        (b"[]", "not a JSON object"),
        (b'{"kind": "text", "texts": "x"}', "did you mean 'text'"),
        (b'{"kind": "text", "text": 3}', "text must be str"),
        (b'{"kind": "text", "text": ""}', "not empty"),
        (b'{"kind": "text", "text": "\\ud800"}', "half a surrogate"),
        (b'{"kind": "poem", "text": "x"}', "must be"),
        (b'{"kind": "instruct", "prompt": "p"}', "responses"),
        (b'{"id": "a", "kind": "text", "text": "x"}', "occurred before"),
        (b'{"kind": "text", "text": "x", "split": "test"}', "split"),
    ],
)
def test_a_bad_line_is_named_or_counted(
    line: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + line + b"\n" + json.dumps(OTHER).encode() + b"\n")
    args = ["tokenize", str(path), "--vocab-size", "300", "--out", str(tmp_path / "s")]
    assert main(args) == 2
    error = capsys.readouterr().err
    assert f"{path}:2: " in error
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "s").exists()
    assert main([*args, "--skip-invalid"]) == 0
    assert "skipped: 1 x" in capsys.readouterr().out
    assert ShardSet.open(tmp_path / "s").split("val").num_docs == 1


@pytest.mark.slow
def test_a_200_mb_line_costs_no_memory_and_not_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.jsonl"
    with path.open("wb") as file:
        file.write(b'{"kind": "text", "text": "')
        for _ in range(200):
            file.write(b"x" * 2**20)
        file.write(b'"}\n' + json.dumps(GOOD).encode() + b"\n" + json.dumps(OTHER).encode() + b"\n")
    args = ["tokenize", str(path), "--vocab-size", "300", "--out", str(tmp_path / "s")]
    assert main(args) == 2
    assert f"{path}:1: line longer than {MAX_LINE_BYTES // 2**20} MiB" in capsys.readouterr().err
    assert main([*args, "--skip-invalid"]) == 0


@pytest.mark.parametrize("what", ["missing", "empty", "folder", "vocabulary"])
def test_bad_input_is_one_line(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.jsonl"
    options = ["--out", str(tmp_path / "s")]
    if what == "empty":
        path.touch()
    if what == "folder":
        path.mkdir()
    if what == "vocabulary":
        path.write_text(json.dumps(GOOD) + "\n")
        options += ["--vocab-size", "200"]
    assert main(["tokenize", str(path), *options]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_short_shard_is_named(shards: ShardSet, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="smelter tokenize"):
        ShardSet.open(tmp_path)
    part = shards.path / "val_00000.bin"
    whole = part.read_bytes()
    part.write_bytes(whole[:-2])
    try:
        with pytest.raises(DataError, match="bytes instead of"):
            ShardSet.open(shards.path)
    finally:
        part.write_bytes(whole)
