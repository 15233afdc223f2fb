"""Two evaluations beside each other: every figure, the difference, and how sure it is.

Where both were asked the same cases (the choice is a pure function of documents and seed, so the same shards and seed
give the same), they are compared case by case; otherwise as independent samples, which needs larger differences. The
intervals are those of `smelter.evaluation.intervals`. A difference whose interval leaves out 0 is marked with a star.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import TypeVar

from smelter.base import table
from smelter.evaluation.intervals import bootstrap, paired_share_difference, share_difference
from smelter.evaluation.pass_at_k import estimate
from smelter.evaluation.tables import KINDS, PLACES
from smelter.run import Case, DocumentCase, GapCase, ProblemCase, Results, read_cases, read_results

C = TypeVar("C", DocumentCase, GapCase, ProblemCase)


@dataclass(frozen=True)
class Measured:
    """Figures and cases of one evaluation, under the name it was asked for by."""

    name: str
    results: Results
    cases: list[Case]

    @classmethod
    def read(cls, name: str, file: Path) -> "Measured":
        """From a result file and the cases beside it. Raises DataError."""
        return cls(name, read_results(file), read_cases(file))

    def of(self, measure: str, kind: type[C]) -> dict[str, C]:
        """{name: case} of a measure."""
        return {case.case: case for case in self.cases if isinstance(case, kind) and case.measure == measure}


@dataclass(frozen=True)
class Row:
    """A figure of both, the 95% interval of second - first where there is one, and how it was found."""

    name: str
    first: float
    second: float
    interval: tuple[float, float] | None
    basis: str
    is_share: bool

    @property
    def is_certain(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]

    def cells(self) -> list[str]:
        """As text."""
        change = self.second - self.first
        if self.is_share:
            values = [f"{self.first:.1%}", f"{self.second:.1%}", f"{100 * change:+.1f}"]
            limits = [f"{100 * limit:+.1f}" for limit in self.interval or ()]
        else:
            values = [f"{self.first:.3f}", f"{self.second:.3f}", f"{change:+.3f}"]
            limits = [f"{limit:+.3f}" for limit in self.interval or ()]
        star = " *" if self.is_certain else ""
        return [self.name, *values, " to ".join(limits) + star if limits else "-", self.basis]


def _pairs(first: Measured, second: Measured, measure: str, kind: type[C]) -> list[tuple[C, C]]:
    """The cases of a measure side by side, none unless both have exactly the same."""
    a, b = first.of(measure, kind), second.of(measure, kind)
    return [(a[name], b[name]) for name in a] if a.keys() == b.keys() else []


def _bits_row(name: str, first: float, second: float, pairs: list[tuple[DocumentCase, DocumentCase]]) -> Row:
    limits = None
    if len(pairs) > 1:
        limits = bootstrap([(b.nats - a.nats) / log(2) for a, b in pairs], [a.num_bytes for a, _ in pairs])
    basis = f"{len(pairs):,} files, paired" if pairs else "other files"
    return Row(name, first, second, limits, basis, is_share=False)


def _bits(first: Measured, second: Measured) -> Iterator[Row]:
    pairs = _pairs(first, second, "bits_per_byte", DocumentCase)
    yield _bits_row("bits per byte", first.results.val_bpb, second.results.val_bpb, pairs)
    ones, others = first.results.bpb_by_language, second.results.bpb_by_language
    languages = [language for language in ones if language in others]
    for language in languages if len(languages) > 1 else ():
        chosen = [(a, b) for a, b in pairs if a.language == language]
        yield _bits_row(f"  {language}", ones[language].bpb, others[language].bpb, chosen)


def _gaps(first: Measured, second: Measured) -> Iterator[Row]:
    for kind, title in KINDS.items():
        a, b = (side.results.infill.get(kind) for side in (first, second))
        if a is None or b is None:
            continue
        pairs = _pairs(first, second, f"infill/{kind}", GapCase)
        if pairs:
            basis = f"{len(pairs):,} gaps, paired"
            shares = paired_share_difference([x.exact for x, _ in pairs], [y.exact for _, y in pairs])
            similar = bootstrap([y.edit_similarity - x.edit_similarity for x, y in pairs])
        else:
            basis = f"{a.cases:,} and {b.cases:,} gaps"
            shares, similar = share_difference(a.exact_match, a.cases, b.exact_match, b.cases), None
        yield Row(f"{title}, exactly", a.exact_match, b.exact_match, shares, basis, is_share=True)
        yield Row("  edit similarity", a.edit_similarity, b.edit_similarity, similar, basis, is_share=False)


def _solved(first: Measured, second: Measured) -> Iterator[Row]:
    for measure, ones, others in (
        ("pass_at_k", first.results.pass_at_k, second.results.pass_at_k),
        ("infill_files", first.results.infill_files, second.results.infill_files),
    ):
        for name in [name for name in ones if name in others]:
            a, b = ones[name], others[name]
            pairs = _pairs(first, second, f"{measure}/{name}", ProblemCase)
            basis = f"{len(pairs):,} problems, paired" if pairs else "other problems"
            is_single = a.num_completions == b.num_completions == 1
            for k in [k for k in a.pass_at if k in b.pass_at]:
                limits = None
                if pairs and is_single:
                    limits = paired_share_difference(
                        [x.num_passed > 0 for x, _ in pairs], [y.num_passed > 0 for _, y in pairs]
                    )
                elif pairs:
                    limits = bootstrap([estimate(y, k) - estimate(x, k) for x, y in pairs])
                elif is_single:
                    limits = share_difference(a.pass_at[k], a.num_problems, b.pass_at[k], b.num_problems)
                yield Row(f"{name}, pass@{k}", a.pass_at[k], b.pass_at[k], limits, basis, is_share=True)


def _at_cursor(first: Measured, second: Measured) -> Iterator[Row]:
    ones, others = (side.results.editor.rows if side.results.editor else {} for side in (first, second))
    for name in [name for name in ones if name in others]:
        a, b = ones[name], others[name]
        basis = f"{a.typed.lines:,} and {b.typed.lines:,} lines"
        yield Row(f"{name}: keys saved", a.typed.saved / 100, b.typed.saved / 100, None, basis, is_share=True)
        for kind, title in PLACES.items():
            if kind in a.places and kind in b.places:
                x, y = a.places[kind], b.places[kind]
                limits = share_difference(x.word, x.places, y.word, y.places)
                basis = f"{x.places:,} and {y.places:,} places"
                yield Row(f"  word right {title}", x.word, y.word, limits, basis, is_share=True)


def rows(first: Measured, second: Measured) -> list[Row]:
    """Every figure that both have."""
    return [*_bits(first, second), *_gaps(first, second), *_solved(first, second), *_at_cursor(first, second)]


def comparison(first: Measured, second: Measured) -> str:
    """The table for a terminal, with what A and B are above it."""
    a, b = first.results, second.results
    head = [
        (letter, f"{side.name}, step {side.results.step}, {side.results.num_params:,} parameters")
        for letter, side in (("A", first), ("B", second))
    ]
    lines = [["", "A", "B", "B - A", "95% interval", "of"], *(row.cells() for row in rows(first, second))]
    notes = [
        f"{name}: {one} in A, {other} in B"
        for name, one, other in (("stride", a.stride, b.stride), ("context", a.context, b.context))
        if one != other
    ]
    parts = [table(head), table(lines), "* the interval leaves out 0; differences of shares are percentage points"]
    return "\n\n".join(parts + notes)
