"""The JSONL record: the one thing that Foundry hands to Smelter, checked where it enters.

One JSON object a line, either a text (`kind = "text"`: a source file) or a prompt with teachers'
answers (`kind = "instruct"`). Only `kind` and the content are required. A key that we do not know is
an error and not a shrug: a misspelt `licence` would otherwise train on code that nobody cleared.

`id` is the sha256 of what determines the content. For a text that is the text itself, so equal files
have equal ids wherever they were found (`sha256sum` prints the same), and making the records twice
cannot duplicate any. Whoever makes instruct records gives the id (of seed, prompt and teachers), so
that asking again replaces; without one it is the hash of prompt and answers.

Reading holds one line in memory, at most `MAX_LINE_BYTES`, however long the file's lines are.
"""

import hashlib
import json
import math
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from smelter.base.errors import UserError, nearest

MAX_LINE_BYTES = 64 * 2**20
"""Longest line that is read; a source file of this size is no source file."""

T = TypeVar("T")


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
        _check_types(self, {"teacher": str, "text": str, "weight": float, "finish": str, "usage": dict, "cost": float})
        _require(bool(self.teacher), '"teacher" is empty: name who answered')
        for key, count in self.usage.items():
            _require(type(count) is int and count >= 0, f'"usage" has {key!r} = {count!r}: must be a count of tokens')
        for key in ("weight", "cost"):
            value = getattr(self, key)
            _require(math.isfinite(value) and value >= 0, f'"{key}" = {value!r}: must be 0 or a positive number')


@dataclass(frozen=True, kw_only=True)
class Record:
    """One document, or one prompt with its answers. Construction checks everything; raises UserError."""

    id: str = ""
    """64 hexadecimal digits; computed from the content if not given."""
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
        strings = ("id", "kind", "text", "prompt", "language", "source", "license", "split")
        _check_types(self, dict.fromkeys(strings, str) | {"responses": tuple, "meta": dict})
        _require(
            self.kind in ("text", "instruct"),
            f'"kind" = {self.kind!r}: must be "text" or "instruct"',
        )
        _require(self.split in ("", "train", "val"), f'"split" = {self.split!r}: must be "train" or "val", or left out')
        if self.kind == "text":
            _require(bool(self.text), '"text" is missing or empty: a text record needs it')
            _require(not self.prompt and not self.responses, '"prompt" and "responses" do not belong in a text record')
        else:
            _require(bool(self.prompt), '"prompt" is missing or empty: an instruct record needs it')
            _require(bool(self.responses), '"responses" is missing or empty: an instruct record needs at least one')
            _require(not self.text, '"text" does not belong in an instruct record')
        if not self.id:
            object.__setattr__(self, "id", self._content_id())
        _require(
            re.fullmatch(r"[0-9a-f]{64}", self.id) is not None,
            f'"id" = {_short(self.id)}: must be the 64 hexadecimal digits of a sha256, or be left out',
        )

    def _content_id(self) -> str:
        if self.kind == "text":
            return hashlib.sha256(self.text.encode()).hexdigest()
        return content_id(self.prompt, *(part for answer in self.responses for part in (answer.teacher, answer.text)))

    def to_json(self) -> str:
        """The record as one line without its end; parts that are not set are left out."""
        values = {key: value for key, value in asdict(self).items() if value or key == "meta"}
        return json.dumps(values, ensure_ascii=False, allow_nan=False)


def content_id(*parts: str) -> str:
    """sha256 (hexadecimal) of strings that together determine a record; no two lists run together."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()


def record_from_json(line: str | bytes) -> Record:
    """Check one line. Raises UserError that says what is wrong, but not where: the caller knows."""
    try:
        # Bytes are decoded here: json.loads would guess UTF-16 or -32 from a line's first bytes.
        text = line if isinstance(line, str) else line.decode("utf-8")
        values = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_no_duplicates)
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 at byte {error.start} of the line: convert the file with iconv") from None
    except json.JSONDecodeError as error:
        what = "an empty line" if not text.strip() else f"not JSON: {error.msg} at column {error.colno}"
        raise UserError(f"{what}: each line must be one JSON object") from None
    except RecursionError:
        raise UserError("nested too deeply: a record has two levels and its meta a few more") from None
    except UserError:
        raise
    except ValueError as error:  # an integer of more digits than Python converts
        raise UserError(f"not usable JSON: {error}") from None
    values = _known(values, Record, "the record")
    if "responses" in values:
        _require(isinstance(values["responses"], list), '"responses" must be a list of objects')
        values["responses"] = tuple(_response(value, i) for i, value in enumerate(values["responses"]))
    _require("kind" in values, '"kind" is missing: must be "text" or "instruct"')
    return Record(**values)


def _response(value: Any, index: int) -> Response:
    where = f"responses[{index}]"
    values = _known(value, Response, where)
    for key in ("teacher", "text"):
        _require(key in values, f'{where}: "{key}" is missing')
    try:
        return Response(**values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def read_records(
    path: Path | str,
    *,
    skip_invalid: bool = False,
    on_skip: Callable[[UserError], None] | None = None,
    max_line_bytes: int = MAX_LINE_BYTES,
) -> Iterator[Record]:
    """Stream a file's records. Raises UserError that names file and line, and the fix.

    With `skip_invalid` a bad line is passed to `on_skip` instead (by default it is printed to
    stderr), so nothing is lost in silence.
    """
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(max_line_bytes + 1):
            number += 1
            try:
                if len(line) > max_line_bytes and not line.endswith(b"\n"):
                    _skip_rest_of_line(file.readline)
                    raise UserError(f"line longer than {max_line_bytes:,} bytes: split the document")
                record = record_from_json(line)
            except UserError as error:
                located = UserError(f"{path}:{number}: {error}")
                if not skip_invalid:
                    raise located from None
                (on_skip or _print_skipped)(located)
            else:
                yield record


def write_records(path: Path | str, records: Iterable[Record]) -> int:
    """Write all records or leave `path` as it was (temporary file, fsync, rename); returns their number.

    Missing folders are made. Raises UserError where `path` is something else than a file.
    """
    path = Path(os.path.realpath(path))  # through a link, so that the link stays one
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        raise UserError(f"{path}: exists and is not a regular file: choose another output file")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    number = 0
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            for record in records:
                file.write(record.to_json() + "\n")
                number += 1
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # also an interruption: half a file must not stay behind
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return number


def _skip_rest_of_line(readline: Callable[[int], bytes]) -> None:
    while (part := readline(2**20)) and not part.endswith(b"\n"):
        pass


def _print_skipped(error: UserError) -> None:
    print(f"skipped {error}", file=sys.stderr)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_types(instance: object, types: dict[str, type]) -> None:
    for key, wanted in types.items():
        value = getattr(instance, key)
        if wanted is float and type(value) is int:
            object.__setattr__(instance, key, float(value))
            continue
        name = {"str": "a string", "float": "a number", "dict": "an object", "tuple": "a list"}[wanted.__name__]
        _require(type(value) is wanted, f'"{key}" = {_short(value)}: must be {name}')
        if wanted is str and not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise UserError(f'"{key}" has half a surrogate pair at character {error.start}: not text') from None


def _known(values: Any, kind: type, where: str) -> dict[str, Any]:
    _require(isinstance(values, dict), f"{where} is {_short(values)}: must be a JSON object")
    known = [item.name for item in fields(kind)]
    for key in values:
        _require(key in known, f"{where} has an unknown key {_short(key)}: {nearest(key, known)}")
    return {key: value for key, value in values.items() if value is not None}  # null: not given


def _no_constant(name: str) -> None:
    raise UserError(f"{name} is not JSON: use a finite number")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in values if keys.count(key) > 1)
        raise UserError(f"key {_short(twice)} is given twice: keep one")
    return values
