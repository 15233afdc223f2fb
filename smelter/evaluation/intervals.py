"""How sure a measured share or mean is: 95% intervals.

Shares use Wilson's score interval (1927) and, for the difference of two, Newcombe's hybrid of two of them (Statistics
in Medicine 17, 1998, method 10 for either kind): unlike the textbook's, they stay right near 0 and 1, where small
models live. Where the same cases were asked twice they are compared pair by pair, which takes the luck of the draw
out. Means and ratios are bootstrapped over cases, always with the same seed.
"""

import math
from collections.abc import Sequence

import numpy as np

Z = 1.959964
NUM_RESAMPLES = 4_000


def wilson(share: float, cases: int) -> tuple[float, float]:
    """95% interval of a share of `cases`."""
    z2 = Z**2
    middle = (share + z2 / (2 * cases)) / (1 + z2 / cases)
    half = math.sqrt(z2) / (1 + z2 / cases) * math.sqrt(share * (1 - share) / cases + z2 / (4 * cases**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def share_difference(first: float, first_cases: int, second: float, second_cases: int) -> tuple[float, float]:
    """95% interval of `second - first`, shares of different cases."""
    return _newcombe(first, wilson(first, first_cases), second, wilson(second, second_cases), 0.0)


def paired_share_difference(first: Sequence[bool], second: Sequence[bool]) -> tuple[float, float]:
    """95% interval of the difference of two shares, `second - first`, of the same cases in the same order."""
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    cases = len(a)
    both, only_first, only_second, neither = (int(x.sum()) for x in (a & b, a & ~b, ~a & b, ~a & ~b))
    product = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    agreement = both * neither - only_first * only_second
    corrected = max(agreement - cases / 2, 0.0) if agreement > 0 else float(agreement)  # for continuity
    correlation = corrected / math.sqrt(product) if product else 0.0
    shares = float(a.mean()), float(b.mean())
    return _newcombe(shares[0], wilson(shares[0], cases), shares[1], wilson(shares[1], cases), correlation)


def _newcombe(
    first: float, first_limits: tuple[float, float], second: float, second_limits: tuple[float, float], phi: float
) -> tuple[float, float]:
    def distance(one: float, other: float) -> float:
        return math.sqrt(max(0.0, one**2 - 2 * phi * one * other + other**2))

    difference = second - first
    low = distance(second - second_limits[0], first_limits[1] - first)
    high = distance(second_limits[1] - second, first - first_limits[0])
    return difference - low, difference + high


def bootstrap(values: Sequence[float], weights: Sequence[float] | None = None) -> tuple[float, float]:
    """95% interval of sum(values) / sum(weights), by default of their mean: percentiles over resampled cases."""
    numerators = np.asarray(values, dtype=float)
    denominators = np.ones(len(numerators)) if weights is None else np.asarray(weights, dtype=float)
    rng = np.random.default_rng(0)
    # How often each case is drawn, instead of the draws: many resamples in one product, in bounded memory.
    at_once = max(1, min(500, 2**22 // len(numerators)))
    ratios = []
    for _ in range(0, NUM_RESAMPLES, at_once):
        counts = rng.multinomial(len(numerators), np.full(len(numerators), 1 / len(numerators)), size=at_once)
        ratios.append(counts @ numerators / np.maximum(counts @ denominators, 1e-12))
    low, high = np.quantile(np.concatenate(ratios), [0.025, 0.975])
    return float(low), float(high)
