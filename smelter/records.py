"""Reading records: the JSONL border between Foundry (or any other producer) and training.

One object a line, unknown keys refused. A line is read with a bound, so a 200 MB line costs neither
memory nor the rest of the file. Each problem names file and line; with `skip_invalid` it is counted by
its kind instead.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from smelter.config import nearest
from smelter.errors import DataError

MAX_LINE_BYTES = 64 * 2**20
KEYS = {
    "id": str,
    "kind": str,
    "text": str,
    "prompt": str,
    "responses": list,
    "language": str,
    "source": str,
    "license": str,
    "split": str,
    "meta": dict,
}
_SURROGATE = re.compile("[\ud800-\udfff]")
RESPONSE_KEYS = ("teacher", "text", "weight", "finish", "usage", "cost")


@dataclass(frozen=True)
class Document:
    """One text to learn from; `split` empty where the record leaves it open."""

    text: str
    source: str
    split: str


@dataclass
class Tally:
    """What became of the lines read."""

    records: int = 0
    documents: int = 0
    skipped: Counter[str] = field(default_factory=Counter)


class _Invalid(Exception):
    """Kind of problem, its text, and the fix."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def expand(paths: Sequence[Path]) -> list[Path]:
    """Files as given, and the *.jsonl of folders. DataError for a missing path or a folder without any."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(path.glob("*.jsonl"))
            if not found:
                raise DataError(f"{path}: no *.jsonl in this folder: give a file of records, made by `foundry corpus`")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise DataError(f"{path}: no such file: give a file of records, made by `foundry corpus`")
    return files


def read_documents(path: Path, *, skip_invalid: bool, tally: Tally, seen: set[str]) -> Iterator[Document]:
    """The documents of one file, in order; `tally` counts, `seen` holds the ids met so far over all files.

    Raises DataError with file and line at the first invalid line, unless `skip_invalid`.
    """
    with path.open("rb") as file:
        if not file.peek(1):
            if not skip_invalid:
                raise DataError(f"{path}: empty file: remove it, or use --skip-invalid")
            tally.skipped["empty file"] += 1
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            try:
                if len(line) > MAX_LINE_BYTES:
                    _skip_line(file, line)
                    raise _Invalid("line too long", f"line longer than {MAX_LINE_BYTES // 2**20} MiB: split the record")
                documents = _documents(line, seen)
            except _Invalid as problem:
                if not skip_invalid:
                    raise DataError(
                        f"{path}:{number}: {problem} (or pass over such lines with --skip-invalid)"
                    ) from None
                tally.skipped[problem.kind] += 1
                continue
            tally.records += 1
            tally.documents += len(documents)
            yield from documents


def _skip_line(file: BinaryIO, line: bytes) -> None:
    while line and not line.endswith(b"\n"):
        line = file.readline(MAX_LINE_BYTES)


def _documents(line: bytes, seen: set[str]) -> list[Document]:
    """The documents of one line. Raises _Invalid."""
    if not line.strip():
        raise _Invalid("blank line", "blank line: remove it")
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _Invalid("not UTF-8", f"not UTF-8 at byte {error.start}: convert the file") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise _Invalid("not JSON", f"not JSON ({error}): mend or remove the line") from None
    if not isinstance(record, dict):
        raise _Invalid("not a record", "not a JSON object: each line must be one record")
    for key, value in record.items():
        if key not in KEYS:
            raise _Invalid("unknown key", f"unknown key {key!r}: {nearest(key, list(KEYS))}")
        if value is not None and not isinstance(value, KEYS[key]):
            raise _Invalid("wrong type", f"{key} must be {KEYS[key].__name__}, not {type(value).__name__}")
    split = record.get("split") or ""
    if split not in ("", "train", "val"):
        raise _Invalid("wrong value", f'split = {split!r}: must be "train" or "val"')
    texts = _texts(record)
    for text in texts:
        if _SURROGATE.search(text):
            raise _Invalid("half surrogate", "text holds half a surrogate pair, which no UTF-8 has: remove it")
    identity = record.get("id")
    if identity is not None:
        if identity in seen:
            raise _Invalid("duplicate id", f"id {identity!r} occurred before: remove the copy")
        seen.add(identity)
    return [Document(text, record.get("source") or identity or "", split) for text in texts]


def _texts(record: dict[str, Any]) -> list[str]:
    kind = record.get("kind")
    if kind == "text":
        text = record.get("text")
        if not text:
            raise _Invalid("no text", 'kind "text" needs a "text" that is not empty')
        return [text]
    if kind != "instruct":
        raise _Invalid("wrong kind", f'kind = {kind!r}: must be "text" or "instruct"')
    responses = record.get("responses")
    if not record.get("prompt") or not responses:
        raise _Invalid("no responses", 'kind "instruct" needs a "prompt" and at least one of "responses"')
    texts = []
    for response in responses:
        if not isinstance(response, dict) or not isinstance(response.get("text"), str):
            raise _Invalid("wrong response", 'each of "responses" must be an object with a "text"')
        for key in response:
            if key not in RESPONSE_KEYS:
                raise _Invalid("unknown key", f"responses: unknown key {key!r}: {nearest(key, list(RESPONSE_KEYS))}")
        texts.append(f"{record['prompt']}\n{response['text']}")
    return texts
