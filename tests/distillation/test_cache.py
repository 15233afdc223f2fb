"""The folder of a cache: what is written comes back, and whatever is wrong with it or does not fit is said."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smelter.base.errors import ConfigError, DataError
from smelter.config import Config
from smelter.distillation.cache import RowFormat, TeacherCache, open_caches
from smelter.distillation.cache_writer import CacheWriter
from smelter.distillation.sparse import Entries
from smelter.tokens.shards import ShardSet
from tests import tiny
from tests.distillation.teaching import SEQ_LEN, make_cache, make_shards, student_config


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("run") / "big", tiny.model())


@pytest.fixture(scope="module")
def made(teacher: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(teacher, shards, tmp_path_factory.mktemp("cache") / "c").path


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def test_rows_are_on_the_disk_before_they_count(tmp_path: Path, disk_events: list[str]) -> None:
    writer = CacheWriter(tmp_path / "c", {"arrangement": {"num_rows": 4}}, file_bytes=10)
    disk_events.clear()
    for _ in range(2):
        writer.append(b"6 byte")  # a file each
    writer.flush()
    writer.close()
    assert disk_events == ["c", "rows_00000.bin", "c", "rows_00001.bin", "row_bytes.bin"]


# ---------------------------------------------------------------- records


@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=9),
    vocab_size=st.sampled_from([300, 65_536, 65_537, 150_000]),
    max_entries=st.sampled_from([9, 255, 256, 65_536]),
    values=st.sampled_from([("sampled", "float16"), ("top_k", "float16"), ("top_k", "float32")]),
    seed=st.integers(0, 99),
)
def test_a_record_comes_back(counts: list[int], vocab_size: int, max_entries: int, values: Any, seed: int) -> None:
    rng, size = np.random.default_rng(seed), sum(counts)
    method, log_prob_dtype = values
    layout = RowFormat(len(counts), vocab_size, method, max_entries, log_prob_dtype)
    stored: Any = rng.integers(1, 256, size) if method == "sampled" else (-10 * rng.random(size)).astype(np.float16)
    entries = Entries(np.array(counts), rng.integers(0, vocab_size, size), stored)
    nats = rng.random(len(counts)).astype(np.float16)
    raw = np.frombuffer(layout.pack(entries, nats), np.uint8)
    read, entropy = layout.unpack(raw)
    for name in ("counts", "ids", "values"):
        assert (getattr(read, name) == getattr(entries, name)).all()
    assert (entropy == nats).all()
    with pytest.raises(ValueError, match=r"do not agree|too short"):
        layout.unpack(raw[:-1])


def test_bytes_of_50_draws_that_keep_12_ids() -> None:
    layout = RowFormat(2_048, 32_000, "sampled", 50)
    entries = Entries(np.full(2_048, 12), np.zeros(12 * 2_048, np.int64), np.ones(12 * 2_048, np.int64))
    assert len(layout.pack(entries, np.zeros(2_048))) == 39 * 2_048


@pytest.mark.parametrize(
    ("fullest", "width"), [(1, 1), (3, 4), (5, 6), (13, 16), (25, 32), (33, 48), (49, 50), (50, 50)]
)
def test_widths_are_few(fullest: int, width: int) -> None:
    assert RowFormat(8, 1_000, "sampled", 50).width(fullest) == width


def test_a_batch_is_as_wide_as_it_must_be(made: Path) -> None:
    cache = TeacherCache.open(made)
    for indices in ([0], [3, 1], list(range(11))):
        rows = cache.rows(indices)
        read = [cache.row(index)[0] for index in indices]
        assert rows.ids.shape == rows.probs.shape
        assert rows.ids.shape[1] == cache.format.width(max(int(entries.counts.max()) for entries in read))
        for number, entries in enumerate(read):
            of_row = slice(number * SEQ_LEN, (number + 1) * SEQ_LEN)
            ids, probs = rows.ids[of_row].numpy(), rows.probs[of_row].numpy()
            is_used = probs > 0
            assert (is_used.sum(-1) == entries.counts).all()
            assert (ids[is_used] == entries.ids).all()
            assert np.allclose(probs[is_used] * 50, entries.values)
            assert (ids[~is_used] == 0).all()
    assert rows.entropy is not None
    assert (rows.ids.dtype, rows.probs.dtype, rows.entropy.dtype) == (torch.int64, torch.float32, torch.float32)
    with pytest.raises(IndexError, match="row 11 of 11"):
        cache.row(11)


# ---------------------------------------------------------------- damage


def shorten(path: Path, by: int = 1) -> None:
    path.write_bytes(path.read_bytes()[:-by])


def change_byte(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 0xFF
    path.write_bytes(raw)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """As an older version wrote it: without a digest of its own."""
    values = json.loads(path.read_text())
    values.pop("sha256", None)
    change(values)
    path.write_text(json.dumps(values))


def replace_in(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: shorten(c / "rows_00000.bin"), r"rows_00000.bin: has [\d,]+ bytes instead of [\d,]+: copy it again"),
        (lambda c: (c / "rows_00000.bin").unlink(), "rows_00000.bin: is missing"),
        (lambda c: shorten(c / "row_bytes.bin"), "row_bytes.bin: not the lengths of 11 rows"),
        (lambda c: (c / "row_bytes.bin").unlink(), "row_bytes.bin: is missing"),
        (lambda c: change_byte(c / "row_bytes.bin", 0), "row_bytes.bin: not the lengths of 11 rows"),
        (lambda c: (c / "index.json").unlink(), "index.json: No such file.*smelter teach --out"),
        (lambda c: (c / "index.json").rename(c / "unfinished.json"), "not finished: run the same `smelter teach`"),
        (lambda c: shorten(c / "index.json", 9), "index.json: damaged"),
        (lambda c: (c / "index.json").write_text("[]"), "not what `smelter teach` writes"),
        (lambda c: edit(c / "index.json", lambda v: v.update(version=2)), "format version 2, this program reads 1"),
        (lambda c: replace_in(c / "index.json", '"mean_entropy": ', '"mean_entropy": 1'), "index.json: damaged"),
        (lambda c: edit(c / "index.json", lambda v: v.pop("files")), "an entry is missing or damaged"),
        (lambda c: edit(c / "index.json", lambda v: v["arrangement"].pop("seed")), "an entry is missing or damaged"),
    ],
)
def test_a_damaged_cache_is_named(copy: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(copy)
    with pytest.raises(DataError, match=message):
        TeacherCache.open(copy)


def test_changed_bytes_are_found_where_they_are_read_or_by_verify(copy: Path) -> None:
    change_byte(copy / "rows_00000.bin", 3)  # a count of row 0
    cache = TeacherCache.open(copy)
    with pytest.raises(DataError, match="row 0 is damaged"):
        cache.rows([1, 0])
    cache.rows([1, 2])
    with pytest.raises(DataError, match="contents have changed"):
        TeacherCache.open(copy, verify=True)


def test_an_id_outside_the_vocabulary_is_found(copy: Path) -> None:
    edit(copy / "index.json", lambda values: values.update(vocab_size=100))
    with pytest.raises(DataError, match=r"row 0 is damaged .an id outside the vocabulary"):
        TeacherCache.open(copy).rows([0])


# ---------------------------------------------------------------- what does not fit the run


def changed(config: Config, table: str, **values: Any) -> Config:
    return replace(config, **{table: replace(getattr(config, table), **values)})


@pytest.mark.parametrize(
    ("table", "values", "message"),
    [
        ("model", {"max_seq_len": 32}, "model.max_seq_len = 64, this run has 32: set it to 64, or .*--seq-len 32"),
        ("data", {"fim_rate": 0.25}, "data.fim_rate = 0.5, this run has 0.25: set it to 0.5, or .*--fim-rate 0.25"),
        ("data", {"instruct_share": 0.5}, "data.instruct_share = -1.0, this run has 0.5: .*--instruct-share 0.5"),
        ("data", {"fim_spm_rate": 1.0}, "data.fim_spm_rate = 0.5, this run has 1.0: .*--fim-spm-rate 1.0"),
        (
            "data",
            {"use_document_mask": True},
            "data.use_document_mask = False, this run has True: .*--use-document-mask",
        ),
        (
            "distillation",
            {"temperature": 2.0},
            "temperature = 2.0, but .* at 1.0: set it to that, or .*--temperature 2.0",
        ),
        ("model", {"vocab_size": 500}, "vocab_size = 500, but .* of 512 ids: set vocab_size = 512"),
    ],
)
def test_a_run_that_does_not_fit(made: Path, shards: Path, table: str, values: Any, message: str) -> None:
    config = changed(student_config(shards, cached=(made,)), table, **values)
    with pytest.raises(ConfigError, match=message):
        open_caches(config, ShardSet.open(shards))


def test_a_larger_vocabulary_and_another_rate_of_no_fim_do_fit(teacher: Path, made: Path, shards: Path) -> None:
    opened = ShardSet.open(shards)
    open_caches(changed(student_config(shards, cached=(made,)), "model", vocab_size=600), opened)
    plain = make_cache(teacher, shards, made.parent / "plain", fim_rate=0.0).path
    config = changed(student_config(shards, cached=(plain,)), "data", fim_rate=0.0, fim_spm_rate=0.9)
    assert len(open_caches(config, opened)) == 1


def test_other_shards_and_another_tokenizer(made: Path, tmp_path: Path) -> None:
    fewer = make_shards(tmp_path / "fewer", seed=3)
    config = student_config(fewer, cached=(made,))
    with pytest.raises(ConfigError, match=r"other shards than .*sha256 of the shards \(index.json\) is [0-9a-f]{12}"):
        open_caches(config, ShardSet.open(fewer))
    edit(made / "index.json", lambda values: None)
    other = Path(shutil.copytree(made, tmp_path / "other"))
    edit(other / "index.json", lambda values: values["arrangement"].update(tokenizer="f" * 64))
    with pytest.raises(ConfigError, match=r"sha256 of the tokenizer is ffffffffffff..., here"):
        open_caches(student_config(fewer, cached=(other,)), ShardSet.open(fewer))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 5}, r"has seed = 5, .* has 0: .*equal --seed"),
        ({"rows": 10}, r"has num_rows = 10, .* has 11: .*--rows"),
    ],
)
def test_caches_must_agree(
    teacher: Path, made: Path, shards: Path, tmp_path: Path, options: dict[str, int], message: str
) -> None:
    other = make_cache(teacher, shards, tmp_path / "other", **options).path
    with pytest.raises(ConfigError, match=message):
        open_caches(student_config(shards, cached=(made, other)), ShardSet.open(shards))
