"""JSONL records, read strictly: what the trainer will see is what the file says, or an error names the line.

One JSON object a line. `kind = "text"` has `text`, a document; `kind = "instruct"` has `prompt` and `responses`,
of which each makes a conversation of its own (the prompt, and this answer) with the response's weight, times that of
its teacher. Responses without text or without weight are counted and left out. An unknown key is an error,
because a misspelt `split` would otherwise train on what was meant to be held out.

Lines are read with a limit, so that no file, however odd, takes more memory than one line may have.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, NoReturn

from smelter.base import ConfigError, DataError, nearest

MAX_WEIGHT = 1_000_000_000
"""A response that counts for more is a slip of the pen."""

_FIELDS: dict[str, type] = {
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
_RESPONSE_FIELDS: dict[str, type] = {
    "teacher": str,
    "text": str,
    "weight": float,
    "finish": str,
    "usage": dict,
    "cost": float,
}
_TYPE_NAMES = {str: "a string", list: "a list", dict: "an object", float: "a number"}


@dataclass(frozen=True)
class Document:
    """What becomes one sequence of tokens."""

    text: str
    """What the model learns to write: a plain document, or the answer in a conversation. Encodable as UTF-8."""
    source: str
    """Where it comes from; documents of one source stay on one side of the split."""
    split: str
    """Either "train" or "val", or "" if the record leaves it open."""
    weight: float
    """Weight in the loss, above 0."""
    license: str = ""
    """The record's licence, "" where it names none."""
    language: str = ""
    """The record's language, "" where it names none."""
    teacher: str = ""
    """Who answered, where this is a teacher's answer."""
    prompt: str = ""
    """What `text` answers; empty for a plain document."""

    @property
    def content(self) -> str:
        """All of its text."""
        return f"{self.prompt}\n{self.text}" if self.prompt else self.text


@dataclass(frozen=True)
class InputFile:
    """A file as it was when it was read."""

    name: str
    num_bytes: int
    sha256: str


class _InvalidRecord(Exception):
    """Why a line cannot be used: a category to count by, and what to tell."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def _invalid(reason: str, message: str) -> NoReturn:
    raise _InvalidRecord(reason, message)


class _LineReader:
    """Lines of a file with their number, never more than `limit` bytes of one; counts and hashes all of it."""

    def __init__(self, file: IO[bytes], limit: int) -> None:
        self.file, self.limit = file, limit
        self.number = self.num_bytes = 0
        self.digest = hashlib.sha256()

    def _read(self, limit: int) -> bytes:
        part = self.file.readline(limit)
        self.num_bytes += len(part)
        self.digest.update(part)
        return part

    def __iter__(self) -> Iterator[bytes | None]:
        """Every line, or None for one that is too long, the rest of which is passed over."""
        while line := self._read(self.limit + 1):
            self.number += 1
            if len(line) > self.limit and not line.endswith(b"\n"):
                while (part := self._read(2**20)) and not part.endswith(b"\n"):
                    pass
                yield None
            else:
                yield line


class Records:
    """The documents of JSONL files; every iteration reads them anew, from the first line to the last.

    After an iteration the attributes say what it saw: `num_records` valid ones, `skipped` counts by reason,
    `complaints` (file, line and message of the first few that were skipped), `teachers` (responses of each), and
    `files`.
    """

    MAX_COMPLAINTS = 5

    def __init__(
        self,
        inputs: Sequence[Path],
        *,
        skip_invalid: bool = False,
        max_line_bytes: int = 64 * 2**20,
        teacher_weights: Mapping[str, float] | None = None,
    ) -> None:
        """`inputs` are files, or folders of which every *.jsonl below is read. DataError if there are none.

        A response's weight is multiplied by that of its teacher in `teacher_weights` (1 for those not named).
        """
        self.paths = _expand(inputs)
        self.teacher_weights = dict(teacher_weights or {})
        self.skip_invalid = skip_invalid
        self.max_line_bytes = max_line_bytes
        self._reset()

    def _reset(self) -> None:
        self.num_records = 0
        self.skipped: Counter[str] = Counter()
        self.complaints: list[str] = []
        self.teachers: Counter[str] = Counter()
        self.files: list[InputFile] = []

    def __iter__(self) -> Iterator[Document]:
        """Every document in order. Raises DataError with file and line, unless `skip_invalid`."""
        self._reset()
        places: dict[bytes, tuple[Path, int]] = {}
        for path in self.paths:
            with path.open("rb") as file:
                lines = _LineReader(file, self.max_line_bytes)
                for line in lines:
                    try:
                        documents = self._documents(line, (path, lines.number), places)
                    except _InvalidRecord as error:
                        self._complain(error.reason, f"{path}:{lines.number}: {error}")
                        continue
                    self.num_records += 1
                    yield from self._usable(documents)
            if not lines.number:
                self._complain("empty file", f"{path}: the file is empty: leave it out")
            self.files.append(InputFile(str(path), lines.num_bytes, lines.digest.hexdigest()))

    def _usable(self, documents: list[Document]) -> Iterator[Document]:
        for document in documents:
            if document.prompt:
                self.teachers[document.teacher] += 1
            weight = document.weight * self.teacher_weights.get(document.teacher, 1.0)
            if not document.text:
                self.skipped["empty response"] += 1
            elif weight <= 0:
                self.skipped["weight 0"] += 1
            else:
                yield document if weight == document.weight else replace(document, weight=weight)

    def _documents(
        self, line: bytes | None, place: tuple[Path, int], places: dict[bytes, tuple[Path, int]]
    ) -> list[Document]:
        if line is None:
            limit = f"{self.max_line_bytes:,} bytes"
            _invalid("line too long", f"line longer than {limit}: split the document, or raise --max-line-mb")
        name, documents = _parse(line)
        first = places.setdefault(name, place)
        if first is not place:
            _invalid("duplicate id", f"same id as {first[0]}:{first[1]}: remove one of the two")
        return documents

    def _complain(self, reason: str, message: str) -> None:
        if not self.skip_invalid:
            raise DataError(f"{message} (or pass over such lines with --skip-invalid)") from None
        self.skipped[reason] += 1
        if len(self.complaints) < self.MAX_COMPLAINTS:
            self.complaints.append(message)


def parse_teacher_weights(given: Sequence[str]) -> dict[str, float]:
    """Weights by teacher of "NAME=WEIGHT" each. Raises ConfigError."""
    weights: dict[str, float] = {}
    for pair in given:
        name, _, number = pair.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = -1.0
        if not name or not 0 <= weight <= MAX_WEIGHT:
            raise ConfigError(f"--teacher-weight {pair!r}: must be NAME=WEIGHT, WEIGHT from 0 to {MAX_WEIGHT:,}")
        if name in weights:
            raise ConfigError(f"--teacher-weight: {name!r} is given twice: keep one")
        weights[name] = weight
    return weights


def _expand(inputs: Sequence[Path]) -> list[Path]:
    """The files to read, each once, in the order given (folders sorted)."""
    paths: dict[Path, Path] = {}
    for path in inputs:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder: check the path")
        found = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
        if not found:
            raise DataError(f"{path}: no *.jsonl in this folder: `foundry corpus` makes some")
        for file in found:
            paths.setdefault(file.resolve(), file)
    if not paths:
        raise DataError("no input: give JSONL files or folders that hold some")
    return list(paths.values())


def _parse(line: bytes) -> tuple[bytes, list[Document]]:
    """A digest of the record's id, and its documents."""
    values = _checked(_json(line), _FIELDS, "the record")
    kind, split = values.get("kind"), values.get("split", "")
    if kind not in ("text", "instruct"):
        _invalid("wrong field", f'"kind" is {_short(kind)}: must be "text" or "instruct"')
    if split not in ("", "train", "val"):
        _invalid("wrong field", f'"split" is {_short(split)}: must be "train" or "val", or be left out')
    wanted, unwanted = (("text",), ("prompt", "responses")) if kind == "text" else (("prompt", "responses"), ("text",))
    for key in wanted:
        if not values.get(key):
            _invalid("wrong field", f'"{key}" is missing or empty: a record of kind "{kind}" needs it')
    for key in unwanted:
        if values.get(key):
            _invalid("wrong field", f'"{key}" does not belong in a record of kind "{kind}": remove it')
    prompt = values.get("prompt") or ""
    responses = [(values["text"], 1.0, "")] if kind == "text" else [_response(each) for each in values["responses"]]
    licence = values.get("license", "")
    language = values.get("language", "")
    documents = [
        Document(text, "", split, weight, licence, language, teacher, prompt) for text, weight, teacher in responses
    ]
    name = values.get("id") or _digest("\0".join(document.content for document in documents))
    # Two records of one prompt must not stand on both sides of the split.
    source = values.get("source") or (f"prompt {_digest(prompt)}" if prompt else name)
    return hashlib.sha256(name.encode()).digest(), [replace(document, source=source) for document in documents]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _response(values: Any) -> tuple[str, float, str]:
    """Text, weight and teacher of an answer."""
    if not isinstance(values, dict):
        _invalid("wrong field", f'"responses" holds {_short(values)}: must be a list of objects')
    values = _checked(values, _RESPONSE_FIELDS, "a response")
    for key in ("teacher", "text"):
        if key not in values:
            _invalid("wrong field", f'a response has no "{key}": add it')
    weight = values.get("weight", 1.0)
    if not 0 <= weight <= MAX_WEIGHT:
        _invalid("wrong field", f'"weight" is {_short(weight)}: must lie between 0 and {MAX_WEIGHT:,}')
    return values["text"], float(weight), values["teacher"]


def _json(line: bytes) -> dict[str, Any]:
    try:
        # Decoded here: json.loads guesses UTF-16 and UTF-32 from the first bytes.
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        _invalid("not UTF-8", f"not UTF-8 at byte {error.start} of the line: convert the file with iconv")
    try:
        values = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_no_duplicates)
    except json.JSONDecodeError as error:
        if not text.strip():
            _invalid("not JSON", "an empty line: remove it")
        _invalid("not JSON", f"not JSON: {error.msg} at column {error.colno}: each line must be one whole object")
    except RecursionError:
        _invalid("not JSON", "nested too deeply: flatten it")
    except ValueError as error:  # an integer of more digits than Python converts
        _invalid("not JSON", f"not usable JSON: {error}")
    if not isinstance(values, dict):
        _invalid("not JSON", f"{_short(values)} is not a JSON object: each line must be one")
    return values


def _no_constant(name: str) -> NoReturn:
    _invalid("not JSON", f"{name} is not JSON: use a finite number")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        _invalid("wrong field", f"key {_short(twice)} is given twice: keep one")
    return values


def _checked(values: dict[str, Any], types: dict[str, type], what: str) -> dict[str, Any]:
    """The fields that are given (null is not given), each known and of its type."""
    for key, value in values.items():
        wanted = types.get(key)
        if wanted is None:
            _invalid("unknown key", f"{what} has an unknown key {_short(key)}: {nearest(key, list(types))}")
        if value is not None and type(value) is not wanted and not (wanted is float and type(value) is int):
            _invalid("wrong field", f'"{key}" is {_short(value)}: must be {_TYPE_NAMES[wanted]}')
        if isinstance(value, str) and not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                _invalid("wrong field", f'"{key}" has half a surrogate pair at character {error.start}: it is not text')
    return {key: value for key, value in values.items() if value is not None}


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
