"""Batches: every byte of every document arrives, in rows that depend on nothing but their number."""

import gc
import json
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smelter.__main__ import main
from smelter.base.errors import ConfigError, DataError
from smelter.config import DataConfig
from smelter.data import Batch, BatchStream, prefetch
from smelter.losses.targets import SparseTeacher
from smelter.tokens.alignment import Chunks
from smelter.tokens.shards import ShardSet, Split
from smelter.tokens.windows import IGNORED, eval_windows
from tests import tiny
from tests.tokens.test_fim import undo_fim

TOKENS = tiny.tokenizer()
EOS, PAD = TOKENS.eos_id, TOKENS.pad_id
SENTINELS = (TOKENS.fim_prefix_id, TOKENS.fim_suffix_id, TOKENS.fim_middle_id)
PLAIN = DataConfig(fim_rate=0.0)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """About 60 documents from 1 to 600 tokens, some of characters that take several tokens each."""
    folder = tmp_path_factory.mktemp("data")
    pieces = [piece + "\n" for piece in tiny.CODE.split("\n\n")] + ["漢字🙂" * 40, "x", "\u2581 <|endoftext|> y"]
    with (folder / "corpus.jsonl").open("w") as file:
        for number, piece in enumerate(pieces):
            values = {"kind": "text", "id": str(number), "text": piece, "split": "train" if number % 4 else "val"}
            file.write(json.dumps(values) + "\n")
    TOKENS.save(folder / "tokenizer.json")
    arguments = ["--tokenizer", str(folder / "tokenizer.json"), "--shard-tokens", "500"]
    assert main(["tokenize", str(folder / "corpus.jsonl"), "--out", str(folder / "shards"), *arguments]) == 0
    return ShardSet.open(folder / "shards")


def stream(shards: ShardSet, config: DataConfig = PLAIN, **changes: Any) -> BatchStream:
    """Rows of 64 tokens, 12 a step, 3 a batch."""
    values = {"seq_len": 64, "seed": 5, "device_batch_size": 3, "rows_per_step": 12} | changes
    return BatchStream(shards.split("train"), shards.tokenizer, config, **values)


def test_shares_of_orders_and_of_fim_are_as_asked(shards: ShardSet) -> None:
    rows = stream(shards, DataConfig(fim_rate=0.5, fim_spm_rate=0.25), seq_len=512)
    counts = Counter[str]()
    for index in range(300):
        ids = rows.row(index).tolist()
        for piece in pieces_of(ids):
            if len(piece) > 12:
                is_fim = piece[0] == SENTINELS[0]
                counts["fim" if is_fim else "plain"] += 1
                counts["spm"] += is_fim and piece[1] == SENTINELS[1]
    assert abs(counts["fim"] / (counts["fim"] + counts["plain"]) - 0.5) < 0.05
    assert abs(counts["spm"] / counts["fim"] - 0.25) < 0.05


def test_names_must_be_the_tokenizers(shards: ShardSet) -> None:
    with pytest.raises(DataError, match=r"data\.fim_middle_token = '<MID>'.*'<\|fim_middle\|>'"):
        stream(shards, DataConfig(fim_middle_token="<MID>"))
    stream(shards, DataConfig(fim_rate=0.0, fim_middle_token="<MID>"))


# ---------------------------------------------------------------- packing


def pieces_of(ids: list[int]) -> list[list[int]]:
    """A row's pieces, without padding and without the eos that end them."""
    pieces: list[list[int]] = [[]]
    for index in ids:
        if index == EOS:
            pieces.append([])
        elif index != PAD:
            pieces[-1].append(index)
    return pieces


def documents(split: Split) -> list[list[int]]:
    """Every document's ids with eos."""
    return [split.doc_with_eos(i).tolist() for i in range(split.num_docs)]


@pytest.mark.parametrize("seq_len", [1, 7, 64, 1_000])
def test_an_epoch_predicts_every_token_of_the_stream_once(shards: ShardSet, seq_len: int) -> None:
    """Each row is a slice of the documents; together they leave out less than one row."""
    split, rows = shards.split("train"), stream(shards, seq_len=seq_len)
    assert rows._kinds[0].rows_per_epoch == split.num_tokens // seq_len
    expected = Counter(token for ids in documents(split) for token in ids)
    for epoch in (0, 3):
        made = [rows.row(epoch * rows._kinds[0].rows_per_epoch + i) for i in range(rows._kinds[0].rows_per_epoch)]
        found = Counter(token for row in made for token in row[1:].tolist())
        assert found <= expected
        assert 0 <= expected.total() - found.total() < seq_len
        texts = ["," + ",".join(map(str, ids)) + "," for ids in documents(split)]
        for row in made[:20]:
            for piece in pieces_of(row.tolist()):
                assert any("," + "".join(f"{i}," for i in piece) in text for text in texts)


def test_epochs_and_seeds_differ_in_order_and_cuts(shards: ShardSet) -> None:
    rows, other = stream(shards), stream(shards, seed=6)
    per_epoch = rows._kinds[0].rows_per_epoch
    first = {rows.row(i).tobytes() for i in range(per_epoch)}
    assert len(first) == per_epoch
    # Where windows of a long document begin is one of 64 places, so a few rows may be the same by chance.
    for others in ((rows, per_epoch), (other, 0)):
        again = {others[0].row(others[1] + i).tobytes() for i in range(per_epoch)}
        assert len(first & again) <= per_epoch // 8


def test_documents_rows_and_offset_are_drawn_anew_for_every_epoch_and_seed(shards: ShardSet) -> None:
    plans = [stream(shards, seed=seed)._kinds[0].epoch(epoch) for seed in (5, 6) for epoch in (0, 1)]
    assert len({plan.docs.tobytes() for plan in plans}) == len({plan.rows.tobytes() for plan in plans}) == 4
    assert len({plan.offset for plan in plans}) == 4


@given(index=st.integers(0, 10**6), rate=st.sampled_from([0.0, 0.3, 1.0]), seq_len=st.integers(1, 300))
@settings(max_examples=100)
def test_a_row_is_a_function_of_its_number(shards: ShardSet, index: int, rate: float, seq_len: int) -> None:
    config = DataConfig(fim_rate=rate)
    one, two = stream(shards, config, seq_len=seq_len), stream(shards, config, seq_len=seq_len)
    for other in (0, index + 1, 17):
        two.row(other)
    row = one.row(index)
    assert row.shape == (seq_len + 1,)
    assert row.tobytes() == two.row(index).tobytes()
    ids = row.tolist()
    length = len(ids) - ids[::-1].index(next((i for i in reversed(ids) if i != PAD), PAD))
    assert PAD not in ids[:length]
    assert len(ids) - length <= 12


@given(index=st.integers(0, 10**4), seq_len=st.integers(20, 300))
@settings(max_examples=100)
def test_fim_rows_hold_whole_examples_of_the_documents(shards: ShardSet, index: int, seq_len: int) -> None:
    """Every sentinel belongs to a complete example, whose text, put in order, is in a document."""
    texts = [TOKENS.decode_bytes(ids) for ids in documents(shards.split("train"))]
    for piece in pieces_of(stream(shards, DataConfig(fim_rate=1.0), seq_len=seq_len).row(index).tolist()):
        if piece and piece[0] == SENTINELS[0]:
            raw = undo_fim([*piece, EOS])
            assert raw
        else:
            assert not set(SENTINELS) & set(piece)
            raw = TOKENS.decode_bytes(piece)
        assert any(raw in text for text in texts)


@given(world_size=st.sampled_from([1, 2, 4, 6]), batch=st.sampled_from([1, 2, 3]), step=st.integers(0, 500))
@settings(max_examples=50)
def test_a_step_has_the_same_rows_on_any_number_of_devices(
    shards: ShardSet, world_size: int, batch: int, step: int
) -> None:
    def rows(size: int, world: int) -> Counter[str]:
        made = stream(shards, DataConfig(), device_batch_size=size, rows_per_step=72)
        batches = [item for rank in range(world) for item in made.step(step, rank, world)]
        return Counter(str(row.tolist()) for item in batches for row in torch.stack([item.inputs, item.targets], dim=1))

    one = rows(3, 1)
    assert one.total() == 72
    assert rows(batch, world_size) == one
    made = stream(shards, DataConfig(), device_batch_size=3, rows_per_step=72)
    following = [row.tobytes() for i in range(72) for row in [made.row(72 * step + i)[:-1]]]
    assert Counter(following) == Counter(row.tobytes() for item in made.step(step, 0, 1) for row in item.inputs.numpy())


def test_a_batch_shifts_and_ignores_padding(shards: ShardSet) -> None:
    made = stream(shards, DataConfig(fim_rate=1.0))
    batch = made.batch(2, 1, 1, 2)
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert batch.inputs.shape == batch.targets.shape == (3, 64)
    assert batch.weights is batch.doc_ids is None
    padded = 0
    for i in range(3):
        row = made.row(2 * 12 + 3 * 3 + i)
        assert batch.inputs[i].tolist() == row[:-1].tolist()
        assert batch.targets[i].tolist() == [IGNORED if index == PAD else index for index in row[1:].tolist()]
        padded += int((batch.targets[i] == IGNORED).sum())
    assert padded


def test_a_batch_moves_with_all_its_parts(shards: ShardSet) -> None:
    class Stored:
        num_rows = 5

        def rows(self, indices: Sequence[int]) -> SparseTeacher:
            ids = torch.tensor(indices).repeat_interleave(64)[:, None]
            return SparseTeacher(ids, torch.ones(ids.shape), "sampled", torch.zeros(len(ids)))

    class Scored:
        def chunks(self, doc: int, begin: int, size: int) -> Chunks:
            return Chunks.empty(size)

    config = DataConfig(use_document_mask=True, instruct_weight=2.0)
    batch = stream(shards, config, cached=[Stored(), Stored()], chunk_teachers=[Scored()]).batch(0, 0, 0, 1)
    assert [teacher.ids[::64, 0].tolist() for teacher in batch.teachers] == [[0, 1, 2]] * 2
    moved = batch.to(torch.device("meta"))
    (chunks,) = moved.chunks
    for tensor in (moved.inputs, moved.targets, moved.doc_ids, chunks.starts, chunks.ends, chunks.log_probs):
        assert tensor is not None
        assert tensor.is_meta
        assert tensor.shape == (3, 64)
    for teacher in moved.teachers:
        assert teacher.kind == "sampled"
        assert teacher.entropy is not None
        assert all(tensor.is_meta for tensor in (teacher.ids, teacher.probs, teacher.entropy))
    assert not batch.inputs.is_meta


def test_eos_begins_the_document_after_it(shards: ShardSet) -> None:
    batch = stream(shards, DataConfig(use_document_mask=True), seq_len=256).batch(0, 0, 0, 1)
    assert (batch.inputs == EOS).sum() > 3
    assert batch.doc_ids is not None
    assert batch.doc_ids.dtype == torch.int32
    for inputs, doc_ids in zip(batch.inputs.tolist(), batch.doc_ids.tolist(), strict=True):
        number = 0
        for index, doc in zip(inputs, doc_ids, strict=True):
            number += index == EOS
            assert doc == number


def test_weights_follow_their_document(tmp_path: Path) -> None:
    def answer(weight: float, text: str) -> dict[str, Any]:
        responses = [{"teacher": "t", "text": text * 30, "weight": weight}]
        return {"kind": "instruct", "prompt": "?", "responses": responses, "split": "train"}

    lines = [answer(0.5, "a "), answer(2.0, "b "), {"kind": "text", "text": "held out", "split": "val"}]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    TOKENS.save(tmp_path / "t.json")
    arguments = ["--tokenizer", str(tmp_path / "t.json"), "--out", str(tmp_path / "s")]
    assert main(["tokenize", str(tmp_path / "r.jsonl"), *arguments]) == 0
    batch = stream(ShardSet.open(tmp_path / "s"), DataConfig(fim_rate=0.5), seq_len=96).batch(0, 0, 0, 1)
    assert batch.weights is not None
    seen = set()
    for target, weight in zip(batch.targets.flatten().tolist(), batch.weights.flatten().tolist(), strict=True):
        raw = TOKENS.decode_bytes([target]) if target != IGNORED else b""
        if letter := {b"a", b"b"} & {raw.strip()}:
            assert weight == {b"a": 0.5, b"b": 2.0}[letter.pop()]
            seen.add(weight)
    assert seen == {0.5, 2.0}


def test_less_text_than_a_row_is_repeated(tmp_path: Path) -> None:
    lines = [{"kind": "text", "text": text, "split": split} for text, split in (("abc", "train"), ("x", "val"))]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["tokenize", str(tmp_path / "r.jsonl"), "--out", str(tmp_path / "s"), "--vocab-size", "263"]) == 0
    made = ShardSet.open(tmp_path / "s")
    rows = stream(made, seq_len=20)
    assert rows._kinds[0].rows_per_epoch == 1
    assert b"abcabcabc" in made.tokenizer.decode_bytes(rows.row(3))


@pytest.mark.parametrize("changes", [{"rows_per_step": 10}, {"seq_len": 0}, {"device_batch_size": 0}])
def test_sizes_must_divide(shards: ShardSet, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        stream(shards, **changes)


def test_a_step_that_does_not_divide_is_an_error(shards: ShardSet) -> None:
    with pytest.raises(ValueError, match="do not divide"):
        stream(shards).step(0, 0, 5)


@pytest.mark.parametrize("place", [(4, 0, 1), (2, 0, 2), (0, 2, 2), (-1, 0, 1)])
def test_a_batch_outside_the_step_is_an_error(shards: ShardSet, place: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="outside the step"):
        stream(shards).batch(0, *place)


# ---------------------------------------------------------------- prefetching


def same(one: Batch, two: Batch) -> bool:
    """Equal in all arrays."""
    return bool((one.inputs == two.inputs).all() and (one.targets == two.targets).all())


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2)])
def test_prefetched_batches_are_the_batches(shards: ShardSet, rank: int, world_size: int) -> None:
    made = stream(shards, DataConfig())
    ready = prefetch(stream(shards, DataConfig()), 7, rank, world_size)
    for step, batches in zip(range(7, 12), ready, strict=False):
        assert len(batches) == 4 // world_size
        assert all(map(same, batches, made.step(step, rank, world_size)))
    ready.close()


def threads() -> int:
    """How many prefetching threads there are."""
    return sum(thread.name == "smelter-prefetch" for thread in threading.enumerate())


@pytest.mark.parametrize("end", ["close", "forget"])
def test_the_thread_ends_with_its_user(shards: ShardSet, end: str) -> None:
    ready = prefetch(stream(shards), 0, 0, 1)
    next(ready)
    assert threads() == 1
    if end == "close":
        ready.close()
    del ready
    gc.collect()
    assert threads() == 0


def test_the_thread_does_not_run_ahead_without_limit(shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    made, calls = stream(shards), list[int]()
    original = made.step

    def counted(step: int, rank: int, world_size: int) -> list[Batch]:
        calls.append(step)
        return original(step, rank, world_size)

    monkeypatch.setattr(made, "step", counted)
    ready = prefetch(made, 0, 0, 1, depth=2)
    next(ready)
    time.sleep(0.4)
    assert len(calls) <= 4
    ready.close()


def test_an_error_in_the_thread_reaches_its_user(shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    made = stream(shards)
    original = made.step

    def failing(step: int, rank: int, world_size: int) -> list[Batch]:
        if step == 2:
            raise DataError("a file went away")
        return original(step, rank, world_size)

    monkeypatch.setattr(made, "step", failing)
    ready = prefetch(made, 0, 0, 1)
    assert len(list(islice(ready, 2))) == 2
    with pytest.raises(DataError, match="went away"):
        next(ready)
    assert threads() == 0


# ---------------------------------------------------------------- evaluation


@given(seq_len=st.integers(1, 700), data=st.data())
@settings(max_examples=60)
def test_every_token_is_scored_once_with_the_context_it_had(
    shards: ShardSet, seq_len: int, data: st.DataObject
) -> None:
    stride, split = data.draw(st.integers(1, seq_len)), shards.split("val")
    if seq_len > 20 and stride < seq_len // 8:
        stride = seq_len // 8  # nothing new, only slow
    scored: list[int] = []
    for inputs, targets in eval_windows(split, seq_len, stride):
        assert inputs.shape == targets.shape == (seq_len,)
        scored += targets[targets != IGNORED].tolist()
        places = np.flatnonzero(targets != IGNORED)
        assert (np.diff(places) == 1).all()
        # Each target is the next input, wherever that is in the same window.
        assert (inputs[places[1:]] == targets[places[:-1]]).all()
        if inputs[0] != EOS:
            assert places[0] >= seq_len - stride  # context before what is scored
    assert scored == [token for i in range(split.num_docs) for token in split.doc(i).tolist()]


def test_each_window_is_a_slice_of_eos_and_a_document(shards: ShardSet) -> None:
    split = shards.split("val")
    starts = []
    for inputs, _ in eval_windows(split, 32, 8):
        starts.append(int(inputs[0]))
    assert starts.count(EOS) == split.num_docs


@pytest.mark.parametrize("stride", [0, 33])
def test_a_stride_must_fit(shards: ShardSet, stride: int) -> None:
    with pytest.raises(ConfigError, match="stride"):
        next(eval_windows(shards.split("val"), 32, stride))


def test_a_batch_is_frozen(shards: ShardSet) -> None:
    batch = stream(shards).batch(0, 0, 0, 1)
    with pytest.raises(AttributeError):
        batch.inputs = batch.targets  # type: ignore[misc]
    assert replace(batch, weights=None).weights is None
