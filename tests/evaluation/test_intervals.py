"""Intervals: the published examples, and what must hold of any."""

import random

import pytest

from smelter.evaluation.intervals import bootstrap, paired_share_difference, share_difference, wilson


@pytest.mark.parametrize(
    ("share", "cases", "low", "high"),
    # Agresti and Coull 1998, and R's prop.test(correct = FALSE)
    [(0.5, 10, 0.2366, 0.7634), (0.0, 10, 0.0, 0.2775), (0.285, 400, 0.2430, 0.3311)],
)
def test_wilson(share: float, cases: int, low: float, high: float) -> None:
    assert wilson(share, cases) == pytest.approx((low, high), abs=1e-4)


def test_independent_shares_as_published() -> None:
    """56 of 70 against 48 of 80: Newcombe 1998 (independent proportions), method 10."""
    assert share_difference(48 / 80, 80, 56 / 70, 70) == pytest.approx((0.0524, 0.3339), abs=1e-4)


def paired(both: int, only_first: int, only_second: int, neither: int) -> tuple[float, float]:
    first = [True] * (both + only_first) + [False] * (only_second + neither)
    second = [True] * both + [False] * only_first + [True] * only_second + [False] * neither
    return paired_share_difference(first, second)


def test_paired_shares_as_published() -> None:
    """36, 12, 2, 0 of 50: Newcombe 1998 (paired data), method 10, whose difference is first - second."""
    low, high = paired(36, 12, 2, 0)
    assert (-high, -low) == pytest.approx((0.0569, 0.3404), abs=1e-4)


def test_pairs_tell_more_than_independent_samples() -> None:
    together = paired(40, 2, 10, 48)
    apart = share_difference(0.42, 100, 0.50, 100)
    assert apart[0] < 0 < together[0]
    assert together[1] < apart[1]


def test_no_difference_is_never_certain_of_itself() -> None:
    assert paired(0, 0, 0, 30) == pytest.approx((-0.1135, 0.1135), abs=1e-3)
    low, high = share_difference(0.0, 30, 0.0, 30)
    assert low == -high < -0.1


def test_bootstrap_of_a_mean_agrees_with_the_normal_interval() -> None:
    rng = random.Random(0)
    values = [rng.gauss(1.0, 2.0) for _ in range(400)]
    mean = sum(values) / 400
    half = 1.96 * (sum((value - mean) ** 2 for value in values) / 399 / 400) ** 0.5
    low, high = bootstrap(values)
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.1 * half)
    assert bootstrap(values) == (low, high)


def test_bootstrap_of_a_ratio_weighs_its_cases() -> None:
    low, high = bootstrap([10.0, 0.0] * 50, [1.0, 9.0] * 50)
    assert low < 1.0 < high
    assert high - low < 1.0
    assert bootstrap([2.0, 4.0], [1.0, 2.0]) == pytest.approx((2.0, 2.0))
