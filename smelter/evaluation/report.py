"""`smelter report RUN`: a run folder as one HTML file that needs nothing else.

The curves are drawn by `charts`; a small script adds the values under the pointer, and without it the page still shows
everything. A content security policy in the page forbids it any request.
"""

import json
import math
import tomllib
import webbrowser
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import tyro

from smelter import __version__
from smelter.base import ConfigError, DataError, parse, short_duration, short_number, write_text
from smelter.config import load_config
from smelter.evaluation.charts import Row, in_layer_order, make_charts
from smelter.evaluation.editor import HEALED
from smelter.evaluation.intervals import wilson
from smelter.evaluation.tables import EDITOR_NOTE, tables
from smelter.run import METRICS_FILE, RESULTS_FILE, SAMPLES_FILE, Editor, read_metrics, read_results


@dataclass(frozen=True)
class Options:
    """Write a run's curves, samples and results as one self-contained HTML page."""

    run: tyro.conf.Positional[Path]
    """Run folder: the one with metrics.jsonl in it."""
    out: Path | None = None
    """File to write; RUN/report.html if not given."""
    open: bool = False
    """Show it in the browser."""


@dataclass(frozen=True)
class Bar:
    """A horizontal bar; its width is in % of the longest."""

    label: str
    value: float
    width: float
    own: bool


def bars(values: dict[str, float | None], own: str) -> list[Bar]:
    """A bar for each value that is known; `own` is the label of the model's own."""
    known = {label: value for label, value in values.items() if value is not None}
    top = max(known.values(), default=0.0) or 1.0
    return [Bar(label, value, round(100 * value / top, 2), label == own) for label, value in known.items()]


@dataclass(frozen=True)
class TritShares:
    """Of a kind of layer: weights, shares of -1, 0 and +1, and bits of information per weight."""

    kind: str
    count: int
    shares: list[float]
    bits: float


def trit_shares(trits: dict[str, dict[int, int]]) -> list[TritShares]:
    """Of each kind of layer, and of all together; none without counts."""
    kinds = {kind: [trits[kind][trit] for trit in (-1, 0, 1)] for kind in in_layer_order(trits)}
    if kinds:
        kinds["all"] = [sum(counts) for counts in zip(*kinds.values(), strict=True)]
    rows = []
    for kind, counts in kinds.items():
        shares = [count / (sum(counts) or 1) for count in counts]
        bits = -sum(share * math.log2(share) for share in shares if share)
        rows.append(TritShares(kind, sum(counts), shares, bits))
    return rows


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises DataError naming the file."""
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}): write it again, or remove it") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: not a JSON object: write it again, or remove it")
    return value


def gather(run_dir: Path) -> dict[str, Any]:
    """Everything the page shows. Raises DataError where the folder is no run or a file in it is damaged."""
    if not (run_dir / METRICS_FILE).is_file():
        raise DataError(f"{run_dir / METRICS_FILE}: no such file: give a run folder, such as runs/quickstart")
    rows = read_metrics(run_dir / METRICS_FILE)
    samples = read_metrics(run_dir / SAMPLES_FILE) if (run_dir / SAMPLES_FILE).is_file() else []
    results = read_results(run_dir / RESULTS_FILE) if (run_dir / RESULTS_FILE).is_file() else None
    model, settings, problem = None, {}, ""
    try:
        model = load_config(run_dir / "config.toml").model
        settings = tomllib.loads((run_dir / "config.toml").read_text(encoding="utf-8"))
    except ConfigError as error:
        problem = str(error)
    latest: Row = {key: value for row in rows for key, value in row.items() if value is not None}
    bpb: dict[str, float | None] = {"this model": latest.get("val_bpb")}
    infill: dict[str, float | None] = {}
    num_params, tokens, seconds = model and model.num_params_estimate, None, None
    if results:
        bpb = {
            "this model": results.val_bpb,
            "xz, files joined": results.xz_joined_bpb,
            "xz": results.xz_bpb,
            "gzip": results.gzip_bpb,
        }
        infill = {
            "trained": results.infill_exact_match,
            "trained, prefix first": results.infill_exact_match_psm,
            "untrained": results.infill_exact_match_untrained,
        }
        num_params, tokens, seconds = results.num_params, results.train_tokens, results.train_seconds
    rows_at_cursor = results.editor.rows if results and results.editor else {}
    saved: dict[str, float | None] = {name: row.typed.saved for name, row in rows_at_cursor.items()}
    exact, cases = infill.get("trained"), results.infill_cases if results else 0
    export = run_dir / "export"
    charts = make_charts(rows)
    return {
        "name": run_dir.resolve().name,
        "version": __version__,
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "model": model,
        "settings": settings,
        "config_problem": problem,
        "run": run_dir,
        "latest": latest,
        "bpb": bars(bpb, "this model"),
        "num_params": num_params,
        "tokens": tokens or latest.get("tokens"),
        "seconds": seconds or latest.get("elapsed_seconds"),
        "infill": bars(infill, "trained"),
        "saved": bars(saved, HEALED),
        "editor_note": EDITOR_NOTE,
        "exact": exact,
        "cases": cases,
        "interval": None if exact is None else wilson(exact, cases),
        "tables": tables(results) if results else {},
        "trits": trit_shares(results.trits) if results else [],
        "charts": charts,
        "chart_data": {chart.id: chart.data() for chart in charts},
        "held_out_samples": [asdict(sample) for sample in results.samples] if results else [],
        "samples": [(step, [s for s in samples if s["step"] == step]) for step in sorted({s["step"] for s in samples})],
        "results": {k: v for k, v in vars(results).items() if not isinstance(v, (dict, tuple, Editor))}
        if results
        else {},
        "files": [(p.relative_to(run_dir), p.stat().st_size) for p in sorted(export.rglob("*")) if p.is_file()],
        "exports": {path.parent.name: read_json(path) for path in sorted(export.rglob("export.json"))},
    }


def lines(text: str, first: int, last: int) -> str:
    """Lines `first` to `last` of a text, as in a slice; line breaks stay."""
    return "".join(text.splitlines(keepends=True)[slice(first or None, last or None)])


def plain(value: Any) -> str:
    """A result or setting as text."""
    if isinstance(value, list):
        return ", ".join(map(plain, value)) or "none"
    if value is None or isinstance(value, bool):
        return "not known" if value is None else str(value).lower()
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}" if isinstance(value, float) else str(value)


def render(content: dict[str, Any]) -> str:
    """The page. Every value is escaped: prefixes and completions are code, full of <, > and &."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("smelter.evaluation"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"short": short_number, "duration": short_duration, "plain": plain, "lines": lines}
    return environment.get_template("report.html").render(content)


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write the page of a run (to RUN/report.html by default) and return its path. Raises DataError."""
    page = run_dir / "report.html"
    if out is None and page.exists() and "Smelter report</title>" not in page.read_text("utf-8", errors="replace"):
        raise DataError(f"{page}: `smelter report` did not write this: move it, or choose another file with --out")
    out = out or page
    write_text(out, render(gather(run_dir)))
    return out


def main(argv: list[str]) -> int:
    """`smelter report`."""
    options = parse(Options, argv, "smelter report")
    out = write_report(options.run, options.out)
    print(f"{out} ({out.stat().st_size / 1024:,.0f} KiB)")
    if options.open:
        webbrowser.open(out.resolve().as_uri())
    return 0
