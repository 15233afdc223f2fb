"""Two evaluations beside each other: every figure, the difference, and how sure it is.

Where both were asked the same cases (the choice is a pure function of documents and seed, so the same shards and seed
give the same), they are compared case by case; otherwise as independent samples, which needs larger differences. The
intervals are those of `smelter.evaluation.intervals`. A difference whose interval leaves out 0 is marked with a star.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import log

from smelter.base import table
from smelter.evaluation.intervals import bootstrap, paired_share_difference, share_difference
from smelter.evaluation.pass_at_k import pass_at_k
from smelter.evaluation.results import KINDS, Case, Results


@dataclass(frozen=True)
class Measured:
    """Figures and cases of one evaluation, under the name it was asked for by."""

    name: str
    results: Results
    cases: list[Case]

    def of(self, measure: str) -> dict[str, Case]:
        """{case: row} of a measure."""
        return {case["case"]: case for case in self.cases if case["measure"] == measure}


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


def _pairs(first: Measured, second: Measured, measure: str) -> list[tuple[Case, Case]]:
    """The rows of a measure side by side, none unless both have exactly the same cases."""
    a, b = first.of(measure), second.of(measure)
    return [(a[case], b[case]) for case in a] if a.keys() == b.keys() else []


def _bits(first: Measured, second: Measured) -> Iterator[Row]:
    pairs = _pairs(first, second, "bits_per_byte")
    ones, others = (side.results.get("bpb_by_language", {}) for side in (first, second))
    languages = [language for language in ones if language in others]
    for language in (None, *(languages if len(languages) > 1 else ())):
        chosen = [(x, y) for x, y in pairs if language in (None, x["language"])]
        if language is None:
            name, a, b = "bits per byte", first.results["val_bpb"], second.results["val_bpb"]
        else:
            name = f"  {language}"
            a, b = ones[language]["bpb"], others[language]["bpb"]
        limits = None
        if len(chosen) > 1:
            changes = [(y["nats"] - x["nats"]) / log(2) for x, y in chosen]
            limits = bootstrap(changes, [x["num_bytes"] for x, _ in chosen])
        basis = f"{len(chosen):,} files, paired" if chosen else "other files"
        yield Row(name, a, b, limits, basis, is_share=False)


def _gaps(first: Measured, second: Measured) -> Iterator[Row]:
    for kind, title in KINDS.items():
        a, b = (side.results.get("infill", {}).get(kind) for side in (first, second))
        if a and b:
            pairs = _pairs(first, second, f"infill/{kind}")
            if pairs:
                basis = f"{len(pairs):,} gaps, paired"
                shares = paired_share_difference([x["exact"] for x, _ in pairs], [y["exact"] for _, y in pairs])
                similar = bootstrap([y["edit_similarity"] - x["edit_similarity"] for x, y in pairs])
            else:
                basis = f"{a['cases']:,} and {b['cases']:,} gaps"
                shares, similar = share_difference(a["exact_match"], a["cases"], b["exact_match"], b["cases"]), None
            yield Row(f"{title}, exactly", a["exact_match"], b["exact_match"], shares, basis, is_share=True)
            yield Row("  edit similarity", a["edit_similarity"], b["edit_similarity"], similar, basis, is_share=False)


def _solved(first: Measured, second: Measured) -> Iterator[Row]:
    for key in ("pass_at_k", "infill_files"):
        ones, others = first.results.get(key, {}), second.results.get(key, {})
        for name in ones:
            pairs = _pairs(first, second, f"{key}/{name}")
            for figure in [x for x in ones[name] if x.startswith("pass@") and x in others.get(name, {})]:
                a, b = ones[name], others[name]
                single = a["num_completions"] == b["num_completions"] == 1
                if pairs and single:
                    passed = [[bool(row["num_passed"]) for row in side] for side in zip(*pairs, strict=True)]
                    limits: tuple[float, float] | None = paired_share_difference(*passed)
                elif pairs:
                    limits = bootstrap([_estimate(y, figure) - _estimate(x, figure) for x, y in pairs])
                else:
                    counts = (a[figure], a["num_problems"], b[figure], b["num_problems"])
                    limits = share_difference(*counts) if single else None
                basis = f"{len(pairs):,} problems, paired" if pairs else "other problems"
                yield Row(f"{name}, {figure}", a[figure], b[figure], limits, basis, is_share=True)


def _estimate(row: Case, figure: str) -> float:
    return pass_at_k(row["num_completions"], row["num_passed"], int(figure.removeprefix("pass@")))


def rows(first: Measured, second: Measured) -> list[Row]:
    """Every figure that both have."""
    return [*_bits(first, second), *_gaps(first, second), *_solved(first, second)]


def comparison(first: Measured, second: Measured) -> str:
    """The table for a terminal, with what A and B are above it."""
    head = [
        (letter, f"{side.name}, step {side.results.get('step')}, {side.results.get('num_params', 0):,} parameters")
        for letter, side in (("A", first), ("B", second))
    ]
    lines = [["", "A", "B", "B - A", "95% interval", "of"], *(row.cells() for row in rows(first, second))]
    notes = [
        f"{key}: {first.results.get(key)} in A, {second.results.get(key)} in B"
        for key in ("stride", "context")
        if first.results.get(key) != second.results.get(key)
    ]
    parts = [table(head), table(lines), "* the interval leaves out 0; differences of shares are percentage points"]
    return "\n\n".join(parts + notes)
