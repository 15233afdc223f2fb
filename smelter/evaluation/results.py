"""What an evaluation found, as files and on the terminal.

`results.json` has the figures. Beside it lies a file with a line for each case (`results_cases.jsonl`): what was
written and how it was judged, which is what two evaluations are compared by.
"""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from smelter.base import DataError, percent, table, write_json, write_text
from smelter.evaluation.intervals import wilson

Results = dict[str, Any]
Case = dict[str, Any]
KINDS = {"single_line": "a line", "multi_line": "2 to 8 lines", "random_span": "a span of characters"}


def cases_path(results: Path) -> Path:
    """Where the cases of a result file lie."""
    return results.with_name(f"{results.stem}_cases.jsonl")


def write_results(path: Path, results: Results, cases: Iterable[Case]) -> None:
    """The figures, and the cases beside them."""
    write_text(
        cases_path(path), "".join(json.dumps(case, ensure_ascii=False, allow_nan=False) + "\n" for case in cases)
    )
    write_json(path, results)


def read_results(path: Path) -> tuple[Results, list[Case]]:
    """Figures and cases, no cases where their file is missing. Raises DataError that names the file and the fix."""
    results = _parsed(path, _text(path))
    if not isinstance(results, dict) or "val_bpb" not in results:
        raise DataError(f"{path}: not what `smelter evaluate` writes: give a run, a checkpoint or a results.json")
    beside = cases_path(path)
    if not beside.is_file():
        return results, []
    # Not splitlines(): code may hold any of Unicode's line separators.
    return results, [_parsed(beside, line) for line in _text(beside).split("\n") if line]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}: `smelter evaluate RUN` writes it") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: damaged ({error}): evaluate again") from None


def _parsed(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{path}: damaged ({error}): evaluate again") from None


def interval(share: float, cases: int) -> str:
    """Wilson's 95% interval of a share, as text."""
    low, high = wilson(share, cases)
    return f"{low:.1%} to {high:.1%}"


def summary(results: Results) -> str:
    """The figures for a terminal: held-out text, gaps filled in, problems solved."""
    rows = [
        ("bits per byte", f"{results['val_bpb']:.3f}  (stride {results['stride']} of {results['context']})"),
        ("  gzip -9, each file", f"{results['gzip_bpb']:.3f}"),
        ("  xz -9, each file", f"{results['xz_bpb']:.3f}"),
        ("  xz -9, all joined", f"{results['xz_joined_bpb']:.3f}"),
        ("held-out", f"{results['val_files']:,} files, {results['val_bytes']:,} bytes"),
    ]
    if results["trits"]:
        totals = Counter[str]()
        for counts in results["trits"].values():
            totals.update(counts)
        everything = sum(totals.values())
        names = (("-1", "-1"), ("0", "0"), ("1", "+1"))
        shares = ", ".join(f"{totals[trit] / everything:.1%} {name}" for trit, name in names)
        rows.append(("weights", f"{everything:,} ternary: {shares}"))
    return "\n\n".join([table(rows), *map(table, tables(results).values())])


def tables(results: Results) -> dict[str, list[list[str]]]:
    """{title: rows} of what has parts: languages, kinds of gaps, sets of problems. The first row is the head.

    A row that tells more about the one above it begins with two spaces. Results of before there were such parts
    have no tables.
    """
    parts = {
        "Bits per byte by language": _languages(results),
        "Gaps filled in": _gaps(results),
        "Problems solved": _solved(results),
    }
    return {title: rows for title, rows in parts.items() if len(rows) > 1}


def _languages(results: Results) -> list[list[str]]:
    rows = [["language", "bits per byte", "files", "bytes"]]
    for language, found in results.get("bpb_by_language", {}).items():
        rows.append([language, f"{found['bpb']:.3f}", f"{found['num_files']:,}", f"{found['num_bytes']:,}"])
    return rows


def _gaps(results: Results) -> list[list[str]]:
    rows = [["filled in", "exactly", "95% interval", "edit similarity", "gaps"]]
    for kind, found in results.get("infill", {}).items():
        share, cases = found["exact_match"], found["cases"]
        similarity = f"{found['edit_similarity']:.3f}"
        rows.append([KINDS[kind], percent(share), interval(share, cases), similarity, f"{cases:,}"])
        if kind == "single_line":
            for name, key in (("prefix before suffix", "psm"), ("untrained model", "untrained")):
                rows.append([f"  {name}", percent(results[f"infill_exact_match_{key}"]), "", "", ""])
    return rows


def _solved(results: Results) -> list[list[str]]:
    sets = {**results.get("pass_at_k", {}), **results.get("infill_files", {})}
    ks = sorted({int(key[5:]) for found in sets.values() for key in found if key.startswith("pass@")})
    rows = [["solved", *(f"pass@{k}" for k in ks), "exactly", "edit similarity", "problems"]]
    for name, found in sets.items():
        exact = percent(found["exact_match"]) if "exact_match" in found else ""
        similar = f"{found['edit_similarity']:.3f}" if "edit_similarity" in found else ""
        passed = [percent(found[f"pass@{k}"]) if f"pass@{k}" in found else "" for k in ks]
        count = f"{found['num_problems']:,}" + (f" x {n}" if (n := found["num_completions"]) > 1 else "")
        rows.append([name, *passed, exact, similar, count])
        for level, part in found.get("by_difficulty", {}).items():
            passed = [percent(part[f"pass@{k}"]) if f"pass@{k}" in part else "" for k in ks]
            rows.append([f"  difficulty {level}", *passed, "", "", f"{part['num_problems']:,}"])
    return rows
