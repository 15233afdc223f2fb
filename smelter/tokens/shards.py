"""Shards: every document once, as token ids in flat files that are mapped into memory.

A folder holds `{train,val}_00000.bin` (little-endian uint16, or uint32 for more than 65,536 tokens; each document
followed by eos), a table of documents per split, the tokenizer, and `index.json` that names all of it. Arrangement
for fill-in-the-middle and packing happen when batches are made (`smelter.data`), so one set of shards serves every
rate and every context length. A conversation (`tokens.chat`) is a document whose leading tokens, the prompt, are no
targets. `smelter.tokens.tokenize` writes shards; this file reads them and checks what it reads.
"""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smelter.base import DataError, file_sha256, is_intact
from smelter.tokens.tokenizer import Tokenizer

FORMAT = "smelter-shards"
VERSION = 2
SPLITS = ("train", "val")
DOCUMENT_TABLE = np.dtype(
    [
        ("num_tokens", "<i8"),
        ("num_bytes", "<i8"),
        ("source", "<i8"),
        ("weight", "<f4"),
        ("sha256", "u1", (32,)),
        ("num_prompt", "<i8"),
        ("language", "<i4"),
    ]
)
"""A row per document: tokens with eos, bytes of text, index into the sources, loss weight, hash of the text, and how
many leading tokens are a conversation's prompt (0: a plain document), index into the split's languages. Bytes of a
conversation are its answer's, the hash is of prompt, line break and answer."""

AGAIN = "run `smelter tokenize` again"


class Split:
    """The documents of one side, mapped into memory. From `ShardSet.split`."""

    def __init__(self, folder: Path, name: str, index: dict[str, Any], tokenizer: Tokenizer) -> None:
        """Check the files that the index names for this split. Raises DataError that names the file."""
        entry, dtype = index["splits"][name], index["dtype"]
        self.name = name
        self.eos_id = tokenizer.eos_id
        self._folder = folder
        self._entry = entry
        self._files: list[NDArray[Any]] = []
        for file in entry["files"]:
            path = folder / file["name"]
            size = path.stat().st_size if path.is_file() else -1
            expected = file["tokens"] * np.dtype(dtype).itemsize
            if size != expected:
                state = "is missing" if size < 0 else f"has {size:,} bytes instead of {expected:,}"
                raise DataError(f"{path}: {state}: {AGAIN}")
            self._files.append(np.memmap(path, dtype=dtype, mode="r"))
        path = folder / entry["documents"]["name"]
        try:
            self._table: NDArray[Any] = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{path}: not readable: {error}: {AGAIN}") from None
        if self._table.dtype != DOCUMENT_TABLE or self._table.shape != (entry["num_docs"],):
            raise DataError(f"{path}: not the table of {entry['num_docs']:,} documents: {AGAIN}")
        self.num_docs: int = entry["num_docs"]
        self.num_tokens: int = entry["num_tokens"]
        """Tokens in all, with one eos per document."""
        self.num_bytes: int = entry["num_bytes"]
        """Bytes of text in all."""
        self.doc_num_bytes: NDArray[np.int64] = np.ascontiguousarray(self._table["num_bytes"], dtype=np.int64)
        """[num_docs]: bytes of every document's text; of a conversation, of its answer."""
        num_prompt = np.ascontiguousarray(self._table["num_prompt"], dtype=np.int64)
        self.num_prompt: NDArray[np.int64] | None = num_prompt if bool(num_prompt.any()) else None
        """[num_docs]: leading tokens of each document that are a conversation's prompt; None if there are none."""
        self.offsets: NDArray[np.int64] = np.cumsum(np.concatenate(([0], self._table["num_tokens"])), dtype=np.int64)
        """[num_docs + 1]: where each document begins among the split's tokens."""
        self._file_starts = np.cumsum([0, *(file["tokens"] for file in entry["files"])])
        if self.num_docs == 0 or not int(self.offsets[-1]) == int(self._file_starts[-1]) == self.num_tokens:
            raise DataError(f"{path}: does not add up with the .bin files: {AGAIN}")

    def doc_with_eos(self, index: int) -> NDArray[Any]:
        """Ids of a document and eos: a read-only view of the file (a document lies in one file)."""
        if not 0 <= index < self.num_docs:
            raise IndexError(f"document {index} of {self.num_docs}")
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
        number = int(np.searchsorted(self._file_starts, start, side="right")) - 1
        first = int(self._file_starts[number])
        return self._files[number][start - first : end - first]

    def doc(self, index: int) -> NDArray[Any]:
        """Ids of a document without its eos: a read-only view of the file."""
        return self.doc_with_eos(index)[:-1]

    def is_chat(self, index: int) -> bool:
        """Whether a document is a conversation."""
        return self.num_prompt is not None and bool(self.num_prompt[index])

    @cached_property
    def written(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """[num_docs] first and end: which tokens of each `doc` stand for `doc_num_bytes`.

        All of a plain document; of a conversation the answer, without the token that ends it.
        """
        ends = np.diff(self.offsets) - 1
        if self.num_prompt is None:
            return np.zeros_like(ends), ends
        return self.num_prompt, ends - (self.num_prompt > 0)

    @cached_property
    def weights(self) -> NDArray[np.float32] | None:
        """[num_docs]: loss weight of every document, None if all are 1."""
        weights = np.ascontiguousarray(self._table["weight"], dtype=np.float32)
        return None if bool((weights == 1).all()) else weights

    @cached_property
    def sources(self) -> list[str]:
        """Where every document comes from, [num_docs]."""
        path = self._folder / self._entry["sources"]["name"]
        try:
            names = json.loads(path.read_text(encoding="utf-8"))
            return [names[i] for i in self._table["source"]]
        except (OSError, ValueError, IndexError) as error:
            raise DataError(f"{path}: not readable: {error}: {AGAIN}") from None

    @cached_property
    def languages(self) -> list[str]:
        """Language of every document, [num_docs]; "" where its record named none."""
        names = self._entry["languages"]
        return [names[i] for i in self._table["language"]]

    def doc_hash(self, index: int) -> str:
        """sha256 of a document's text, hexadecimal."""
        return bytes(self._table["sha256"][index]).hex()


class ShardSet:
    """What `smelter tokenize` wrote, read back: a tokenizer and the splits."""

    def __init__(self, path: Path, index: dict[str, Any], tokenizer: Tokenizer) -> None:
        self.path = path
        self.index = index
        self.tokenizer = tokenizer
        self._splits: dict[str, Split] = {}

    @classmethod
    def open(cls, path: Path | str, *, verify: bool = False) -> "ShardSet":
        """Check version, tokenizer and sizes, with `verify` also every file's sha256 (reads all of it).

        Raises DataError that names the file and the fix.
        """
        path = Path(path)
        file = path / "index.json"
        index = read_index(file, FORMAT, VERSION, "smelter tokenize ...", AGAIN)
        try:
            tokenizer = Tokenizer.load(path / index["tokenizer"]["name"])
            if tokenizer.hash != index["tokenizer"]["hash"]:
                where = path / index["tokenizer"]["name"]
                raise DataError(f"{where}: not the tokenizer of these shards: {AGAIN}")
            shards = cls(path, index, tokenizer)
            for name in SPLITS:
                shards.split(name)
            entries = file_entries(index) if verify else []
        except (KeyError, TypeError) as error:
            raise DataError(f"{file}: an entry is missing or damaged ({error}): {AGAIN}") from None
        for entry in entries:
            if file_sha256(path / entry["name"]) != entry["sha256"]:
                raise DataError(f"{path / entry['name']}: contents have changed: {AGAIN}")
        return shards

    @cached_property
    def hash(self) -> str:
        """sha256 of the index, which holds that of every other file."""
        return file_sha256(self.path / "index.json")

    def split(self, name: str) -> Split:
        """The documents of "train" or "val"."""
        if name not in self._splits:
            self._splits[name] = Split(self.path, name, self.index, self.tokenizer)
        return self._splits[name]


def read_index(file: Path, kind: str, version: int, command: str, fix: str) -> dict[str, Any]:
    """The index of a folder that `command` writes, of this format and version. DataError for none, or another."""
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}: `{command} --out {file.parent}` makes it") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: damaged: {error}: {fix}") from None
    if not isinstance(index, dict) or index.get("format") != kind:
        raise DataError(f"{file}: not what `{command}` writes: {fix}")
    if index.get("version") != version:
        raise DataError(f"{file}: format version {index.get('version')}, this program reads {version}: {fix}")
    if not is_intact(index):
        raise DataError(f"{file}: damaged: its SHA-256 is not the one that it names: {fix}")
    return index


def file_entries(index: dict[str, Any]) -> list[dict[str, Any]]:
    """Every file that an index names, each with "name" and "sha256"."""
    entries = [index["tokenizer"]]
    for split in index["splits"].values():
        entries += [*split["files"], split["documents"], split["sources"]]
    return entries


def open_shards(path: Path, tokenizer: Tokenizer) -> ShardSet:
    """Shards made with this very tokenizer. Raises DataError that names the folder and the fix."""
    shards = ShardSet.open(path)
    if shards.tokenizer.hash != tokenizer.hash:
        raise DataError(f"{path}: made with another tokenizer than the model's: give the shards it was trained on")
    return shards
