"""`foundry clean`: records in, good records out, and every other one in its own file with the reason.

Records stream through in batches and in order: what each text tells about itself (`filter`), then its run in the
sandbox, then the benchmarks (`decontaminate`), then what was kept before it (`dedup`). The same input and options
give the same bytes, whatever the number of cores; only signatures stay in memory. Of an instruct record a bad answer
is removed, and the record falls when none is left. What no check could judge is kept and counted.
"""

import itertools
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, TextIO

import tyro
from annotated_types import Ge, Gt, Interval

from foundry.cleaning.decontaminate import Benchmarks
from foundry.cleaning.dedup import NearDuplicates, exact_key, signatures
from foundry.cleaning.filter import (
    code_blocks,
    has_parser,
    is_session,
    parse_error,
    repetition,
    unfinished,
    wrong_length,
)
from foundry.credentials import masked, secret
from smelter.base import (
    ConfigError,
    DataError,
    Limits,
    Progress,
    Record,
    Response,
    SandboxError,
    UserError,
    parse,
    read_records,
    run_python,
    whole_file,
    write_records,
)

_BATCH = 128
"""Records in memory at a time."""
_ADDRESS = re.compile(r"0x[0-9a-f]{6,}")
"""Where an object lies in memory; it differs from run to run, and the rejects must not."""


@dataclass(frozen=True)
class Options:
    """Keep good records; put the others aside, each with its reason."""

    files: tyro.conf.Positional[tuple[Path, ...]]
    """Files of records; the output files are left out if a pattern names them."""
    out: Path = Path("data/clean.jsonl")
    """File for the records that are kept."""
    rejects: Path | None = None
    """File for the others: a line each with reason, detail and record. Default: beside --out, NAME.rejects.jsonl."""
    benchmarks: tuple[Path, ...] = ()
    """JSONL files of benchmark tasks (HumanEval, MBPP): records that hold any of them are dropped."""
    run: bool = False
    """Run the Python code of answers, and of texts that have tests, in the sandbox: it must end with exit code 0.
    Tests are taken from meta["tests"], Python source that follows the code."""
    run_seconds: Annotated[float, Gt(0)] = 10.0
    """Processor time of one program; by the clock, which a busy machine stretches, it may take four times as long."""
    run_memory_mb: Annotated[int, Gt(0)] = 512
    """Memory of one program, in MiB."""
    parse: bool = True
    """Drop code that does not parse."""
    finished: bool = True
    """Drop answers that were cut off."""
    secrets: bool = True
    """Drop texts with a credential in them; the rejects show its kind in its place."""
    min_chars: Annotated[int, Ge(0)] = 20
    """Shortest text or answer; 0 for any."""
    max_chars: int = 200_000
    """Longest text or answer."""
    max_repeated_lines: Annotated[float, Interval(ge=0, le=1)] = 0.5
    """Largest share of a text in lines that stand there more than twice; 1 for any."""
    min_compressed: Annotated[float, Interval(ge=0, le=1)] = 0.06
    """Smallest size of a text after zlib, as a share of its own; 0 for any."""
    exact_duplicates: bool = True
    """Drop records that differ from an earlier one in white space alone."""
    near_duplicates: Annotated[float, Interval(ge=0, le=1)] = 0.8
    """Drop records with this Jaccard similarity (shingles of 5 tokens) to an earlier one; 0 keeps them."""
    allow_license: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Keep only records under this licence (SPDX identifier); repeat for more. Default: any."""
    teacher_terms: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """TEACHER=TERMS, written into meta["teacher_terms"] of that teacher's records; repeat for more."""

    def __post_init__(self) -> None:
        if not self.files:
            raise ConfigError("no file given: name the files of records to clean")
        if self.min_chars > self.max_chars:
            raise ConfigError(f"--min-chars {self.min_chars}: must be at most --max-chars")
        for terms in self.teacher_terms:
            teacher, equals, _ = terms.partition("=")
            if not (teacher and equals):
                raise ConfigError(f"--teacher-terms {terms}: must be TEACHER=TERMS")


@dataclass(frozen=True)
class Drop:
    """Why something was put aside."""

    reason: str
    detail: str


@dataclass
class Summary:
    """What became of the records, and of the answers of instruct records."""

    num_read: int = 0
    num_kept: int = 0
    records: Counter[str] = field(default_factory=Counter)
    """Dropped records by reason."""
    answers: Counter[str] = field(default_factory=Counter)
    """Removed answers by reason, those of dropped records too."""
    languages: Counter[str] = field(default_factory=Counter)
    """Kept records by language."""
    licenses: Counter[str] = field(default_factory=Counter)
    """Kept records by licence."""
    unjudged: Counter[str] = field(default_factory=Counter)
    """Kept records that a check had no means to judge."""
    benchmarks: Counter[str] = field(default_factory=Counter)
    """Tasks of the benchmarks, and those too short to be found."""

    def table(self) -> str:
        """The counts as lines of text; every record that was read is in one of them."""
        lines = [f"{'':28} {'records':>9} {'answers':>9}", f"{'read':28} {self.num_read:9,}"]
        for reason in sorted(
            self.records.keys() | self.answers.keys(), key=lambda key: (-self.records[key] - self.answers[key], key)
        ):
            answers = f"{self.answers[reason]:9,}" if self.answers[reason] else ""
            lines.append(f"{'  ' + reason:28} {self.records[reason]:9,} {answers:>9}".rstrip())
        lines.append(f"{'kept':28} {self.num_kept:9,}")
        for name in ("languages", "licenses", "unjudged", "benchmarks"):
            counts = getattr(self, name)
            if counts:
                parts = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
                lines.append(
                    f"{name.replace('unjudged', 'not judged')}: "
                    + ", ".join(f"{key or 'not given'} {count:,}" for key, count in parts)
                )
        return "\n".join(lines)


class Cleaner:
    """Holds what has been seen, and judges batch after batch; dropped things go to `reject`ed lines."""

    def __init__(self, options: Options, rejects: TextIO) -> None:
        self.options = options
        self.summary = Summary()
        self._rejects = rejects
        self._benchmarks = Benchmarks(options.benchmarks)
        if options.benchmarks:
            self.summary.benchmarks["tasks"] = self._benchmarks.num_tasks
        if self._benchmarks.num_short:
            self.summary.benchmarks["too short to be found"] = self._benchmarks.num_short
        self._exact: dict[bytes, str] = {}
        self._ids: set[str] = set()
        self._near = NearDuplicates(options.near_duplicates) if options.near_duplicates else None
        self._terms = dict(terms.split("=", 1) for terms in options.teacher_terms)
        self._pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))  # the threads wait; the programs are processes

    def clean(self, records: Iterable[Record]) -> Iterator[Record]:
        """The records to keep, in their order."""
        with self._pool:
            records = iter(records)
            while batch := list(itertools.islice(records, _BATCH)):
                self.summary.num_read += len(batch)
                yield from self._batch(batch)

    def _batch(self, batch: list[Record]) -> Iterator[Record]:
        left = [record for record in map(self._by_itself, batch) if record is not None]
        if self.options.run:
            left = self._that_run(left)
        left = [record for record in left if not self._drop(record, self._contaminated(record))]
        # Signatures of the batch at once, but each is compared with what was kept before it.
        rows = signatures([_whole(record) for record in left]) if self._near else itertools.repeat(None)
        for record, row in zip(left, rows, strict=False):
            duplicate = self._exact_duplicate(record)
            if duplicate is None and self._near and (earlier := self._near.add(record.id, row)):
                duplicate = Drop("near duplicate", f"{earlier[1]:.0%} like {earlier[0]}")
            if not self._drop(record, duplicate):
                self._keep(record)
                yield self._with_terms(record)

    def _by_itself(self, record: Record) -> Record | None:
        """The record without its bad answers, or None; what is dropped is written down."""
        allowed = self.options.allow_license
        if allowed and record.license not in allowed:
            self._drop(record, Drop("licence", record.license or "not given"))
            return None
        if self.options.secrets and (meta := masked(record.meta)) != record.meta:
            record = replace(record, meta=meta)  # nobody trains on it, so the rest may stay
        if record.kind == "text":
            return None if self._drop(record, self._bad_text(record.text, [(record.language, record.text)])) else record
        if self._drop(record, self._secret(record.prompt)):
            return None
        return self._answers(record, [self._bad_answer(record, answer) for answer in record.responses])

    def _bad_answer(self, record: Record, answer: Response) -> Drop | None:
        if self.options.finished and (detail := unfinished(answer)):
            return Drop("not finished", detail)
        return self._bad_text(answer.text, code_blocks(answer.text, record.language))

    def _bad_text(self, text: str, blocks: list[tuple[str, str]]) -> Drop | None:
        options = self.options
        if detail := wrong_length(text, options.min_chars, options.max_chars):
            return Drop("length", detail)
        if detail := repetition(text, options.max_repeated_lines, options.min_compressed):
            return Drop("repetition", detail)
        if drop := self._secret(text):
            return drop
        for language, code in blocks if options.parse else ():
            if not is_session(code) and (error := parse_error(code, language)):
                return Drop("does not parse", error)
        return None

    def _secret(self, text: str) -> Drop | None:
        detail = secret(text) if self.options.secrets else ""
        return Drop("secret", detail) if detail else None

    def _that_run(self, records: list[Record]) -> list[Record]:
        """Run all programs of a batch on all cores; the records whose programs did well, in order."""
        programs = [_programs(record) for record in records]
        drops = iter(list(self._pool.map(self._run, itertools.chain.from_iterable(programs))))
        left = []
        for record, own in zip(records, programs, strict=True):
            own_drops = list(itertools.islice(drops, len(own)))
            if record.kind == "instruct" and own:
                kept = self._answers(record, own_drops)
                left += [kept] if kept else []
            elif not any(self._drop(record, drop) for drop in own_drops):
                left.append(record)
        return left

    def _run(self, program: tuple[str, str] | None) -> Drop | None:
        if program is None:
            return None
        code, tests = program
        if not code:
            return Drop("fails", "no code to test")
        seconds = self.options.run_seconds
        limits = Limits(
            wall_seconds=4 * seconds, cpu_seconds=math.ceil(seconds), memory_bytes=self.options.run_memory_mb * 2**20
        )
        try:
            result = run_python(f"{code}\n\n{tests}", limits=limits)
        except SandboxError as error:
            raise UserError(f"--run: {error} (does --run-memory-mb {self.options.run_memory_mb} fit?)") from None
        if result.reason == "ok":
            return None
        last_line = _ADDRESS.sub("0x...", result.stderr.strip().rpartition("\n")[2])[:200]
        detail = last_line or f"exit code {result.returncode}"
        if result.reason != "error":
            return Drop("fails", f"limit met: {result.reason}")
        return Drop("needs a package" if detail.startswith("ModuleNotFoundError") else "fails", detail)

    def _answers(self, record: Record, drops: list[Drop | None]) -> Record | None:
        """The record with the answers that have no Drop; without any left it is dropped for the first one's reason."""
        kept = tuple(answer for answer, drop in zip(record.responses, drops, strict=True) if drop is None)
        bad = [(answer, drop) for answer, drop in zip(record.responses, drops, strict=True) if drop is not None]
        self.summary.answers.update(drop.reason for _, drop in bad)
        if not kept:
            self._drop(record, bad[0][1])
            return None
        for answer, drop in bad:
            self._reject(replace(record, responses=(answer,)), drop)
        return replace(record, responses=kept) if bad else record

    def _contaminated(self, record: Record) -> Drop | None:
        if not self._benchmarks:
            return None
        code = record.text or "\n".join(code for answer in record.responses for code in _code(answer.text))
        detail = self._benchmarks.find(_whole(record), code)
        return Drop("in a benchmark", detail) if detail else None

    def _exact_duplicate(self, record: Record) -> Drop | None:
        if not self.options.exact_duplicates:
            return None
        if record.id in self._ids:
            return Drop("exact duplicate", f"of {record.id}, by its id")
        earlier = self._exact.get(exact_key(_whole(record)))
        return Drop("exact duplicate", f"of {earlier}") if earlier else None

    def _drop(self, record: Record, drop: Drop | None) -> bool:
        if drop is None:
            return False
        self.summary.records[drop.reason] += 1
        self._reject(record, drop)
        return True

    def _reject(self, record: Record, drop: Drop) -> None:
        line = {"reason": drop.reason, "detail": drop.detail, "record": record.to_values()}
        line = masked(line) if self.options.secrets else line
        self._rejects.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _keep(self, record: Record) -> None:
        """Count a record, and remember it for those that follow."""
        self.summary.num_kept += 1
        self.summary.languages[record.language] += 1
        self.summary.licenses[record.license] += 1
        self.summary.unjudged.update(self._unjudged(record))
        if self.options.exact_duplicates:
            self._exact[exact_key(_whole(record))] = record.id
            self._ids.add(record.id)

    def _unjudged(self, record: Record) -> set[str]:
        """What no check could say of a record, each once."""
        blocks = [(record.language, record.text)] if record.text else []
        for answer in record.responses:
            blocks += code_blocks(answer.text, record.language)
        gaps = set()
        if self.options.parse:
            languages = {language for language, code in blocks if not is_session(code)}
            gaps = {f"{name or 'unknown'} not parsed" for name in languages if not has_parser(name)}
        is_asked = record.kind == "instruct" or "tests" in record.meta
        if self.options.run and is_asked and not any(_programs(record)):
            gaps.add("no Python to run")
        return gaps

    def _with_terms(self, record: Record) -> Record:
        terms = {
            answer.teacher: self._terms[answer.teacher] for answer in record.responses if answer.teacher in self._terms
        }
        if not terms:
            return record
        earlier = record.meta.get("teacher_terms")
        terms = (earlier if isinstance(earlier, dict) else {}) | terms
        return replace(record, meta=record.meta | {"teacher_terms": terms})


def _whole(record: Record) -> str:
    return record.text or "\n".join((record.prompt, *(answer.text for answer in record.responses)))


def _code(answer: str) -> list[str]:
    """The code of an answer, block by block; all of it where there are no fences."""
    return [code for _, code in code_blocks(answer)] or [answer]


def _programs(record: Record) -> list[tuple[str, str] | None]:
    """(code, tests) to run: of each answer, or of a text that has tests; None where there is nothing to run."""
    tests = record.meta.get("tests", "")
    if not isinstance(tests, str):
        raise DataError(f'record {record.id}: meta["tests"] must be Python source: a string')
    if record.language not in ("", "python"):
        return []
    if record.kind == "text":
        return [(record.text, tests)] if tests else []
    programs: list[tuple[str, str] | None] = []
    for answer in record.responses:
        blocks = code_blocks(answer.text, record.language)
        code = "\n".join(code for name, code in blocks if name == "python" and not is_session(code))
        programs.append((code, tests) if code or tests else None)
    return programs


def _write(options: Options, files: list[Path], out: Path, rejects: Path) -> Summary:
    """Clean the files. Both outputs are complete on disk before either takes its name, so they belong together."""
    with whole_file(rejects) as rejected:
        cleaner = Cleaner(options, rejected)

        def kept() -> Iterator[Record]:
            progress = Progress("cleaning", "records")
            for record in cleaner.clean(itertools.chain.from_iterable(map(read_records, files))):
                progress(cleaner.summary.num_read, f"{cleaner.summary.num_kept:,} kept")
                yield record
            rejected.flush()
            os.fsync(rejected.fileno())  # before the kept ones take their name

        write_records(out, kept())
    return cleaner.summary


def main(argv: list[str]) -> int:
    """`foundry clean`: write what is kept and what is not, and print how many for which reason."""
    options = parse(Options, argv, "foundry clean")
    beside = options.out.parent / f"{options.out.stem}.rejects.jsonl"
    out, rejects = (Path(os.path.realpath(path)) for path in (options.out, options.rejects or beside))
    if out == rejects:
        raise ConfigError(f"--rejects {rejects}: is the same file as --out: name another")
    files = [path for path in options.files if Path(os.path.realpath(path)) not in (out, rejects)]
    if not files:
        raise ConfigError(f"{options.files[0]}: is to be read and written: choose another --out")
    for path in options.files:
        if path not in files:
            print(f"left out {path}: it is written by this command", file=sys.stderr)
    print(_write(options, files, out, rejects).table())
    print(f"wrote {out} and {rejects}")
    return 0
