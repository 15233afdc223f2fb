"""Records -> a tokenizer and packed shards (`smelter tokenize`), and reading them back.

A shard is a flat file of token ids, each document followed by eos; `index.json` says where documents
begin, how many bytes each had (for bits per byte) and where they came from. Rearranging for infilling
and packing happen when batches are made, so one set of shards serves every recipe.

Held-out documents are chosen by source, never by line: all of a file's text is on one side. The folder
is filled under a temporary name and renamed, so it is either whole or not there.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from numpy.typing import NDArray

from smelter import cli
from smelter.errors import DataError
from smelter.records import Document, Tally, expand, read_documents
from smelter.tokenizer import Tokenizer

FORMAT_VERSION = 1
SHARD_TOKENS = 100_000_000
BATCH_DOCUMENTS = 256


@dataclass(frozen=True)
class TokenizeOptions:
    """Turn records (JSONL) into a tokenizer and packed shards for training."""

    records: tyro.conf.Positional[tuple[Path, ...]]
    """JSONL files of records, or folders of them."""
    out: Path = Path("shards")
    """Folder for the shards; replaced if it holds shards already."""
    vocab_size: int = 32_000
    """Size of the tokenizer to train, special tokens included."""
    tokenizer: Path | None = None
    """Use this tokenizer.json instead of training one."""
    val_fraction: float = 0.05
    """Share of the sources held out, where records do not say their split themselves."""
    skip_invalid: bool = False
    """Pass over invalid lines and count them, instead of stopping at the first."""


@dataclass(frozen=True)
class Split:
    """The training or the held-out documents; token files are memory-mapped."""

    name: str
    eos_id: int
    offsets: NDArray[np.int64]
    """[num_docs + 1]: where each document begins in the stream of ids, eos included."""
    doc_num_bytes: NDArray[np.int64]
    sources: list[str]
    files: tuple[NDArray[Any], ...]
    file_starts: NDArray[np.int64]

    @property
    def num_docs(self) -> int:
        """Number of documents."""
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        """Ids in the stream, the eos after each document included."""
        return int(self.offsets[-1])

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all documents."""
        return int(self.doc_num_bytes.sum())

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Ids start..stop of the stream; they may lie in several files."""
        parts = []
        index = int(np.searchsorted(self.file_starts, start, side="right")) - 1
        while start < stop:
            first = int(self.file_starts[index])
            part = self.files[index][start - first : stop - first]
            parts.append(part)
            start += len(part)
            index += 1
        joined = parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.empty(0)
        return joined.astype(np.int64)

    def doc(self, index: int) -> NDArray[np.int64]:
        """Ids of one document, without its eos."""
        return self.read(int(self.offsets[index]), int(self.offsets[index + 1]) - 1)


@dataclass(frozen=True)
class ShardSet:
    """A folder that `smelter tokenize` wrote."""

    path: Path
    index: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> "ShardSet":
        """Open and check a folder of shards. Raises DataError naming the file and the fix."""
        file = path / "index.json"
        try:
            index = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(f"{file}: no shards here: make them with `smelter tokenize ... --out {path}`") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise DataError(f"{file}: damaged ({error}): run `smelter tokenize` again") from None
        if not isinstance(index, dict) or index.get("format_version") != FORMAT_VERSION:
            raise DataError(f"{file}: not format version {FORMAT_VERSION}: run `smelter tokenize` again")
        shards = cls(path, index)
        for split in index["splits"].values():
            for item in split["files"]:
                part, expected = path / item["name"], item["num_tokens"] * np.dtype(index["dtype"]).itemsize
                if not part.is_file():
                    raise DataError(f"{part}: missing: run `smelter tokenize` again")
                if part.stat().st_size != expected:
                    raise DataError(
                        f"{part}: {part.stat().st_size} bytes instead of {expected}: run `smelter tokenize` again"
                    )
        if shards.tokenizer.hash != index["tokenizer_hash"]:
            raise DataError(
                f"{path / 'tokenizer.json'}: not the tokenizer of these shards: run `smelter tokenize` again"
            )
        return shards

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer the shards were made with."""
        return Tokenizer.load(self.path / "tokenizer.json")

    def split(self, name: str) -> Split:
        """`train` or `val`."""
        entry = self.index["splits"][name]
        counts = [item["num_tokens"] for item in entry["files"]]
        files = tuple(
            np.memmap(self.path / item["name"], dtype=self.index["dtype"], mode="r") for item in entry["files"]
        )
        return Split(
            name=name,
            eos_id=self.tokenizer.eos_id,
            offsets=np.array(entry["offsets"], dtype=np.int64),
            doc_num_bytes=np.array(entry["num_bytes"], dtype=np.int64),
            sources=entry["sources"],
            files=files,
            file_starts=np.concatenate(([0], np.cumsum(counts)))[:-1].astype(np.int64),
        )


class _SplitWriter:
    """Appends documents to `<name>_00000.bin`, `<name>_00001.bin`, ... and keeps their index."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype[Any], eos_id: int) -> None:
        self.folder, self.name, self.dtype, self.eos_id = folder, name, dtype, eos_id
        self.offsets, self.num_bytes, self.sources = [0], list[int](), list[str]()
        self.files: list[dict[str, Any]] = []
        self._digest, self._count = hashlib.sha256(), 0
        self._open()

    def _open(self) -> None:
        self._path = self.folder / f"{self.name}_{len(self.files):05d}.bin"
        self._file = self._path.open("wb")
        self._digest, self._count = hashlib.sha256(), 0

    def add(self, document: Document, ids: list[int]) -> None:
        if self._count >= SHARD_TOKENS:
            self.close()
            self._open()
        raw = np.array([*ids, self.eos_id], dtype=self.dtype).tobytes()
        self._file.write(raw)
        self._digest.update(raw)
        self._count += len(ids) + 1
        self.offsets.append(self.offsets[-1] + len(ids) + 1)
        self.num_bytes.append(len(document.text.encode()))
        self.sources.append(document.source)

    def close(self) -> None:
        self._file.close()
        self.files.append({"name": self._path.name, "num_tokens": self._count, "sha256": self._digest.hexdigest()})

    def entry(self) -> dict[str, Any]:
        return {"files": self.files, "offsets": self.offsets, "num_bytes": self.num_bytes, "sources": self.sources}


def split_of(document: Document, val_fraction: float) -> str:
    """The record's own split, else by hash of its source (of its text where it has none)."""
    if document.split:
        return document.split
    digest = hashlib.sha256((document.source or document.text).encode()).digest()
    return "val" if int.from_bytes(digest[:8], "big") < val_fraction * 2**64 else "train"


def tokenize(options: TokenizeOptions) -> Path:
    """Do what `smelter tokenize` does; returns the folder. Raises DataError or ConfigError."""
    if not 0 <= options.val_fraction < 1:
        raise DataError(f"--val-fraction {options.val_fraction}: must lie in [0, 1)")
    if not options.records:
        raise DataError("no records given: name at least one JSONL file")
    files = expand(options.records)
    if options.out.exists() and not (options.out / "index.json").is_file() and any(options.out.iterdir()):
        raise DataError(f"{options.out}: not empty and not a folder of shards: choose another --out")
    tally = Tally()

    def documents(count: Tally) -> Iterator[Document]:
        seen: set[str] = set()
        for path in files:
            yield from read_documents(path, skip_invalid=options.skip_invalid, tally=count, seen=seen)

    if options.tokenizer is not None:
        tokenizer = Tokenizer.load(options.tokenizer)
        for notice in tokenizer.notices:
            print(notice)
    else:
        print(f"training a tokenizer of {options.vocab_size:,} on the training documents", flush=True)
        texts = (doc.text for doc in documents(Tally()) if split_of(doc, options.val_fraction) == "train")
        tokenizer = Tokenizer.train(texts, options.vocab_size)
    temporary = options.out.with_name(f".tmp_{options.out.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write(temporary, tokenizer, documents(tally), options, tally)
        if options.out.exists():
            shutil.rmtree(options.out)
        temporary.rename(options.out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return options.out


def _write(
    folder: Path, tokenizer: Tokenizer, documents: Iterator[Document], options: TokenizeOptions, tally: Tally
) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    writers = {name: _SplitWriter(folder, name, dtype, tokenizer.eos_id) for name in ("train", "val")}
    batch: list[Document] = []

    def flush() -> None:
        for document, ids in zip(batch, tokenizer.encode_batch([doc.text for doc in batch]), strict=True):
            writers[split_of(document, options.val_fraction)].add(document, ids)
        if sys.stderr.isatty():
            print(f"\r{tally.documents:,} documents", end="", file=sys.stderr, flush=True)
        batch.clear()

    for document in documents:
        batch.append(document)
        if len(batch) == BATCH_DOCUMENTS:
            flush()
    flush()
    if sys.stderr.isatty():
        print(file=sys.stderr)
    for writer in writers.values():
        writer.close()
        if not writer.num_bytes and not (writer.name == "val" and options.val_fraction == 0):
            raise DataError(
                f"no {writer.name} documents among {tally.documents}: give more sources, or change --val-fraction"
            )
    tokenizer.save(folder / "tokenizer.json")
    index = {
        "format_version": FORMAT_VERSION,
        "tokenizer_hash": tokenizer.hash,
        "dtype": dtype.name,
        "splits": {name: writer.entry() for name, writer in writers.items()},
    }
    (folder / "index.json").write_text(json.dumps(index) + "\n", encoding="utf-8")
    for name, writer in writers.items():
        num_bytes, num_tokens = sum(writer.num_bytes), writer.offsets[-1]
        print(
            f"{name:5} {len(writer.num_bytes):>8,} documents {num_bytes:>13,} bytes {num_tokens:>12,} tokens"
            + (f" ({num_bytes / num_tokens:.2f} bytes a token)" if num_tokens else "")
        )
    if tally.skipped:
        print("skipped: " + ", ".join(f"{count:,} x {kind}" for kind, count in tally.skipped.most_common()))


def main(argv: list[str]) -> int:
    """`smelter tokenize`."""
    options = cli.parse(TokenizeOptions, argv, "smelter tokenize")
    print(f"wrote {tokenize(options)}")
    return 0
