"""A teacher's distributions on the disk, row by row, as training reads them. `smelter teach` writes them.

A cache belongs to an *arrangement* of the shards: the rows of `smelter.data.BatchStream`, which (shards, tokenizer,
seq_len, fill-in-the-middle rates, seed) decide, read with or without the document mask. Row g of the cache is row g
of that stream, so what the teacher said is said of the same tokens in the same places, fill-in-the-middle included.
The folder:

    index.json        what it was made from and how; the files with their sizes and sha256
    row_bytes.bin     [num_rows] uint32: the length of every row's record
    rows_00000.bin    the records of the first rows, one after the other; rows_00001.bin the next ...

A record, all little-endian, T = seq_len tokens with S entries together:

    count    [T] uint8 (uint16, uint32 where more than 255, 65,535 entries a token are possible)
    entropy  [T] float16: of the whole distribution at the temperature, in nats
    ids      [S] uint16 (uint32 for more than 65,536 ids)
    values   [S] sampled: uint8, how many of the draws fell on the id; top_k: float16 or float32 log-probability

A token without a target (padding) has 0 entries and entropy 0. The files are mapped into memory: a batch reads its
rows and nothing else. Trade-off: a cache is as large as the epochs it covers (about 36 bytes a token with 50 draws),
and another arrangement needs another cache.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from smelter.base import ConfigError, DataError, file_sha256
from smelter.config import Config
from smelter.distillation.sparse import Entries
from smelter.losses import SparseTeacher
from smelter.tokens import ShardSet, read_index

FORMAT = "smelter-teacher"
VERSION = 1
INDEX, UNFINISHED, LENGTHS = "index.json", "unfinished.json", "row_bytes.bin"
LENGTH_DTYPE = np.dtype("<u4")

Method = Literal["sampled", "top_k"]

AGAIN = "run the same `smelter teach` command with another --out"
WIDTHS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Entries a token to which a batch is padded: few sizes, so that compiled code is seldom compiled anew."""


@dataclass(frozen=True)
class Arrangement:
    """What decides the rows that a teacher saw."""

    shards: str
    """sha256 of the shards' index.json."""
    tokenizer: str
    """The tokenizer's hash."""
    seq_len: int
    fim_rate: float
    fim_spm_rate: float
    use_document_mask: bool
    seed: int
    """Seed of the stream."""
    num_rows: int
    """Rows from the beginning of the stream."""
    instruct_share: float = -1.0
    """Share of the rows that are conversations; negative: as they come."""
    fim_split_rate: float = 0.0
    fim_cursor_rate: float = 0.0
    fim_piece_tokens: int = 0
    fim_peek_tokens: int = 0
    fim_cut_rate: float = 0.0


FIM_KEYS = ("fim_spm_rate", "fim_split_rate", "fim_cursor_rate")
PIECE_KEYS = ("fim_piece_tokens", "fim_peek_tokens", "fim_cut_rate")
DATA_KEYS = ("fim_rate", *FIM_KEYS, *PIECE_KEYS, "use_document_mask", "instruct_share")
"""Those that are keys of [data], too; `FIM_KEYS` mean nothing where nothing is rearranged."""


@dataclass(frozen=True)
class RowFormat:
    """How a row's record is laid out."""

    seq_len: int
    vocab_size: int
    method: Method
    max_entries: int
    """Most entries that a token can have: the draws, or k."""
    log_prob_dtype: Literal["float16", "float32"] = "float16"

    @property
    def dtypes(self) -> tuple[np.dtype[Any], np.dtype[Any], np.dtype[Any]]:
        """Of count, ids and values."""
        count = np.min_scalar_type(self.max_entries).newbyteorder("<")
        ids = np.dtype("<u2" if self.vocab_size <= 65_536 else "<u4")
        value = np.dtype(
            "u1" if self.method == "sampled" else {"float16": "<f2", "float32": "<f4"}[self.log_prob_dtype]
        )
        return count, ids, value

    def pack(self, entries: Entries, entropy: NDArray[Any]) -> bytes:
        """The record of a row: `entries` of its T tokens, entropy [T]."""
        count, ids, value = self.dtypes
        parts = ((entries.counts, count), (entropy, "<f2"), (entries.ids, ids), (entries.values, value))
        return b"".join(np.asarray(array).astype(dtype).tobytes() for array, dtype in parts)

    def unpack(self, raw: NDArray[np.uint8]) -> tuple[Entries, NDArray[np.float16]]:
        """`pack` undone. ValueError for bytes that are no such record."""
        count, ids, value = self.dtypes
        first = self.seq_len * count.itemsize
        second = first + 2 * self.seq_len
        if len(raw) < second:
            raise ValueError("too short")
        counts = raw[:first].view(count)
        size = int(counts.sum(dtype=np.int64))
        third = second + size * ids.itemsize
        if len(raw) != third + size * value.itemsize or (size and int(counts.max()) > self.max_entries):
            raise ValueError("counts and length do not agree")
        entries = Entries(counts, raw[second:third].view(ids), raw[third:].view(value))
        if size and int(entries.ids.max()) >= self.vocab_size:
            raise ValueError("an id outside the vocabulary")
        return entries, raw[first:second].view("<f2")

    def width(self, num_entries: int) -> int:
        """The padded number of entries for a batch whose fullest token has `num_entries`."""
        return min(next((width for width in WIDTHS if width >= num_entries), num_entries), self.max_entries)


class TeacherCache:
    """A finished cache, open for reading. From `TeacherCache.open`."""

    def __init__(self, path: Path, index: dict[str, Any]) -> None:
        self.path = path
        self.index = index
        self.arrangement = Arrangement(**index["arrangement"])
        self.method: Method = index["method"]
        self.temperature: float = index["temperature"]
        self.vocab_size: int = index["vocab_size"]
        self.format = row_format(index)
        lengths = np.fromfile(path / LENGTHS, dtype=LENGTH_DTYPE).astype(np.int64)
        firsts = np.cumsum([0, *(file["rows"] for file in index["files"])])
        self._firsts: list[int] = firsts.tolist()
        self._ends = np.concatenate([np.cumsum(part) for part in np.split(lengths, firsts[1:-1])])
        sizes = [file["bytes"] for file in index["files"]]
        if not len(lengths) == self.num_rows == firsts[-1] or self._ends[firsts[1:] - 1].tolist() != sizes:
            raise DataError(f"{path / LENGTHS}: not the lengths of {self.num_rows:,} rows: {AGAIN}")
        self._begins = self._ends - lengths
        self._files = [np.memmap(path / file["name"], dtype=np.uint8, mode="r") for file in index["files"]]

    @classmethod
    def open(cls, path: Path | str, *, verify: bool = False) -> "TeacherCache":
        """Check version and sizes, with `verify` also every file's sha256 (reads all of it).

        Raises DataError that names the file and the fix.
        """
        path = Path(path)
        index = finished_index(path, FORMAT, "smelter teach")
        try:
            check_files(path, [*index["files"], index["row_bytes"]], verify)
            return cls(path, index)
        except OSError as error:
            raise DataError(f"{error.filename}: {error.strerror}: copy it again, or {AGAIN}") from None
        except (KeyError, TypeError, IndexError) as error:
            raise DataError(f"{path / INDEX}: an entry is missing or damaged ({error}): {AGAIN}") from None

    @property
    def num_rows(self) -> int:
        """Rows that the teacher has read."""
        return self.arrangement.num_rows

    def row(self, index: int) -> tuple[Entries, NDArray[np.float16]]:
        """Entries of the T tokens of a row, and entropy [T]: views of the file. DataError for a damaged record."""
        if not 0 <= index < self.num_rows:
            raise IndexError(f"row {index} of {self.num_rows}")
        number = bisect_right(self._firsts, index) - 1
        try:
            return self.format.unpack(self._files[number][self._begins[index] : self._ends[index]])
        except ValueError as error:
            file = self.path / self.index["files"][number]["name"]
            raise DataError(f"{file}: row {index} is damaged ({error}): copy it again, or {AGAIN}") from None

    def rows(self, indices: Sequence[int]) -> SparseTeacher:
        """What the teacher says about the tokens of these rows, one row after the other.

        K entries a token, K as the fullest of them needs, rounded up.
        """
        rows = [self.row(index) for index in indices]
        counts = np.concatenate([entries.counts for entries, _ in rows]).astype(np.int64)
        shape = len(counts), self.format.width(max(int(counts.max()), 1))
        ids, probs = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.float32)
        # Where each entry goes: the token's place, then one after the other.
        begins = np.cumsum(counts) - counts
        places = np.arange(counts.sum()) + np.repeat(np.arange(shape[0]) * shape[1] - begins, counts)
        ids.reshape(-1)[places] = np.concatenate([entries.ids for entries, _ in rows])
        probs.reshape(-1)[places] = self._probs(np.concatenate([entries.values for entries, _ in rows]))
        if self.method == "top_k":
            total = probs.sum(-1, keepdims=True)
            # Rounded logarithms may add up to more than 1; and where every id is there, nothing is left over.
            is_whole = self.format.max_entries == self.vocab_size
            probs /= np.where(total > (0.0 if is_whole else 1.0), total, 1.0)
        entropy = np.concatenate([entropy for _, entropy in rows]).astype(np.float32)
        parts = torch.from_numpy(ids), torch.from_numpy(probs), self.method, torch.from_numpy(entropy)
        return SparseTeacher(*parts, temperature=self.temperature)

    def _probs(self, stored: NDArray[Any]) -> NDArray[np.float32]:
        """Probabilities of what an entry holds: counted draws, or a log-probability."""
        if self.method == "sampled":
            return stored * np.float32(1 / self.format.max_entries)
        probs: NDArray[np.float32] = np.exp(stored.astype(np.float32))
        return probs


def finished_index(path: Path, kind: str, command: str) -> dict[str, Any]:
    """index.json of a finished folder of a kind, which `command` writes. Raises DataError for none or another."""
    if not (path / INDEX).is_file() and (path / UNFINISHED).is_file():
        raise DataError(f"{path}: not finished: run the same `smelter teach` command again, which goes on")
    return read_index(path / INDEX, kind, VERSION, command, AGAIN)


def check_files(path: Path, entries: Sequence[dict[str, Any]], verify: bool) -> None:
    """DataError for a file that is not as its index entry says: its size, and with `verify` its sha256."""
    for entry in entries:
        file = path / entry["name"]
        size = file.stat().st_size if file.is_file() else -1
        if size < 0 or size != entry.get("bytes", size):
            state = "is missing" if size < 0 else f"has {size:,} bytes instead of {entry['bytes']:,}"
            raise DataError(f"{file}: {state}: copy it again, or {AGAIN}")
        if verify and file_sha256(file) != entry["sha256"]:
            raise DataError(f"{file}: contents have changed: copy it again, or {AGAIN}")


def row_format(index: dict[str, Any]) -> RowFormat:
    """The layout of the records that an index describes."""
    return RowFormat(
        seq_len=index["arrangement"]["seq_len"],
        vocab_size=index["vocab_size"],
        method=index["method"],
        max_entries=index["draws"] if index["method"] == "sampled" else index["top_k"],
        log_prob_dtype=index["log_prob_dtype"],
    )


def open_caches(config: Config, shards: ShardSet) -> list[TeacherCache]:
    """The caches that `distillation.cached` names, checked against the run and against each other.

    Raises DataError for one that cannot be read, and ConfigError that names what differs, both values and the fix.
    """
    caches = [TeacherCache.open(path) for path in config.distillation.cached]
    for cache in caches:
        _check(cache, config, shards, caches[0])
    return caches


def _check(cache: TeacherCache, config: Config, shards: ShardSet, first: TeacherCache) -> None:
    stored, data = cache.arrangement, config.data
    values = {key: getattr(data, key) for key in DATA_KEYS}
    if not (data.fim_rate and stored.fim_rate):
        values |= {key: getattr(stored, key) for key in FIM_KEYS}
    needed = Arrangement(
        shards=shards.hash,
        tokenizer=shards.tokenizer.hash,
        seq_len=config.model.max_seq_len,
        seed=first.arrangement.seed,
        num_rows=first.num_rows,
        **values,
    )
    keys = {"seq_len": "model.max_seq_len"} | {key: f"data.{key}" for key in DATA_KEYS}
    # The tokenizer first: with another one the shards differ as well, and it says more.
    for key in ("tokenizer", *(item.name for item in fields(Arrangement) if item.name != "tokenizer")):
        was, now = getattr(stored, key), getattr(needed, key)
        if was == now:
            continue
        where = f"distillation.cached: {cache.path} "
        if key in keys:
            raise ConfigError(
                f"{where}was made with {keys[key]} = {was}, this run has {now}: set it to {was}, or run "
                f"`smelter teach` with --{key.replace('_', '-')} {now}"
            )
        if key in ("seed", "num_rows"):
            raise ConfigError(
                f"{where}has {key} = {was:,}, {first.path} has {now:,}: caches used together need equal "
                f"{'--seed' if key == 'seed' else '--epochs or --rows'}: run `smelter teach` again for one"
            )
        name = "the tokenizer" if key == "tokenizer" else "the shards (index.json)"
        raise ConfigError(
            f"{where}belongs to other shards than {shards.path}: sha256 of {name} is {was[:12]}..., here "
            f"{now[:12]}...: set data.shards to those, or run `smelter teach --shards {shards.path}`"
        )
    if cache.temperature != config.distillation.temperature:
        raise ConfigError(
            f"distillation.temperature = {config.distillation.temperature}, but {cache.path} holds probabilities at "
            f"{cache.temperature}: set it to that, or run `smelter teach` with --temperature "
            f"{config.distillation.temperature}"
        )
    if cache.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size = {config.model.vocab_size}, but {cache.path} holds probabilities of "
            f"{cache.vocab_size} ids: set vocab_size = {cache.vocab_size}, or run `smelter teach` with the recipe of "
            "this run (--recipe)"
        )
