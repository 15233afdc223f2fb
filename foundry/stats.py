"""`foundry stats`: what a file of records holds, what was dropped, and how the teachers compare.

One pass and no record kept: only counts, sums and histograms, so a file of any size fits. With the rejects that
`foundry clean` wrote, shares and costs count what was paid for and dropped too: a cheap teacher whose answers fail is
not cheap. The page is one HTML file that makes no request; its plots are SVG and CSS drawn here, as in Smelter's
report.
"""

import json
import math
import os
import webbrowser
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import jinja2
import tyro

from foundry import __version__
from smelter.base import (
    ConfigError,
    DataError,
    Record,
    RecordError,
    parse,
    read_records,
    short_number,
    write_text,
)

MAX_BARS = 14
"""Bars of one plot; what is rarer is added up as the rest."""


@dataclass(frozen=True)
class Options:
    """Count what records hold: origin, languages, lengths, what was dropped, and teacher against teacher."""

    records: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Files of records."""
    rejects: Path | None = None
    """File of rejects that `foundry clean` wrote: records with the reason why they were dropped."""
    html: Path | None = None
    """Write a page with plots too."""
    open: bool = False
    """Show the page in the browser."""

    def __post_init__(self) -> None:
        if not self.records:
            raise ConfigError("no file of records: give one, such as data/clean.jsonl")
        if self.open and self.html is None:
            raise ConfigError("--open without --html: say where the page is to be written")


@dataclass
class TeacherStats:
    """One teacher's answers, kept and dropped."""

    num_kept: int = 0
    num_dropped: int = 0
    num_characters: int = 0
    num_output_tokens: int = 0
    cost: float = 0.0
    """US dollars, for dropped answers too."""
    finish: Counter[str] = field(default_factory=Counter)

    @property
    def num_answers(self) -> int:
        """Kept and dropped."""
        return self.num_kept + self.num_dropped

    @property
    def kept_share(self) -> float:
        """Share of the answers that were kept."""
        return self.num_kept / self.num_answers

    @property
    def mean_characters(self) -> float:
        """Mean length of an answer."""
        return self.num_characters / self.num_answers

    @property
    def cost_per_kept(self) -> float | None:
        """US dollars spent for each answer that was kept; None if none was."""
        return self.cost / self.num_kept if self.num_kept else None


@dataclass
class Stats:
    """Counts over kept and dropped records."""

    num_kept: int = 0
    num_dropped: int = 0
    num_bytes: int = 0
    """UTF-8 bytes of the kept records' texts, prompts and answers."""
    cost: float = 0.0
    """US dollars, for dropped records too."""
    kinds: Counter[str] = field(default_factory=Counter)
    origins: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    licenses: Counter[str] = field(default_factory=Counter)
    splits: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    lengths: dict[str, Counter[int]] = field(default_factory=dict)
    """For "documents", "prompts" and "answers": exponent n -> how many have 2**n to 2**(n+1) - 1 characters."""
    teachers: dict[str, TeacherStats] = field(default_factory=dict)

    @property
    def num_records(self) -> int:
        """Kept and dropped."""
        return self.num_kept + self.num_dropped

    @property
    def cost_per_kept(self) -> float | None:
        """US dollars spent for each record that was kept; None if none was."""
        return self.cost / self.num_kept if self.num_kept else None

    def add(self, record: Record) -> None:
        """Count a record that was kept."""
        self.num_kept += 1
        # The material of code-seeded prompts and the corpus count under the tree that they come from.
        self.kinds[str(record.meta.get("kind") or record.kind)] += 1
        self.origins[origin(record.source)] += 1
        self.languages[record.language or "unknown"] += 1
        self.licenses[record.license or "unknown"] += 1
        self.splits[record.split or "not decided"] += 1
        texts = [("documents", record.text)] if record.kind == "text" else [("prompts", record.prompt)]
        texts += [("answers", response.text) for response in record.responses]
        for name, text in texts:
            self.num_bytes += len(text.encode())
            self.lengths.setdefault(name, Counter())[max(1, len(text)).bit_length() - 1] += 1
        self._add_answers(record, is_kept=True)

    def add_reject(self, record: Record | None, reason: str) -> None:
        """Count a record that was dropped; None where the line held none that can be read."""
        self.num_dropped += 1
        self.reasons[reason] += 1
        if record is not None:
            self._add_answers(record, is_kept=False)

    def _add_answers(self, record: Record, *, is_kept: bool) -> None:
        for response in record.responses:
            teacher = self.teachers.setdefault(response.teacher, TeacherStats())
            teacher.num_kept += is_kept
            teacher.num_dropped += not is_kept
            teacher.num_characters += len(response.text)
            teacher.num_output_tokens += response.usage.get("output", 0)
            teacher.cost += response.cost
            teacher.finish[response.finish or "unknown"] += 1
            self.cost += response.cost

    def table(self) -> str:
        """All of it as lines of text."""
        lines = [f"records   {self.num_kept:>10,} kept, {self.num_bytes / 1e6:,.2f} MB"]
        if self.num_dropped:
            lines[0] += f"; {self.num_dropped:,} dropped ({self.num_kept / self.num_records:.1%} of all kept)"
        if self.cost:
            price = f", ${self.cost_per_kept:,.6f} for each kept record" if self.cost_per_kept is not None else ""
            lines.append(f"cost      ${self.cost:>9,.4f}{price}")
        groups = {"kind": self.kinds, "from": self.origins, "language": self.languages, "licence": self.licenses}
        groups |= {"split": self.splits, "dropped": self.reasons}
        for name, counts in groups.items():
            for i, (key, count) in enumerate(rarest_joined(counts).items()):
                share = count / counts.total()
                lines.append(f"{'' if i else name:9} {count:>10,} {share:>6.1%}  {printable(key)}")
        for name, counts_of in self.lengths.items():
            middle = median_bin(counts_of)
            lines.append(f"{name:9} {counts_of.total():>10,}         half have at least {2**middle:,} characters")
        if self.teachers:
            width = max(len(printable(name)) for name in [*self.teachers, "teacher"])
            lines.append(f"\n{'teacher':{width}} {'answers':>9} {'kept':>7} {'mean chars':>11} {'cost $':>10}  finish")
            for name, teacher in sorted(self.teachers.items()):
                finish = ", ".join(f"{count:,} {printable(word)}" for word, count in teacher.finish.most_common())
                lines.append(
                    f"{printable(name):{width}} {teacher.num_answers:>9,} {teacher.kept_share:>7.1%}"
                    f" {teacher.mean_characters:>11,.0f} {teacher.cost:>10,.4f}  {finish}"
                )
        return "\n".join(lines)


def printable(text: str) -> str:
    """Text from outside for the terminal: no line ends, and no codes that would move its cursor."""
    return "".join(character if character.isprintable() else "?" for character in text)


def origin(source: str) -> str:
    """The first part of a source: the tree of "stdlib/asyncio/tasks.py", the area of "builtin/testing/4"."""
    parts = source.split("/")
    if parts[0] == "builtin" and len(parts) > 1:
        return f"builtin: {parts[1]}"
    return parts[0].partition(":")[0] or "unknown"


def median_bin(counts: Mapping[int, int]) -> int:
    """The bin below which less than half of all lie."""
    left = sum(counts.values()) / 2
    for key in sorted(counts):
        left -= counts[key]
        if left <= 0:
            break
    return key


def rarest_joined(counts: Counter[str]) -> dict[str, int]:
    """The commonest, and all others as one; equals in the order of the alphabet."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    kept = dict(ordered[:MAX_BARS])
    if len(ordered) > MAX_BARS:
        kept[f"{len(ordered) - MAX_BARS} others"] = sum(count for _, count in ordered[MAX_BARS:])
    return kept


def read_rejects(path: Path) -> Iterator[tuple[Record | None, str]]:
    """(record, reason) of each line: a record's keys with "reason", or {"record": ..., "reason": ...}.

    What comes after a colon in a reason is a detail and left out. Raises DataError naming file and line.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                values = json.loads(line.decode())
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}:{number}: not JSON ({error}): give the rejects of foundry clean") from None
            if not isinstance(values, dict) or not isinstance(values.get("reason"), str):
                raise DataError(f'{path}:{number}: no "reason": give the rejects of foundry clean')
            reason = values["reason"].partition(":")[0].strip() or "unknown"
            content = values.get("record", {key: value for key, value in values.items() if key != "reason"})
            try:
                record = Record.from_values(content)
                record.check_provenance()
            except RecordError:  # a line may have been dropped for being no record; its reason counts all the same
                record = None
            yield record, reason


def gather(options: Options) -> Stats:
    """Count everything. Raises DataError for a damaged line and where there is no record.

    A record that is kept but has lost one of its answers stands in both files and counts as kept and as dropped.
    """
    stats = Stats()
    for path in options.records:
        for record in read_records(path):
            stats.add(record)
    if options.rejects:
        for rejected, reason in read_rejects(options.rejects):
            stats.add_reject(rejected, reason)
    if not stats.num_records:
        raise DataError(f"{', '.join(map(str, options.records))}: no records: choose a file that holds some")
    return stats


def bars(counts: Counter[str]) -> list[dict[str, Any]]:
    """Horizontal bars: label, count, share, and width in % of the longest."""
    joined = rarest_joined(counts)
    top, total = max(joined.values(), default=1), counts.total() or 1
    return [
        {"label": label, "count": count, "share": count / total, "width": round(100 * count / top, 2)}
        for label, count in joined.items()
    ]


def histogram(counts: Mapping[int, int]) -> dict[str, Any]:
    """Bins of powers of two as upright bars in a box of 100 x 100: (x, width, y, height, title), and ticks below."""
    low, high = min(counts), max(counts)
    width, top = 100 / (high - low + 1), max(counts.values())
    columns = [
        {
            "x": round(width * (n - low) + width * 0.06, 2),
            "width": round(width * 0.88, 2),
            "height": round(100 * counts.get(n, 0) / top, 2),
            "title": f"{2**n:,} to {2 ** (n + 1) - 1:,} characters: {counts.get(n, 0):,}",
        }
        for n in range(low, high + 1)
    ]
    every = math.ceil((high - low + 2) / 7)
    ticks = [(round(width * (n - low), 2), short_number(2**n)) for n in range(low, high + 2, every)]
    return {"columns": columns, "ticks": ticks, "top": top, "total": sum(counts.values())}


def dollars(value: float | None) -> str:
    """An amount to the digits that matter: $0, $12.40, $0.000512."""
    if value is None:
        return "none kept"
    return f"${value:,.2f}" if value >= 1 or value == 0 else f"${float(f'{value:.3g}'):f}".rstrip("0")


def render(stats: Stats, names: list[str]) -> str:
    """The page; every value is escaped, as sources and teachers come from outside."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("foundry"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"short": short_number, "dollars": dollars}
    finishes = sorted({word for teacher in stats.teachers.values() for word in teacher.finish})
    return environment.get_template("stats.html").render(
        stats=stats,
        names=names,
        version=__version__,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        plots={
            "Where the records come from": bars(stats.origins),
            "What was dropped, and why": bars(stats.reasons),
            "Kinds": bars(stats.kinds),
            "Languages": bars(stats.languages),
            "Licences": bars(stats.licenses),
            "Splits": bars(stats.splits),
        },
        lengths={name: histogram(counts) for name, counts in sorted(stats.lengths.items())},
        teachers=sorted(stats.teachers.items()),
        finishes=finishes,
        dearest=max((teacher.cost_per_kept or 0.0 for teacher in stats.teachers.values()), default=0.0),
    )


def main(argv: list[str]) -> int:
    """`foundry stats`."""
    options = parse(Options, argv, "foundry stats")
    stats = gather(options)
    print(stats.table())
    if options.html:
        # A file's name need not be UTF-8; the page is.
        names = [os.fsencode(path).decode(errors="replace") for path in options.records]
        write_text(options.html, render(stats, names))
        print(f"wrote {options.html} ({options.html.stat().st_size / 1024:,.0f} KiB)")
        if options.open:
            webbrowser.open(options.html.resolve().as_uri())
    return 0
