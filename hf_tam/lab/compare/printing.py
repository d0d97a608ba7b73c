"""The tables of a comparison, in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan

from hf_tam.lab.compare.choosing import Estimate, Outcome
from hf_tam.lab.compare.plan import Plan

__all__ = ["curves", "interval", "summary", "table", "unit"]

_IN_PERCENT = ("accuracy", "f1")


def table(plan: Plan, results: Sequence[Outcome]) -> str:
    """One line an optimizer: its best learning rate by validation, and what it gives on the test data.

    Differences are to the first optimizer, positive where better.
    """
    metrics = f"{plan.validation_metric}{unit(plan)} | {plan.test_metric}{unit(plan)} (95%)"
    also = "".join(f" {name} |" for name in plan.also_shown)
    lines = [
        f"| optimizer | best learning rate | {metrics} | seeds | difference by seed | mean difference (95%) | |{also}",
        f"|---|---|---|---|---|---|---|---|{'---|' * len(plan.also_shown)}",
    ]
    for outcome in results:
        rate = "none yet" if isnan(outcome.learning_rate) else f"{outcome.learning_rate:g}"
        rate += "" if outcome.is_inside else " (at an end of the grid)"
        cells = [outcome.label, rate, _mean(plan, outcome.validation), interval(plan, outcome.test)]
        cells.append(str(outcome.test.count))
        difference = outcome.difference
        if difference is None:
            cells += ["", "", "baseline" if outcome.label == plan.baseline else "not measured yet"]
        else:
            cells.append(", ".join(f"{_scale(plan) * value:+.{_digits(plan)}f}" for value in difference.by_seed))
            cells += [interval(plan, difference.estimate, sign="+"), difference.verdict]
        cells += ["" if isnan(value) else f"{value:.3g}" for value in outcome.also]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def curves(plan: Plan, results: Sequence[Outcome]) -> str:
    """Validation metric by learning rate, for each optimizer: mean over the search's seeds; the best in bold."""
    rates = sorted({rate for outcome in results for rate in outcome.curve})
    lines = [
        f"| learning rate | {' | '.join(outcome.label for outcome in results)} |",
        f"|---|{'---|' * len(results)}",
    ]
    for rate in rates:
        cells = []
        for outcome in results:
            value = outcome.curve.get(rate)
            text = "" if value is None else f"{_scale(plan) * value:.{_digits(plan)}f}"
            cells.append(f"**{text}**" if text and rate == outcome.learning_rate else text)
        lines.append(f"| {rate:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(plan: Plan, results: Sequence[Outcome]) -> str:
    """How often the optimizers are better than the baseline, tie with it or are worse, and the laxer count."""
    differences = [outcome.difference for outcome in results if outcome.difference is not None]
    verdicts = [difference.verdict for difference in differences]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in ("better", "tie", "worse"))
    counts += f", {few} with too few seeds" if (few := verdicts.count("too few seeds")) else ""
    counts += f", {lost} diverged" if (lost := verdicts.count("diverged")) else ""
    within = sum(difference.within for difference in differences)
    tolerance = _scale(plan) * plan.tolerance
    points = "points" if _scale(plan) == 100.0 else f"of {plan.test_metric}"
    return (
        f"Beside {plan.baseline}: {counts} (by the 95% interval of the paired differences); "
        f"{within} of {len(differences)} within {tolerance:g} {points} or better."
    )


def _scale(plan: Plan) -> float:
    return 100.0 if plan.test_metric.endswith(_IN_PERCENT) else 1.0


def _digits(plan: Plan) -> int:
    return 2 if _scale(plan) == 100.0 else 4


def _mean(plan: Plan, estimate: Estimate) -> str:
    return f"{_scale(plan) * estimate.mean:.{_digits(plan)}f}"


def unit(plan: Plan) -> str:
    """What stands behind the name of a metric."""
    return " in %" if _scale(plan) == 100.0 else ""


def interval(plan: Plan, estimate: Estimate, *, sign: str = "") -> str:
    """A mean with its interval, in the plan's unit."""
    mean, low, high = (
        f"{_scale(plan) * value:{sign}.{_digits(plan)}f}" for value in (estimate.mean, estimate.low, estimate.high)
    )
    return mean if isnan(estimate.low) else f"{mean} ({low} to {high})"
