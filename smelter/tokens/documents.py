"""Records -> weighted documents: what becomes one sequence of tokens each, and what is counted and left out.

A text is a document. Each of the responses to a prompt makes a conversation of its own (the prompt, and this answer)
with the response's weight, times that of its teacher. Responses without text or without weight are left out; a record
whose id was seen before is an error, like a line that is no record.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from smelter.base import (
    MAX_LINE_BYTES,
    MAX_WEIGHT,
    ConfigError,
    DataError,
    InputFile,
    Record,
    RecordError,
    RecordReader,
)


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
        max_line_bytes: int = MAX_LINE_BYTES,
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
        """Every document in order. Raises RecordError with file and line, unless `skip_invalid`."""
        self._reset()
        places: dict[bytes, tuple[Path, int]] = {}
        for path in self.paths:
            reader = RecordReader(path, on_error=self._complain, max_line_bytes=self.max_line_bytes)
            for record in reader:
                place = path, reader.line_number
                first = places.setdefault(hashlib.sha256(record.id.encode()).digest(), place)
                if first is place:
                    self.num_records += 1
                    yield from self._documents(record)
                else:
                    message = f"{reader.place}: same id as {first[0]}:{first[1]}: remove one of the two"
                    self._complain(RecordError("duplicate id", message))
            if not reader.line_number:
                self._complain(RecordError("empty file", f"{path}: the file is empty: leave it out"))
            self.files.append(reader.input_file)

    def _documents(self, record: Record) -> Iterator[Document]:
        if record.kind == "text":
            source = record.source or record.id
            yield Document(record.text, source, record.split, 1.0, record.license, record.language)
            return
        # Two records of one prompt must not stand on both sides of the split.
        source = record.source or f"prompt {hashlib.sha256(record.prompt.encode()).hexdigest()}"
        for answer in record.responses:
            self.teachers[answer.teacher] += 1
            weight = answer.weight * self.teacher_weights.get(answer.teacher, 1.0)
            if not answer.text:
                self.skipped["empty response"] += 1
            elif weight <= 0:
                self.skipped["weight 0"] += 1
            else:
                origin = (record.license, record.language, answer.teacher)
                yield Document(answer.text, source, record.split, weight, *origin, record.prompt)

    def _complain(self, error: RecordError) -> None:
        """Count and remember, or raise."""
        if not self.skip_invalid:
            way = "raise --max-line-mb, or " if error.reason == "line too long" else ""
            raise RecordError(error.reason, f"{error} (or {way}pass over such lines with --skip-invalid)") from None
        self.skipped[error.reason] += 1
        if len(self.complaints) < self.MAX_COMPLAINTS:
            self.complaints.append(str(error))


def parse_teacher_weights(pairs: Sequence[str]) -> dict[str, float]:
    """Weights by teacher of "NAME=WEIGHT" each. Raises ConfigError."""
    weights: dict[str, float] = {}
    for pair in pairs:
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
        files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
        if not files:
            raise DataError(f"{path}: no *.jsonl in this folder: `foundry corpus` makes some")
        for file in files:
            paths.setdefault(file.resolve(), file)
    if not paths:
        raise DataError("no input: give JSONL files or folders that hold some")
    return list(paths.values())
