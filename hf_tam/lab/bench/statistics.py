"""Ratios of times that were taken in pairs, and an interval of their median that assumes no distribution."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from statistics import median
from typing import NamedTuple

__all__ = ["Ratio", "pair_ratio"]

_ONE_IN = 20
"""How seldom the interval may miss: a confidence of 95%."""


class Ratio(NamedTuple):
    """The median of pair ratios and an interval for it.

    Attributes:
        median: Of the ratios of the single pairs, not the ratio of two medians.
        low: Lower end of the interval.
        high: Upper end.
        coverage: The probability with which such an interval holds the true median: at least 0.95, and less only
            where there are fewer than 6 pairs, whose whole range it then is.
    """

    median: float
    low: float
    high: float
    coverage: float


def pair_ratio(seconds: Sequence[float], baseline_seconds: Sequence[float]) -> Ratio:
    """Divide pair by pair. The interval lies between two order statistics (David and Nagaraja, section 7.1).

    Args:
        seconds: One time a pair.
        baseline_seconds: The other one's, in the same order.

    Raises:
        ValueError: The numbers of times differ, or are 0.
    """
    ratios = sorted(mine / theirs for mine, theirs in zip(seconds, baseline_seconds, strict=True))
    if not ratios:
        raise ValueError("no pair was timed, so there is no ratio")
    count = len(ratios)
    # The rank'th value from below is above the median with probability P(Binomial(count, 1/2) < rank).
    outside = 1
    rank = 1
    # In whole numbers: 2^count is no float from 1024 pairs on.
    while rank < (count + 1) // 2 and 2 * (outside + comb(count, rank)) * _ONE_IN <= 2**count:
        outside += comb(count, rank)
        rank += 1
    return Ratio(median(ratios), ratios[rank - 1], ratios[count - rank], max(0.0, 1.0 - 2 * outside / 2**count))
