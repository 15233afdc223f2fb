"""Curves lie where their values say, keep every spike, and have round numbers beside them."""

import math
import re

import pytest

from smelter.evaluation.charts import Series, draw, linear_ticks, log_ticks, make_chart, smoothed, thinned


def test_thinning_keeps_every_spike() -> None:
    points: list[tuple[int, float | None]] = [(step, math.sin(step / 50)) for step in range(20_000)]
    points[7_777], points[12_345] = (7_777, 99.0), (12_345, -99.0)
    kept = thinned(points)
    assert 300 < len(kept) <= 500
    assert {(7_777, 99.0), (12_345, -99.0)} <= set(kept)
    assert [step for step, _ in kept] == sorted({step for step, _ in kept})
    assert thinned([(step, None) for step in range(1_000)])
    points[100] = (100, None)
    assert thinned(points[:500]) == points[:500]


def test_smoothing_delays_nothing_and_averages_noise() -> None:
    line: list[tuple[int, float | None]] = [(step, 3.0 - step / 100) for step in range(500)]
    line[100] = (100, None)
    kept = [point for point in line if point[0] != 100]
    assert [step for step, _ in smoothed(line)] == [step for step, _ in kept]
    far_from_gap = [i for i, (step, _) in enumerate(kept) if abs(step - 100) > 10]
    values = [value for _, value in smoothed(line)]
    assert [values[i] for i in far_from_gap] == pytest.approx([kept[i][1] for i in far_from_gap])
    noise = smoothed([(step, float((-1) ** step)) for step in range(500)])
    assert max(abs(value or 0.0) for _, value in noise[10:-10]) < 0.15


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (1.9, 8.4, list(range(2, 9))),
        (0.31, 0.44, [0.3 + i / 50 for i in range(1, 8)]),
    ],
)
def test_linear_ticks(low: float, high: float, expected: list[float]) -> None:
    assert linear_ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(10, 2_000, [10, 20, 50, 100, 200, 500, 1000, 2000]), (1, 1e5, [1, 10, 100, 1e3, 1e4, 1e5]), (3, 4, [3, 4])],
)
def test_log_ticks(low: float, high: float, expected: list[float]) -> None:
    ticks = log_ticks(low, high)
    assert {round(tick, 6) for tick in ticks} <= set(expected)
    assert 1 <= len(ticks) <= 6


def test_curves_lie_where_their_values_say() -> None:
    series = [Series("loss", [(0, 5.0), (10, 1.0), (20, None), (30, 4.0), (100, 2.0)])]
    linear = draw("linear", series=series, percent=False, from_zero=True, log_x=False, log_y=False)
    # From 0 at the bottom to 5 and 6% of the values' range at the top; the missing value leaves a gap.
    heights = [1000 * (1 - value / 5.24) for value in (5, 1, 4, 2)]
    expected = "M0.0 {:.1f}L100.0 {:.1f}M300.0 {:.1f}L1000.0 {:.1f}".format(*heights)
    assert linear.lines == [expected]
    assert linear.x_ticks[0] == (0, "0")
    assert linear.x_ticks[-1] == (100, "100")
    logarithmic = draw("log", series=series, percent=False, from_zero=True, log_x=True, log_y=True)
    numbers = [float(number) for number in re.findall(r"[\d.]+", logarithmic.lines[0])]
    span = math.log(4 * 1.2) - math.log(1 / 1.2)  # step 0 has no place on a logarithmic axis
    assert numbers[0::2] == pytest.approx([0, 1000 * math.log10(3), 1000], abs=0.1)
    assert numbers[1::2] == pytest.approx([1000 * (1 - math.log(v * 1.2) / span) for v in (1, 4, 2)], abs=0.1)


def test_a_chart_without_values_is_left_out() -> None:
    assert make_chart([{"step": 1, "loss": None}], "Loss", {"loss": "training", "val_loss": "held-out"}) is None
