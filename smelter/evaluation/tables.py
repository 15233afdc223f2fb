"""What an evaluation found, for people: a text for the terminal, and the tables that the report has, too."""

from smelter.base import percent, table
from smelter.evaluation.intervals import wilson
from smelter.run import Editor, Results

KINDS = {"single_line": "a line", "multi_line": "2 to 8 lines", "random_span": "a span of characters"}
PLACES = {"line_start": "at a line's start", "word_start": "at a word's start", "in_word": "inside a word"}
EDITOR = "At the cursor"
EDITOR_NOTE = (
    "At the cursor: keystrokes saved, and how often first character / word / line / line and end are right, in %"
)
TRITS = {-1: "-1", 0: "0", 1: "+1"}


def summary(results: Results) -> str:
    """The figures for a terminal: held-out text, gaps filled in, problems solved."""
    rows = [
        ("bits per byte", f"{results.val_bpb:.3f}  (stride {results.stride} of {results.context})"),
        ("  gzip -9, each file", f"{results.gzip_bpb:.3f}"),
        ("  xz -9, each file", f"{results.xz_bpb:.3f}"),
        ("  xz -9, all joined", f"{results.xz_joined_bpb:.3f}"),
        ("held-out", f"{results.val_files:,} files, {results.val_bytes:,} bytes"),
    ]
    if results.trits:
        totals = {trit: sum(counts[trit] for counts in results.trits.values()) for trit in TRITS}
        everything = sum(totals.values())
        shares = ", ".join(f"{totals[trit] / everything:.1%} {name}" for trit, name in TRITS.items())
        rows.append(("weights", f"{everything:,} ternary: {shares}"))
    notes = [EDITOR_NOTE] if results.editor else []
    return "\n\n".join([table(rows), *map(table, tables(results).values()), *notes])


def tables(results: Results) -> dict[str, list[list[str]]]:
    """{title: rows} of what has parts: languages, kinds of gaps, sets of problems. The first row is the head.

    A row that tells more about the one above it begins with two spaces. What was not asked for has no table.
    """
    parts = {
        "Bits per byte by language": _languages(results),
        "Gaps filled in": _gaps(results),
        "Problems solved": _solved(results),
        EDITOR: editor_table(results.editor) if results.editor else [],
    }
    return {title: rows for title, rows in parts.items() if len(rows) > 1}


def _languages(results: Results) -> list[list[str]]:
    rows = [["language", "bits per byte", "files", "bytes"]]
    for language, bits in results.bpb_by_language.items():
        rows.append([language, f"{bits.bpb:.3f}", f"{bits.num_files:,}", f"{bits.num_bytes:,}"])
    return rows


def _gaps(results: Results) -> list[list[str]]:
    rows = [["filled in", "exactly", "95% interval", "edit similarity", "gaps"]]
    for kind, title in KINDS.items():
        if kind not in results.infill:
            continue
        gaps = results.infill[kind]
        limits = " to ".join(map(percent, wilson(gaps.exact_match, gaps.cases)))
        rows.append([title, percent(gaps.exact_match), limits, f"{gaps.edit_similarity:.3f}", f"{gaps.cases:,}"])
        if kind == "single_line":
            rows.append(["  prefix before suffix", percent(results.infill_exact_match_psm), "", "", ""])
            rows.append(["  untrained model", percent(results.infill_exact_match_untrained), "", "", ""])
    return rows


def _solved(results: Results) -> list[list[str]]:
    sets = {**results.pass_at_k, **results.infill_files}
    ks = sorted({k for solved in sets.values() for k in solved.pass_at})
    rows = [["solved", *(f"pass@{k}" for k in ks), "exactly", "edit similarity", "problems"]]

    def passed(pass_at: dict[int, float]) -> list[str]:
        return [percent(pass_at[k]) if k in pass_at else "" for k in ks]

    for name, solved in sets.items():
        exact = "" if solved.exact_match is None else percent(solved.exact_match)
        similar = "" if solved.edit_similarity is None else f"{solved.edit_similarity:.3f}"
        times = f" x {solved.num_completions}" if solved.num_completions > 1 else ""
        rows.append([name, *passed(solved.pass_at), exact, similar, f"{solved.num_problems:,}{times}"])
        for difficulty, level in solved.by_difficulty.items():
            rows.append([f"  difficulty {difficulty}", *passed(level.pass_at), "", "", f"{level.num_problems:,}"])
    return rows


def editor_table(editor: Editor) -> list[list[str]]:
    """A row for each who suggests; `EDITOR_NOTE` explains the cells."""
    rows = [["suggested by", "saved per 100", *PLACES.values(), "median ms", "95% ms", "of"]]
    for name, row in editor.rows.items():
        cells, most = [], 0
        for kind in PLACES:
            right = row.places.get(kind)
            shares = [] if right is None else [right.first_character, right.word, right.line, right.end]
            cells.append(" / ".join(f"{100 * share:.0f}" for share in shares))
            most = max(most, 0 if right is None else right.places)
        times = ["", ""] if row.latency is None else [f"{row.latency.median_ms:.0f}", f"{row.latency.p95_ms:.0f}"]
        asked = f"{most:,} places, {row.typed.lines:,} lines" if most else f"{row.typed.lines:,} lines"
        rows.append([name, f"{row.typed.saved:.1f}", *cells, *times, asked])
    return rows
