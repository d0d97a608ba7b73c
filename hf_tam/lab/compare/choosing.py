"""Which learning rate is best, by validation alone, and what the test data then say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, nan
from statistics import fmean
from typing import Any

from scipy import stats

from hf_tam.lab.compare.plan import Plan

__all__ = ["Difference", "Estimate", "Outcome", "best_rate", "common_rates", "extended", "outcomes"]

Row = dict[str, Any]
CONFIDENCE = 0.95
LEAST_SEEDS = 3
"""With fewer, an interval is so wide that a tie would mean nothing."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95% interval (Student's t); the ends are NaN with one seed."""

    mean: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Of independent values."""
        mean, count = fmean(values), len(values)
        if count < 2 or not isfinite(mean):
            return cls(mean, nan, nan, count)
        error = float(stats.sem(values))
        if error == 0.0:
            return cls(mean, mean, mean, count)
        low, high = stats.t.interval(CONFIDENCE, count - 1, loc=mean, scale=error)
        return cls(mean, float(low), float(high), count)


@dataclass(frozen=True)
class Difference:
    """An optimizer against the baseline, seed by seed, positive where it is better.

    Attributes:
        by_seed: The differences of the test metric.
        estimate: Their mean.
        verdict: "better" or "worse" where the interval leaves out 0, else "tie"; "too few seeds" below 3, "diverged"
            where a test metric is no finite number.
        within: Whether the mean is no worse than the plan's tolerance.
    """

    by_seed: tuple[float, ...]
    estimate: Estimate
    verdict: str
    within: bool


@dataclass(frozen=True)
class Outcome:
    """What became of one optimizer.

    Attributes:
        label: Its name.
        learning_rate: Its best, by validation; NaN where no run is there yet.
        is_inside: Whether that lies inside the grid, not at an end.
        validation: At that rate.
        test: At that rate.
        difference: To the baseline, over the seeds that both have; None for the baseline itself.
        curve: Learning rate to mean validation metric; chosen among the rates that every optimizer has.
        also: Means over the seeds of what the plan wants shown besides; NaN where a run has none.
    """

    label: str
    learning_rate: float
    is_inside: bool
    validation: Estimate
    test: Estimate
    difference: Difference | None
    curve: dict[float, float]
    also: tuple[float, ...] = ()


def best_rate(plan: Plan, rows: Sequence[Row], label: str) -> float:
    """The learning rate with the best mean of the validation metric over the search's seeds. Sees no test metric.

    A run that ended in numbers that are not finite is worse than any other. Only rates count that every optimizer has.
    """
    scored = _scored(plan, rows, label)
    return max(scored, key=scored.__getitem__) if scored else nan


def _scored(plan: Plan, rows: Sequence[Row], label: str) -> dict[float, float]:
    """Learning rate, rising, to mean validation metric: more is better, and no number is least."""
    curve, sign = _curve(plan, rows, label), 1.0 if plan.greater_is_better else -1.0
    return {rate: sign * curve[rate] if isfinite(curve[rate]) else -float("inf") for rate in common_rates(plan, rows)}


def common_rates(plan: Plan, rows: Sequence[Row]) -> list[float]:
    """The learning rates at which every optimizer has all seeds of the search, rising."""
    return sorted(set.intersection(*(set(_curve(plan, rows, label)) for label in plan.optimizers)))


def _curve(plan: Plan, rows: Sequence[Row], label: str) -> dict[float, float]:
    seeds = plan.seeds[: plan.search_seeds]
    by_rate: dict[float, list[float]] = {}
    for row in rows:
        if row["label"] == label and row["seed"] in seeds:
            by_rate.setdefault(row["learning_rate"], []).append(_metric(row, plan.validation_metric))
    return {rate: fmean(by_rate[rate]) for rate in sorted(by_rate) if len(by_rate[rate]) == len(seeds)}


def _metric(row: Row, name: str) -> float:
    value = row["metrics"].get(name)
    return nan if value is None else float(value)


def extended(plan: Plan, rows: Sequence[Row], rates: tuple[float, ...]) -> tuple[float, ...]:
    """The grid, one step longer at each end where some optimizer is best, alone or among others; the same for all."""
    best: set[float] = set()
    for label in plan.optimizers:
        scored = _scored(plan, rows, label)
        top = max(scored.values(), default=nan)
        best |= {rate for rate, value in scored.items() if value == top} if isfinite(top) else set(rates[:1])
    ratio = rates[1] / rates[0] if len(rates) > 1 else 2.0
    below = (_rounded(rates[0] / ratio),) if rates[0] in best else ()
    ratio = rates[-1] / rates[-2] if len(rates) > 1 else 2.0
    above = (_rounded(rates[-1] * ratio),) if rates[-1] in best else ()
    return (*below, *rates, *above)


def _rounded(rate: float) -> float:
    return float(f"{rate:.2g}")


def outcomes(plan: Plan, rows: Sequence[Row]) -> list[Outcome]:
    """One for each optimizer, in the plan's order; the learning rates are fixed before a test metric is read."""
    best = {label: best_rate(plan, rows, label) for label in plan.optimizers}
    found = {label: _by_seed(plan, rows, label, best[label]) for label in plan.optimizers}
    results, rates = [], common_rates(plan, rows)
    for label in plan.optimizers:
        curve = _curve(plan, rows, label)
        validation, test = ([row[which] for row in found[label].values()] for which in (0, 1))
        difference = None if label == plan.baseline else _difference(plan, found[label], found[plan.baseline])
        results.append(
            Outcome(
                label,
                best[label],
                bool(rates) and rates[0] < best[label] < rates[-1],
                _estimate(validation),
                _estimate(test),
                difference,
                curve,
                tuple(_mean_of(plan, rows, label, best[label], name) for name in plan.also_shown),
            )
        )
    return results


def _mean_of(plan: Plan, rows: Sequence[Row], label: str, rate: float, name: str) -> float:
    chosen = [row for row in rows if (row["label"], row["learning_rate"]) == (label, rate)]
    values = [_metric(row, name) for row in chosen if row["seed"] in plan.seeds]
    return fmean(values) if values else nan


def _estimate(values: Sequence[float]) -> Estimate:
    return Estimate.of(values) if values else Estimate(nan, nan, nan, 0)


def _by_seed(plan: Plan, rows: Sequence[Row], label: str, rate: float) -> dict[int, tuple[float, float]]:
    """Validation and test metric of each seed at one learning rate."""
    chosen = {row["seed"]: row for row in rows if row["label"] == label and row["learning_rate"] == rate}
    return {
        seed: (_metric(chosen[seed], plan.validation_metric), _metric(chosen[seed], plan.test_metric))
        for seed in plan.seeds
        if seed in chosen
    }


def _difference(
    plan: Plan, mine: dict[int, tuple[float, float]], theirs: dict[int, tuple[float, float]]
) -> Difference | None:
    sign = 1.0 if plan.greater_is_better else -1.0
    by_seed = tuple(sign * (mine[seed][1] - theirs[seed][1]) for seed in mine if seed in theirs)
    if not by_seed:
        return None
    estimate = Estimate.of(by_seed)
    verdict = "better" if estimate.low > 0.0 else "worse" if estimate.high < 0.0 else "tie"
    verdict = verdict if estimate.count >= LEAST_SEEDS else "too few seeds"
    verdict = verdict if isfinite(estimate.mean) else "diverged"
    return Difference(by_seed, estimate, verdict, within=estimate.mean >= -plan.tolerance)
