"""The JSONL record: the one thing that Foundry hands to Smelter, checked where it enters.

One JSON object a line, either a text (`kind = "text"`: a source file) or a prompt with teachers' answers
(`kind = "instruct"`). Only `kind` and the content are required; null stands for what is not given. A key that we do
not know is an error and not a shrug: a misspelt `split` would otherwise train on what was meant to be held out, a
misspelt `licence` on code that nobody cleared.

`id` is the sha256 of what determines the content. For a text that is the text itself, so equal files have equal ids
wherever they were found (`sha256sum` prints the same), and making the records twice cannot duplicate any. Whoever
makes instruct records gives the id (of seed, prompt and teachers), so that asking again replaces; without one it is
the hash of prompt and answers.

Whatever makes a `Record` is checked for what training needs. Foundry also counts on where a record comes from, which
`check_provenance` looks at when a record is written and when Foundry reads it. `smelter tokenize` does not, so that
records from elsewhere can be trained on whatever their ids are and however they count tokens and money.

A byte-order mark at the beginning of a text belongs to how a file was stored. It is left out, so that code with it is
the same code, which parses.

Reading holds one line in memory, at most `MAX_LINE_BYTES`, however long the file's lines are.
"""

import hashlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from smelter.base.errors import DataError, nearest
from smelter.base.files import whole_file

MAX_LINE_BYTES = 64 * 2**20
"""Longest line that is read; a source file of this size is no source file."""
MAX_WEIGHT = 1_000_000_000
"""A response that counts for more is a slip of the pen."""

_RESPONSE_TYPES: dict[str, type] = {
    "teacher": str,
    "text": str,
    "weight": float,
    "finish": str,
    "usage": dict,
    "cost": float,
}
_RECORD_TYPES: dict[str, type] = {
    **dict.fromkeys(("id", "kind", "text", "prompt"), str),
    "responses": tuple,
    **dict.fromkeys(("language", "source", "license", "split"), str),
    "meta": dict,
}
_CONTENT = {"text": "text", "prompt": "instruct", "responses": "instruct"}
"""The parts of the content, and the kind of record that has each."""
_TYPE_NAMES = {str: "a string", float: "a number", dict: "an object", tuple: "a list of objects"}
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MARK = "\ufeff"
"""The byte-order mark, with which some programs begin a UTF-8 file."""


class RecordError(DataError):
    """A line that cannot be used: what is wrong, and the fix."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        """Two or three words to count such lines by."""

    def at(self, where: str) -> "RecordError":
        """The same error, with its place before it."""
        return RecordError(self.reason, f"{where}: {self}")


@dataclass(frozen=True, kw_only=True)
class Response:
    """One teacher's answer to a prompt."""

    teacher: str
    """Who answered, e.g. "anthropic/claude" or "human"."""
    text: str
    """The answer."""
    weight: float = 1.0
    """Weight of this answer in training; 0 keeps it out."""
    finish: str = ""
    """Why the teacher stopped, in its own words ("stop", "length"); empty if unknown."""
    usage: dict[str, int] = field(default_factory=dict)
    """Tokens the teacher billed, by kind."""
    cost: float = 0.0
    """US dollars that the answer cost."""

    def __post_init__(self) -> None:
        _check_types(self, _RESPONSE_TYPES)
        _leave_out_mark(self, "text")
        if not 0 <= self.weight <= MAX_WEIGHT:
            raise _wrong(f'"weight" is {self.weight}: must lie between 0 and {MAX_WEIGHT:,}')

    def check_provenance(self) -> None:
        """Raises RecordError unless it says who answered and what that cost."""
        if not self.teacher:
            raise _wrong('"teacher" is empty: name who answered')
        for name, count in self.usage.items():
            if type(count) is not int or count < 0:
                raise _wrong(f'"usage" has {_short(name)}: {_short(count)}: must be a count of tokens')
        if not (math.isfinite(self.cost) and self.cost >= 0):
            raise _wrong(f'"cost" is {self.cost}: must be 0 or a positive number')


@dataclass(frozen=True, kw_only=True)
class Record:
    """One document, or one prompt with its answers. Construction checks all that training needs; raises RecordError."""

    id: str = ""
    """What no two records share, for Foundry 64 hexadecimal digits; computed from the content if not given."""
    kind: Literal["text", "instruct"]
    """text: `text` is set. instruct: `prompt` and `responses` are."""
    text: str = ""
    """The document."""
    prompt: str = ""
    """What the teachers were asked."""
    responses: tuple[Response, ...] = ()
    """Their answers, at least one."""
    language: str = ""
    """Programming language in lower case, e.g. "python"."""
    source: str = ""
    """Where it comes from, e.g. "stdlib/asyncio/tasks.py"; all records of one source are in one split."""
    license: str = ""
    """SPDX identifier, e.g. "PSF-2.0"; "unknown" if nobody looked."""
    split: Literal["", "train", "val"] = ""
    """Where it belongs; empty leaves it to `smelter tokenize`."""
    meta: dict[str, Any] = field(default_factory=dict)
    """Anything else worth keeping; nothing reads it to decide."""

    def __post_init__(self) -> None:
        _check_types(self, _RECORD_TYPES)
        _leave_out_mark(self, "text", "prompt")
        if self.kind not in ("text", "instruct"):
            raise _wrong(f'"kind" is {_short(self.kind)}: must be "text" or "instruct"')
        if self.split not in ("", "train", "val"):
            raise _wrong(f'"split" is {_short(self.split)}: must be "train" or "val", or be left out')
        for name, kind in _CONTENT.items():
            is_filled = bool(getattr(self, name))
            if kind == self.kind and not is_filled:
                raise _wrong(f'"{name}" is missing or empty: a record of kind "{kind}" needs it')
            if kind != self.kind and is_filled:
                raise _wrong(f'"{name}" does not belong in a record of kind "{self.kind}": remove it')
        if not self.id:
            object.__setattr__(self, "id", self._content_id())

    def _content_id(self) -> str:
        if self.kind == "text":
            return hashlib.sha256(self.text.encode()).hexdigest()
        return content_id(self.prompt, *(part for answer in self.responses for part in (answer.teacher, answer.text)))

    @classmethod
    def from_values(cls, values: object) -> "Record":
        """The record that a JSON object holds. Raises RecordError, which says what is wrong but not where."""
        if not isinstance(values, dict):
            raise RecordError("not JSON", f"{_short(values)} is not a JSON object: each line must be one")
        given = _known(values, _RECORD_TYPES)
        if "kind" not in given:
            raise _wrong('"kind" is missing: must be "text" or "instruct"')
        if isinstance(given.get("responses"), list):
            given["responses"] = tuple(map(_response, itertools.count(), given["responses"]))
        return cls(**given)

    @classmethod
    def from_json(cls, line: bytes) -> "Record":
        """The record in a line of a file. Raises RecordError, which says what is wrong but not where."""
        return cls.from_values(_json(line))

    def check_provenance(self) -> None:
        """What Foundry needs beyond training: an id that is a sha256, who answered, and what that cost.

        Raises RecordError.
        """
        if not _SHA256.fullmatch(self.id):
            raise _wrong(f'"id" is {_short(self.id)}: must be the 64 hexadecimal digits of a sha256, or be left out')
        for index, response in enumerate(self.responses):
            try:
                response.check_provenance()
            except RecordError as error:
                raise error.at(f"responses[{index}]") from None

    def to_values(self) -> dict[str, Any]:
        """The record as a JSON object, to be read only; parts that are not set are left out."""
        values = {name: value for name, value in vars(self).items() if value or name == "meta"}
        if self.responses:
            values["responses"] = [vars(response) for response in self.responses]
        return values

    def to_json(self) -> str:
        """The record as one line without its end. Raises ValueError where `meta` holds what JSON does not."""
        return json.dumps(self.to_values(), ensure_ascii=False, allow_nan=False)


@dataclass(frozen=True)
class InputFile:
    """A file as it was when it was read."""

    name: str
    num_bytes: int
    sha256: str


class RecordReader:
    """The records of one file, in order: never more than one line in memory, and all that was read counted and hashed.

    After the last record `line_number` is the number of lines and `input_file` the file as it was read.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        on_error: Callable[[RecordError], None] | None = None,
        check_provenance: bool = False,
        max_line_bytes: int = MAX_LINE_BYTES,
    ) -> None:
        """`on_error` gets the error of each line that cannot be used, with its place, to count it or to raise another.

        Without it the first one is raised. `check_provenance` asks for what Foundry counts on (see `Record`).
        """
        self.path = path
        self.line_number = 0
        self._on_error = on_error or _raise
        self._check_provenance = check_provenance
        self._max_line_bytes = max_line_bytes
        self._num_bytes = 0
        self._digest = hashlib.sha256()

    @property
    def place(self) -> str:
        """File and line of the latest record."""
        return f"{self.path}:{self.line_number}"

    @property
    def input_file(self) -> InputFile:
        """The file as far as it was read."""
        return InputFile(str(self.path), self._num_bytes, self._digest.hexdigest())

    def __iter__(self) -> Iterator[Record]:
        """Every record, once."""
        with open(self.path, "rb") as file:
            while line := self._read(file, self._max_line_bytes + 1):
                self.line_number += 1
                try:
                    if len(line) > self._max_line_bytes and not line.endswith(b"\n"):
                        while (part := self._read(file, 2**20)) and not part.endswith(b"\n"):
                            pass
                        limit = f"{self._max_line_bytes:,} bytes"
                        raise RecordError("line too long", f"line longer than {limit}: split the document")
                    record = Record.from_json(line)
                    if self._check_provenance:
                        record.check_provenance()
                except RecordError as error:
                    self._on_error(error.at(self.place))
                else:
                    yield record

    def _read(self, file: IO[bytes], limit: int) -> bytes:
        part = file.readline(limit)
        self._num_bytes += len(part)
        self._digest.update(part)
        return part


def read_records(path: Path | str) -> Iterator[Record]:
    """A file's records as Foundry takes them, provenance checked. Raises RecordError that names file, line and fix."""
    return iter(RecordReader(path, check_provenance=True))


def write_records(path: Path | str, records: Iterable[Record]) -> int:
    """Write all records or leave `path` as it was; returns their number.

    Raises what `whole_file` raises, and RecordError for a record that `read_records` would refuse.
    """
    number = 0
    with whole_file(Path(path)) as file:
        for record in records:
            record.check_provenance()
            file.write(record.to_json() + "\n")
            number += 1
    return number


def content_id(*parts: str) -> str:
    """sha256 (hexadecimal) of strings that together determine a record; no two lists run together."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()


def _response(index: int, values: object) -> Response:
    try:
        if not isinstance(values, dict):
            raise _wrong(f"{_short(values)} is not an object")
        given = _known(values, _RESPONSE_TYPES)
        for name in ("teacher", "text"):
            if name not in given:
                raise _wrong(f'"{name}" is missing: add it')
        return Response(**given)
    except RecordError as error:
        raise error.at(f"responses[{index}]") from None


def _wrong(message: str) -> RecordError:
    return RecordError("wrong field", message)


def _raise(error: RecordError) -> None:
    raise error from None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _known(values: dict[str, Any], types: dict[str, type]) -> dict[str, Any]:
    """The fields that are given, all of them known."""
    for name in values:
        if name not in types:
            raise RecordError("unknown key", f"unknown key {_short(name)}: {nearest(name, types)}")
    return {name: value for name, value in values.items() if value is not None}


def _check_types(instance: Record | Response, types: dict[str, Any]) -> None:
    for name, wanted in types.items():
        value = getattr(instance, name)
        if type(value) is wanted:
            if wanted is str and not value.isascii():
                try:
                    value.encode()
                except UnicodeEncodeError as error:
                    message = f'"{name}" has half a surrogate pair at character {error.start}: it is not text'
                    raise _wrong(message) from None
        elif wanted is float and type(value) is int:
            try:
                object.__setattr__(instance, name, float(value))
            except OverflowError:
                raise _wrong(f'"{name}" is {_short(value)}: too large a number') from None
        else:
            raise _wrong(f'"{name}" is {_short(value)}: must be {_TYPE_NAMES[wanted]}')


def _leave_out_mark(instance: Record | Response, *names: str) -> None:
    for name in names:
        value: str = getattr(instance, name)
        if value.startswith(_MARK):
            object.__setattr__(instance, name, value.lstrip(_MARK))


def _json(line: bytes) -> Any:
    """The JSON value of a line."""
    try:
        # Decoded here: json.loads guesses UTF-16 and UTF-32 from the first bytes.
        text = line.decode("utf-8")
        return _DECODER.decode(text)
    except UnicodeDecodeError as error:
        message = f"not UTF-8 at byte {error.start} of the line: convert the file with iconv"
        raise RecordError("not UTF-8", message) from None
    except json.JSONDecodeError as error:
        message = f"not JSON: {error.msg} at column {error.colno}: each line must be one whole object"
        if not text.strip():
            message = "an empty line: remove it"
        elif text.startswith(_MARK):
            message = "not JSON: begins with a byte order mark: save the file as UTF-8 without it"
        raise RecordError("not JSON", message) from None
    except RecursionError:
        raise RecordError("not JSON", "nested too deeply: flatten it") from None
    except RecordError:
        raise
    except ValueError as error:  # an integer of more digits than Python converts
        raise RecordError("not JSON", f"not usable JSON: {error}") from None


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise RecordError("not JSON", f"{_short(digits)} is larger than any float: use a finite number")
    return number


def _no_constant(name: str) -> Any:
    raise RecordError("not JSON", f"{name} is not JSON: use a finite number")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise _wrong(f"key {_short(twice)} is given twice: keep one")
    return values


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_no_constant, object_pairs_hook=_no_duplicates)
