"""JSONL records -> tokenizer and shards: the `smelter tokenize` command.

The tokenizer sees the train side of the split only (`smelter.tokens.sides`).
A record of kind "instruct" makes a conversation of each response (`smelter.tokens.chat`).

The records are read two or three times (check, train the tokenizer, encode) instead of being held, so memory does
not grow with their size. Everything is written under a temporary name and renamed at the end; equal inputs give
equal bytes.
"""

import hashlib
import json
import time
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Annotated, Any

import numpy as np
import tyro
from annotated_types import Ge, Interval

from smelter.base import (
    ConfigError,
    DataError,
    Progress,
    file_sha256,
    megabytes,
    only_writer,
    parse,
    sealed,
    whole_folder,
    write_json,
)
from smelter.tokens.chat import ChatFormat, head
from smelter.tokens.documents import Document, Records, parse_teacher_weights
from smelter.tokens.roles import SpecialTokens
from smelter.tokens.shards import DOCUMENT_TABLE, FORMAT, SPLITS, VERSION, file_entries
from smelter.tokens.sides import Survey, survey
from smelter.tokens.tokenizer import Tokenizer

DEFAULT_VOCAB_SIZE = 32_000

CHUNK_CHARACTERS = 2**20
"""Longer documents are encoded in parts: encoding holds some 100 bytes per token."""
BATCH_CHARACTERS = 2**22
BATCH_DOCUMENTS = 1_024


@dataclass(frozen=True)
class TokenizeOptions:
    """JSONL records -> a tokenizer (trained here unless given) and shards of token ids for training."""

    records: tyro.conf.Positional[tuple[Path, ...]]
    """JSONL files, or folders whose *.jsonl files are all read."""
    out: Path = Path("shards")
    """Folder to write; existing shards are replaced when the new ones are complete."""
    vocab_size: int | None = None
    """Tokens to train, special tokens included (default 32,000)."""
    tokenizer: Path | None = None
    """Use this tokenizer.json (ours, or a byte-level or SentencePiece-BPE one) instead of training one."""
    val_fraction: Annotated[float, Interval(gt=0, lt=1)] = 0.05
    """Share of sources held out, among the records that do not say where they belong."""
    skip_invalid: bool = False
    """Pass over lines that cannot be used, and count them by reason, instead of stopping at the first."""
    max_line_mb: Annotated[int, Ge(1)] = 64
    """Longest line to accept."""
    shard_tokens: Annotated[int, Ge(1)] = 100_000_000
    """Tokens per .bin file."""
    tokenizer_mb: Annotated[int, Ge(1)] = 1_024
    """Text to train the tokenizer on; of more, an even share of the documents is taken."""
    fim_prefix_token: str = "<|fim_prefix|>"
    """Token before the prefix of a fill-in-the-middle example."""
    fim_middle_token: str = "<|fim_middle|>"
    """Token before the middle."""
    fim_suffix_token: str = "<|fim_suffix|>"
    """Token before the suffix."""
    teacher_weight: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=WEIGHT: multiply the weight of this teacher's responses (repeatable; 0 leaves them out)."""

    def __post_init__(self) -> None:
        if self.tokenizer is not None and self.vocab_size is not None:
            raise ConfigError("--vocab-size trains a tokenizer, --tokenizer brings one: give only one of the two")
        parse_teacher_weights(self.teacher_weight)

    @property
    def special(self) -> SpecialTokens:
        """The names of the special tokens."""
        return SpecialTokens(
            fim_prefix=self.fim_prefix_token, fim_middle=self.fim_middle_token, fim_suffix=self.fim_suffix_token
        )


class _SplitWriter:
    """Appends documents to a split's files."""

    def __init__(self, folder: Path, name: str, dtype: str, shard_tokens: int) -> None:
        self.folder, self.name, self.dtype, self.shard_tokens = folder, name, dtype, shard_tokens
        self.num_tokens = self.num_bytes = self.num_content_bytes = self.num_chats = 0
        self._files: list[dict[str, Any]] = []
        self._file: IO[bytes] | None = None
        self._lengths, self._bytes, self._sources = array("q"), array("q"), array("q")
        self._weights, self._prompts, self._hashes = array("f"), array("q"), bytearray()
        self._source_index: dict[str, int] = {}
        self._languages, self._language_index = array("l"), dict[str, int]()
        self._licenses: Counter[str] = Counter()
        self._teachers: Counter[str] = Counter()

    def add(self, document: Document, ids: list[int], num_prompt: int) -> None:
        """Write one document's ids, eos included, of which the first `num_prompt` are a conversation's prompt."""
        if self._file is None or self._files[-1]["tokens"] + len(ids) > self.shard_tokens:
            self.close()
            name = f"{self.name}_{len(self._files):05d}.bin"
            self._files.append({"name": name, "tokens": 0})
            self._file = (self.folder / name).open("wb")
        self._file.write(np.array(ids, dtype=self.dtype).tobytes())
        self._files[-1]["tokens"] += len(ids)
        raw, num_bytes = document.content.encode(), len(document.text.encode())
        self.num_tokens += len(ids)
        self.num_bytes += num_bytes
        self.num_content_bytes += len(raw)
        self.num_chats += num_prompt > 0
        self._lengths.append(len(ids))
        self._bytes.append(num_bytes)
        self._prompts.append(num_prompt)
        self._sources.append(self._source_index.setdefault(document.source, len(self._source_index)))
        self._languages.append(self._language_index.setdefault(document.language, len(self._language_index)))
        self._weights.append(document.weight)
        self._hashes += hashlib.sha256(raw).digest()
        self._licenses[document.license] += len(raw)
        if document.teacher:
            self._teachers[document.teacher] += len(raw)

    def close(self) -> None:
        """End the file that is being written, if any."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def finish(self) -> dict[str, Any]:
        """Write the table of documents; returns the split's entry of the index."""
        self.close()
        table = np.zeros(len(self._lengths), dtype=DOCUMENT_TABLE)
        columns = {"num_tokens": self._lengths, "num_bytes": self._bytes, "source": self._sources}
        columns |= {"num_prompt": self._prompts, "language": self._languages}
        for key, values in {**columns, "weight": self._weights}.items():
            table[key] = values
        table["sha256"] = np.frombuffer(self._hashes, dtype=np.uint8).reshape(-1, 32)
        documents, sources = f"{self.name}_documents.npy", f"{self.name}_sources.json"
        np.save(self.folder / documents, table)
        write_json(self.folder / sources, list(self._source_index), indent=1)
        for file in self._files:
            file["sha256"] = file_sha256(self.folder / file["name"])
        return {
            "num_docs": len(table),
            "num_tokens": self.num_tokens,
            "num_bytes": self.num_bytes,
            # Bytes of text by licence ("" where a record names none) and, of teachers' answers, by teacher.
            "licenses": dict(sorted(self._licenses.items())),
            "teachers": dict(sorted(self._teachers.items())),
            "languages": list(self._language_index),
            "files": self._files,
            "documents": {"name": documents, "sha256": file_sha256(self.folder / documents)},
            "sources": {"name": sources, "sha256": file_sha256(self.folder / sources)},
        }


def training_texts(records: Records, overview: Survey, max_bytes: int) -> Iterator[str]:
    """Texts of the train side, about `max_bytes` of them: chosen by their hash, so from everywhere alike."""
    share = max_bytes / max(overview.num_bytes["train"], 1)
    progress = Progress("reading for the tokenizer", "MB", sum(overview.num_bytes.values()))
    for document in records:
        raw = document.content.encode()
        progress.add(len(raw))
        chosen = share >= 1 or int.from_bytes(hashlib.sha256(raw).digest()[:8], "big") < share * 2**64
        if chosen and overview.sides.of(document) == "train":
            yield document.content


def chunks(text: str, length: int = CHUNK_CHARACTERS) -> Iterator[str]:
    """`text` in parts of about `length` characters, cut after line breaks that are followed by no white space.

    No token spans such a place under the pattern we train with, so encoding part by part changes no id. A text
    without such places stays whole.
    """
    start = 0
    while len(text) - start > length:
        cut = start + length
        while (cut := text.find("\n", cut) + 1) and cut < len(text) and text[cut].isspace():
            pass
        if not 0 < cut < len(text):
            break
        yield text[start:cut]
        start = cut
    yield text[start:]


def encode_documents(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[tuple[Document, list[int], int]]:
    """Each document, its ids with eos, and how many are the prompt; encoded on all cores a batch at a time."""
    chat = None if tokenizer.im_end_id is None else ChatFormat(tokenizer)
    batch: list[Document] = []
    size = 0

    def encoded() -> Iterator[tuple[Document, list[int], int]]:
        questions = [list(chunks(head("user") + document.prompt)) if document.prompt else [] for document in batch]
        texts = [list(chunks(document.text)) for document in batch]
        parts = [part for groups in zip(questions, texts, strict=True) for group in groups for part in group]
        ids = iter(tokenizer.encode_batch(parts))
        for document, question, text in zip(batch, questions, texts, strict=True):
            first, second = ([index for _ in group for index in next(ids)] for group in (question, text))
            if document.prompt:
                assert chat is not None, "`_tokenizer` sees to it"
                yield document, *chat.document(first, second)
            else:
                yield document, [*second, tokenizer.eos_id], 0

    for document in documents:
        batch.append(document)
        size += len(document.content)
        if size >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield from encoded()
            batch, size = [], 0
    yield from encoded()


def tokenize(options: TokenizeOptions) -> Path:
    """Do what `smelter tokenize` does and say what was done; returns the folder. Raises DataError and ConfigError."""
    with only_writer(options.out, "--out", beside=True):
        return _tokenize(options)


def _tokenize(options: TokenizeOptions) -> Path:
    start = time.monotonic()
    _check_target(options.out)
    records = Records(
        options.records,
        skip_invalid=options.skip_invalid,
        max_line_bytes=options.max_line_mb * 2**20,
        teacher_weights=parse_teacher_weights(options.teacher_weight),
    )
    overview = survey(records, options.val_fraction)
    files = records.files
    _report_reading(records, overview)
    tokenizer = _tokenizer(options, records, overview)
    dtype = "<u2" if tokenizer.vocab_size <= 65_536 else "<u4"
    with whole_folder(options.out) as partial, ExitStack() as files_to_close:
        writers = {name: _SplitWriter(partial, name, dtype, options.shard_tokens) for name in SPLITS}
        for writer in writers.values():
            files_to_close.callback(writer.close)
        progress = Progress("tokenizing", "MB", sum(overview.num_bytes.values()))
        for document, ids, num_prompt in encode_documents(records, tokenizer):
            writers[overview.sides.of(document)].add(document, ids, num_prompt)
            progress.add(len(document.content.encode()))
        if records.files != files:
            raise DataError(f"{options.records[0]}: the input changed while it was read: run `smelter tokenize` again")
        tokenizer.save(partial / "tokenizer.json")
        index: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "dtype": dtype,
            "vocab_size": tokenizer.vocab_size,
            "tokenizer": {
                "name": "tokenizer.json",
                "hash": tokenizer.hash,
                "sha256": file_sha256(partial / "tokenizer.json"),
            },
            "inputs": [asdict(file) for file in files],
            "val_documents_in_train": overview.num_leaked,
            "teacher_weights": records.teacher_weights,
            "splits": {name: writer.finish() for name, writer in writers.items()},
        }
        write_json(partial / "index.json", sealed(index), indent=1)
        _check_target(options.out)  # once more: that was long ago
    for name, writer in writers.items():
        split, size = index["splits"][name], writer.num_content_bytes
        chats = f", {writer.num_chats:,} of them conversations" if writer.num_chats else ""
        print(
            f"{name + ':':6} {split['num_docs']:,} documents{chats}, {size:,} bytes -> {split['num_tokens']:,} "
            f"tokens ({size / split['num_tokens']:.2f} bytes each) in {len(split['files'])} file(s)"
        )
    print(f"wrote {options.out} in {time.monotonic() - start:.1f} s")
    return options.out


def _tokenizer(options: TokenizeOptions, records: Records, overview: Survey) -> Tokenizer:
    """The one asked for, or one trained on the train side."""
    if options.tokenizer is not None:
        tokenizer = Tokenizer.load(options.tokenizer, options.special, add_chat=overview.num_chats > 0)
        print(f"tokenizer: {options.tokenizer}, {tokenizer.vocab_size:,} tokens")
    else:
        start = time.monotonic()
        wanted = DEFAULT_VOCAB_SIZE if options.vocab_size is None else options.vocab_size
        limit = options.tokenizer_mb * 2**20
        tokenizer = Tokenizer.train(training_texts(records, overview, limit), wanted, options.special)
        text = megabytes(min(limit, overview.num_bytes["train"]))
        print(f"tokenizer: {tokenizer.vocab_size:,} tokens trained on {text} in {time.monotonic() - start:.1f} s")
    for notice in tokenizer.notices:
        print(f"tokenizer: {notice}")
    return tokenizer


def _report_reading(records: Records, overview: Survey) -> None:
    size = sum(file.num_bytes for file in records.files)
    documents, text = sum(overview.num_docs.values()), sum(overview.num_bytes.values())
    print(
        f"read {len(records.files):,} file(s), {size:,} bytes: {records.num_records:,} records, "
        f"{documents:,} documents, {text:,} bytes of text"
    )
    for reason, count in sorted(records.skipped.items()):
        print(f"skipped {count:,}: {reason}")
    for complaint in records.complaints:
        print(f"  {complaint}")
    if overview.num_joined:
        print(f"{overview.num_joined:,} text(s) stand in sources on both sides of the split: each was put on one side")
    if overview.num_leaked:
        print(
            f"warning: text or prompt of {overview.num_leaked:,} of {overview.num_docs['val']:,} held-out documents "
            f'({overview.leaked_bytes:,} bytes) is in train, too, as records\' "split" says: measured on them, memory '
            'looks like skill; drop copies (`foundry clean`), or leave their "split" out'
        )


def _check_target(out: Path) -> None:
    """Replace shards, but nothing else: what a person keeps in that folder is not ours to delete."""
    if not out.exists():
        return
    if not out.is_dir():
        raise DataError(f"{out}: exists and is not a folder: choose another --out")
    present = {path.name for path in out.iterdir()}
    if not present:
        return
    try:
        index = json.loads((out / "index.json").read_text(encoding="utf-8"))
        ours = {"index.json", *(entry["name"] for entry in file_entries(index))}
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{out}: not empty and not shards: choose another --out, or empty it") from None
    if others := sorted(present - ours):
        raise DataError(
            f"{out}: also holds {others[0]!r}, which is not of the shards: move it, or choose another --out"
        )


def main(argv: list[str]) -> int:
    """`smelter tokenize`."""
    tokenize(parse(TokenizeOptions, argv, "smelter tokenize"))
    return 0
