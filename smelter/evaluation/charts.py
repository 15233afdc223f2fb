"""A run's curves, drawn as SVG paths.

They lie in a box of 1000 x 1000 that the page stretches to its column; labels are HTML, so they keep their size on a
telephone. That is two hundred lines instead of five megabytes of a charting library in every report.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from smelter.base import short_number

BOX = 1000
MAX_POINTS = 500
LAYER_KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Points = list[tuple[int, float | None]]
Row = dict[str, Any]


@dataclass(frozen=True)
class Series:
    """One curve: (step, value) pairs, None where the value was not finite."""

    name: str
    points: Points
    faint: bool = False


@dataclass(frozen=True)
class View:
    """A chart drawn on one pair of scales: SVG paths, and ticks as (position in %, label)."""

    name: str
    lines: list[str]
    dots: list[str]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    x_range: tuple[float, float]
    log_x: bool


@dataclass(frozen=True)
class Chart:
    """A figure with title, caption and one view per choice of scales."""

    title: str
    caption: str
    series: list[Series]
    percent: bool
    views: list[View] = field(default_factory=list)

    @property
    def id(self) -> str:
        """Its name in the page."""
        return self.title.lower().replace(" ", "-")

    def colour(self, index: int) -> int:
        """Number of a series' colour: a faint curve shares that of its smoothed one, which follows it."""
        return sum(not series.faint for series in self.series[:index])

    def data(self) -> Row:
        """What the page's script needs to show values under the pointer."""
        return {
            "percent": self.percent,
            "series": [{"name": series.name, "points": series.points} for series in self.series],
            "views": {view.name: {"x": view.x_range, "logX": view.log_x} for view in self.views},
        }


def thinned(points: Points, limit: int = MAX_POINTS) -> Points:
    """At most about `limit` points: the lowest and the highest of each stretch, so that no spike is lost."""
    if len(points) <= limit:
        return points
    width = math.ceil(2 * len(points) / limit)
    kept: Points = []
    for start in range(0, len(points), width):
        stretch = points[start : start + width]
        finite = sorted((p for p in stretch if p[1] is not None), key=lambda p: (p[1] or 0.0, p[0]))
        kept += sorted({finite[0], finite[-1]}) if finite else stretch[:1]
    return kept


def smoothed(points: Points) -> Points:
    """Centred mean over about a fiftieth of the curve, narrower at its ends, so that nothing is delayed."""
    finite = [(step, value) for step, value in points if value is not None]
    sums = [0.0, *itertools.accumulate(value for _, value in finite)]
    result: Points = []
    for i, (step, _) in enumerate(finite):
        half = min(len(finite) // 100, i, len(finite) - 1 - i)
        result.append((step, (sums[i + half + 1] - sums[i - half]) / (2 * half + 1)))
    return result


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) between `low` and `high`, about `count` of them."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.7 * raw)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten in the range; with 2 and 5 times them where there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 2, 5), tuple(range(1, 10))):
        ticks = [f * 10.0**p for p in powers for f in factors if low * 0.999 <= f * 10.0**p <= high * 1.001]
        if len(ticks) >= 3:
            break
    return ticks[:: math.ceil(len(ticks) / 6)] if ticks else [low]


def scale(low: float, high: float, log: bool) -> Callable[[float], float]:
    """Maps [low, high] to [0, 1]."""
    if log:
        return lambda value: (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))
    return lambda value: (value - low) / (high - low)


def draw(name: str, *, series: Sequence[Series], percent: bool, from_zero: bool, log_x: bool, log_y: bool) -> View:
    """Lay out curves on linear or logarithmic axes. On a logarithmic axis, zero and below leave a gap."""
    log_y = log_y and any(y is not None and y > 0 for one in series for _, y in one.points)
    shown = [
        [(x, y) if y is not None and (x > 0 or not log_x) and (y > 0 or not log_y) else None for x, y in one.points]
        for one in series
    ]
    visible = [point for points in shown for point in points if point] or [(1, 1.0)]
    x_low, x_high = float(min(x for x, _ in visible)), float(max(x for x, _ in visible))
    y_low, y_high = min(y for _, y in visible), max(y for _, y in visible)
    if x_low == x_high:
        x_low, x_high = x_low * 0.5, x_high * 1.5 + 1
    if log_y:
        y_low, y_high = y_low / 1.2, y_high * 1.2
    else:
        pad = 0.06 * (y_high - y_low) or abs(y_high) * 0.1 or 1.0
        y_low, y_high = (min(0.0, y_low) if from_zero else y_low - pad), y_high + pad
    x_of, y_of = scale(x_low, x_high, log_x), scale(y_low, y_high, log_y)

    def at(x: float, y: float) -> str:
        return f"{BOX * x_of(x):.1f} {BOX * (1 - y_of(y)):.1f}"

    lines, dots = [], []
    for one, points in zip(series, shown, strict=True):
        before = [None, *points]
        pieces = [f"{'L' if before[i] else 'M'}{at(*point)}" for i, point in enumerate(points) if point]
        lines.append("".join(pieces))
        few = len(points) <= 40 and not one.faint
        dots.append("".join(f"M{at(*point)}h0" for point in points if point) if few else "")

    def label(value: float) -> str:
        return f"{100 * value:.10g}%" if percent else short_number(value)

    x_values = log_ticks(x_low, x_high) if log_x else linear_ticks(x_low, x_high)
    x_values = [value for value in x_values if value == int(value)]
    y_values = log_ticks(y_low, y_high) if log_y else linear_ticks(y_low, y_high, 4)
    x_ticks = [(round(100 * x_of(value), 2), short_number(value)) for value in x_values]
    y_ticks = [(round(100 * y_of(value), 2), label(value)) for value in y_values]
    return View(name, lines, dots, x_ticks, y_ticks, (x_low, x_high), log_x)


def exact(value: float, percent: bool) -> str:
    """A value for the caption, to 4 digits."""
    if percent:
        return f"{100 * value:.3g}%"
    return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.4g}"


def make_chart(
    rows: list[Row],
    title: str,
    keys: dict[str, str],
    *,
    about: str = "",
    percent: bool = False,
    from_zero: bool = False,
    smooth: bool = False,
    scales: Sequence[str] = ("linear",),
) -> Chart | None:
    """A chart of the given metric keys (key -> legend); None where the run has none of them.

    `scales` are the views on offer, the first one shown: linear, "log steps", "log values".
    """
    series: list[Series] = []
    notes = []
    for key, name in keys.items():
        points = [(row["step"], row[key]) for row in rows if key in row]
        finite = [(y, x) for x, y in points if y is not None]
        if not finite:
            continue
        kept = thinned(points)
        if smooth and len(finite) >= 50:
            series += [Series(f"{name}, each", kept, faint=True), Series(name, thinned(smoothed(points)))]
        else:
            series.append(Series(name, kept))
        (low, low_step), (last, last_step) = min(finite), finite[-1]
        notes.append(f"{name}: {exact(last, percent)} at step {last_step:,}")
        if "loss" in key or "bpb" in key:
            notes[-1] += f", lowest {exact(low, percent)} at step {low_step:,}"
        if len(finite) < len(points):
            notes.append(f"{len(points) - len(finite)} of {len(points)} values were not finite")
    if not series:
        return None
    figures = "; ".join(notes) + "." if len(keys) <= 2 else ""
    caption = f"{about} {figures[:1].upper()}{figures[1:]}".strip()
    scaled = functools.partial(draw, series=series, percent=percent, from_zero=from_zero)
    views = [scaled(name, log_x=name == "log steps", log_y=name == "log values") for name in scales]
    return Chart(title, caption, series, percent, views)


def make_charts(rows: list[Row]) -> list[Chart]:
    """Every chart that the run's metrics allow, in reading order."""
    keys = {key for row in rows for key in row}
    kinds = in_layer_order(key.removeprefix("sparsity/") for key in keys if key.startswith("sparsity/"))
    losses = {"loss": "training", "val_loss": "held-out"}
    terms = {"ce_loss": "cross-entropy", "kl_loss": "KL to the teachers"} if "kl_loss" in keys else {}
    rates = {"lr_muon": "Muon", "lr_adamw": "AdamW", "lr_embedding": "embedding"}
    zeros = {f"sparsity/{kind}": kind for kind in kinds}
    flips = {"trit_flips": "since the last line"}
    # Without fp16 the scale is 1 throughout, which is not worth a chart.
    scale = {"loss_scale": "scale"} if any(row.get("loss_scale", 1) not in (1, None) for row in rows) else {}
    nats, of_kind = "Nats per token.", "Share of weights that are 0, by kind of layer."
    groups = "Muon's is for the body's matrices, AdamW's for norms (or all but the embedding and the output head)."
    steps, values = ("linear", "log steps"), ("log values", "linear")
    charts = [
        make_chart(rows, "Loss", losses, about=nats, smooth=True, scales=steps),
        make_chart(rows, "Bits per byte", {"val_bpb": "held-out"}, about="For held-out code.", scales=steps),
        make_chart(rows, "Terms of the loss", terms, about=nats, smooth=True),
        make_chart(rows, "Learning rates", rates, about=groups, from_zero=True, scales=("linear", "log values")),
        make_chart(rows, "Throughput", {"tok_per_sec": "tokens per second"}, from_zero=True),
        make_chart(rows, "Gradient norm", {"grad_norm": "norm"}, smooth=True, scales=values),
        make_chart(rows, "Loss scale", scale, about="Of fp16.", scales=values),
        make_chart(rows, "Zeros among the ternary weights", zeros, about=of_kind, percent=True),
        make_chart(rows, "Ternary weights that changed", flips, percent=True, smooth=True, scales=values),
    ]
    return [chart for chart in charts if chart]


def in_layer_order(kinds: Iterable[str]) -> list[str]:
    """Kinds of layer as they come in a block, unknown ones last."""
    return sorted(kinds, key=lambda kind: (LAYER_KINDS.index(kind) if kind in LAYER_KINDS else 99, kind))
