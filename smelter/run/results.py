"""What `smelter evaluate` found: `results.json`, and beside it `results_cases.jsonl`.

The figures are `Results`. Each case (a document, a gap, a problem) has a line of its own that says what was written and
how it was judged: two evaluations are compared by those. The classes are the format: a field is a key, in this order;
`pass_at` stands as `pass@1`, `pass@10`, ...; a field with a default is left out where there is nothing to say.
"""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from smelter.base import ConfigError, DataError, from_table, whole_file, write_text
from smelter.run.metrics import Sample

RESULTS_FILE = "results.json"
T = TypeVar("T")


@dataclass(frozen=True)
class LanguageBits:
    """Bits per byte of the held-out documents in one language."""

    bpb: float
    num_bytes: int
    num_files: int


@dataclass(frozen=True)
class GapsFilled:
    """How gaps of one kind were filled in: shares, and edit similarity on average."""

    exact_match: float
    edit_similarity: float
    cases: int
    max_tokens: int


@dataclass(frozen=True)
class LevelSolved:
    """Problems of one difficulty: {k: pass@k}."""

    pass_at: dict[int, float]
    num_problems: int


@dataclass(frozen=True, kw_only=True)
class Solved(LevelSolved):
    """A set of problems, or of gaps with tests (these alone are compared with the solution, too)."""

    num_completions: int
    """Of each problem."""
    verdicts: dict[str, int]
    """How many programs ended in each way, the most frequent first."""
    exact_match: float | None = None
    edit_similarity: float | None = None
    by_difficulty: dict[str, LevelSolved] = field(default_factory=dict)
    temperature: float
    max_tokens: int


@dataclass(frozen=True)
class AtCursor:
    """Suggestions at places of one kind: the shares of which the first character, the first word, the line is right.

    `end`: nothing followed the right line; it ended by itself or with a line break.
    """

    first_character: float
    word: float
    line: float
    end: float
    places: int


@dataclass(frozen=True)
class Typed:
    """Lines typed with suggestions: keystrokes saved per 100, characters (with line breaks, no indentation), keys."""

    saved: float
    characters: int
    keys: int
    lines: int


@dataclass(frozen=True)
class Latency:
    """Milliseconds from asking to the end of the first line, one request at a time."""

    median_ms: float
    p95_ms: float
    requests: int


@dataclass(frozen=True)
class Suggester:
    """How one who suggests did at the cursor."""

    places: dict[str, AtCursor]
    """By kind of place: line_start, word_start, in_word."""
    typed: Typed
    latency: Latency | None = None


@dataclass(frozen=True)
class Editor:
    """What arrived at the cursor while somebody typed held-out code, from each who suggests."""

    rows: dict[str, Suggester]
    seed: int
    characters: int
    """Shown around the cursor, at most."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """All figures of one evaluation. What could not be known or was not asked for is None."""

    checkpoint: str
    step: int
    num_params: int
    train_seconds: float | None
    train_tokens: int | None
    val_bpb: float
    gzip_bpb: float
    xz_bpb: float
    xz_joined_bpb: float
    val_bytes: int
    val_files: int
    bpb_by_language: dict[str, LanguageBits]
    context: int
    stride: int
    infill_exact_match: float | None
    infill_exact_match_psm: float | None
    infill_exact_match_untrained: float | None
    infill_cases: int
    infill_seed: int
    infill: dict[str, GapsFilled]
    """By kind of gap: single_line, multi_line, random_span."""
    activation_quant: str
    trits: dict[str, dict[int, int]]
    """How many weights are -1, 0 and 1, by kind of layer."""
    samples: tuple[Sample, ...]
    pass_at_k: dict[str, Solved] = field(default_factory=dict)
    infill_files: dict[str, Solved] = field(default_factory=dict)
    editor: Editor | None = None


@dataclass(frozen=True)
class Case:
    """One thing that was asked: of which figure it is a part, and a name that is the same for all who were asked it."""

    measure: str
    case: str


@dataclass(frozen=True)
class DocumentCase(Case):
    """How much a held-out document surprised the model."""

    language: str
    nats: float
    num_bytes: int


@dataclass(frozen=True)
class GapCase(Case):
    """What the model wrote into a gap."""

    exact: bool
    edit_similarity: float
    completion: str
    expected: str


@dataclass(frozen=True)
class ProblemCase(Case):
    """The completions of a problem, and what became of each."""

    num_completions: int
    num_passed: int
    verdicts: tuple[str, ...]
    completions: tuple[str, ...]


_CASES: dict[str, type[Case]] = {
    "bits_per_byte": DocumentCase,
    "infill": GapCase,
    "pass_at_k": ProblemCase,
    "infill_files": ProblemCase,
}


def cases_path(results: Path) -> Path:
    """Where the cases of a result file lie."""
    return results.with_name(f"{results.stem}_cases.jsonl")


def write_results(path: Path, results: Results, cases: Iterable[Case]) -> None:
    """The figures, and the cases beside them; both are on the disk before either takes its name."""
    with whole_file(cases_path(path)) as file:
        file.writelines(f"{_json(case)}\n" for case in cases)
        file.flush()
        os.fsync(file.fileno())
        write_text(path, f"{_json(results, indent=2)}\n")


def check_results_file(path: Path) -> None:
    """DataError where a result file or its cases have the name of a file that `smelter evaluate` did not write."""
    for file, keys in ((path, {"val_bpb", "editor"}), (cases_path(path), {"measure"})):
        if not file.exists():
            continue
        try:
            data = file.read_bytes()
            values = json.loads(data if file == path else data.partition(b"\n")[0] or b'{"measure": ""}')
            ours = isinstance(values, dict) and bool(keys & values.keys())
        except (OSError, ValueError):
            ours = False
        if not ours:
            raise DataError(f"{file}: `smelter evaluate` did not write this: move it, or choose another --out")


def write_editor(path: Path, editor: Editor) -> None:
    """The one part that can be measured without a checkpoint, under its key."""
    write_text(path, f"{_json({'editor': editor}, indent=2)}\n")


def read_results(path: Path) -> Results:
    """The figures. Raises DataError that names the file, the key and the fix."""
    return _read(path.read_bytes(), str(path), lambda _: Results)


def read_cases(results: Path) -> list[Case]:
    """The cases beside a result file, none where there is no such file. Raises DataError that names file and line."""
    path = cases_path(results)
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    return [_read(line, f"{path}:{number}", _class_of) for number, line in enumerate(lines, 1) if line]


def _json(part: Any, indent: int | None = None) -> str:
    return json.dumps(part, indent=indent, ensure_ascii=False, allow_nan=False, default=_keys)


def _keys(part: Any) -> dict[str, Any]:
    """The keys that one of the classes above has in its file."""
    keys: dict[str, Any] = {}
    for item in fields(part):
        value = getattr(part, item.name)
        if item.name == "pass_at":
            keys |= {f"pass@{k}": share for k, share in value.items()}
        elif value not in (None, {}) or item.default is item.default_factory is MISSING:
            keys[item.name] = value
    return keys


def _read(data: bytes, where: str, class_of: Callable[[Any], type[T]]) -> T:
    try:
        values = json.loads(data, object_hook=_with_pass_at)
        return from_table(class_of(values), values, where)
    except ConfigError as error:
        raise DataError(f"{error}: not what `smelter evaluate` writes: evaluate again") from None
    except ValueError as error:
        raise DataError(f"{where}: damaged ({error}): evaluate again") from None


def _with_pass_at(keys: dict[str, Any]) -> dict[str, Any]:
    """An object with its `pass@1`, `pass@10`, ... as one `pass_at`."""
    passes = {name.removeprefix("pass@"): keys.pop(name) for name in list(keys) if name.startswith("pass@")}
    return keys | {"pass_at": passes} if passes else keys


def _class_of(case: Any) -> type[Case]:
    """By its measure; of what has none it does not matter, it will be refused."""
    measure = case.get("measure") if isinstance(case, dict) else None
    return _CASES.get(str(measure).partition("/")[0], DocumentCase)
