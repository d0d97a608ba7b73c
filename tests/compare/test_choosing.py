"""Learning rates are chosen by validation alone; intervals and verdicts are those of Student's t on paired seeds."""

import math
from pathlib import Path

import pytest
import yaml

pytest.importorskip("scipy")

from hypothesis import given
from hypothesis import strategies as st

from hf_tam.lab.compare import printing
from hf_tam.lab.compare.choosing import Estimate, best_rate, extended, outcomes
from hf_tam.lab.compare.plan import load_plan

RATES = (1e-3, 2e-3, 4e-3)
SEEDS = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return make_plan(tmp_path_factory.mktemp("plan"))


def make_plan(folder: Path, **changes):
    content = {
        "recipe": "classify",
        "optimizers": {"AdamW": {"optim": "adamw_torch"}, "ours": {"optim": "adatamw"}},
        "learning_rates": list(RATES),
        "seeds": list(SEEDS),
        "search_seeds": 2,
        **changes,
    }
    (folder / "made-up.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return load_plan(folder / "made-up.yaml")


class Blind(dict):
    """Metrics that must not be looked at but for those of validation."""

    def get(self, key, default=None):
        assert key.startswith("eval_"), f"{key} was read to choose a learning rate"
        return super().get(key, default)


def row(label, rate, seed, *, validation, test=0.5, metrics=dict):
    values = metrics({"eval_accuracy": validation, "test_accuracy": test})
    return {"label": label, "learning_rate": rate, "seed": seed, "metrics": values, "seconds": 1.0}


def rows_of(curves, *, test=lambda label, rate, seed: 0.5, seeds=SEEDS, metrics=dict):
    return [
        row(label, rate, seed, validation=value + 1e-4 * seed, test=test(label, rate, seed), metrics=metrics)
        for label, curve in curves.items()
        for rate, value in zip(RATES, curve, strict=True)
        for seed in seeds
    ]


def test_test_data_are_not_looked_at(plan):
    rows = rows_of({"AdamW": (0.5, 0.6, 0.4), "ours": (0.5, 0.4, 0.6)}, metrics=Blind)
    assert best_rate(plan, rows, "AdamW") == 2e-3
    assert best_rate(plan, rows, "ours") == 4e-3
    assert extended(plan, rows, RATES) == (*RATES, 8e-3)


@given(st.lists(st.floats(0, 1), min_size=24, max_size=24))
def test_no_test_metric_changes_a_learning_rate(plan, values):
    curves = {"AdamW": (0.5, 0.6, 0.4), "ours": (0.6, 0.5, 0.4)}
    numbers = iter(values)
    rows = rows_of(curves, test=lambda *_: next(numbers))
    assert [outcome.learning_rate for outcome in outcomes(plan, rows)] == [2e-3, 1e-3]


def test_only_the_seeds_of_the_search_choose(plan):
    """At its best learning rate an optimizer has more seeds than elsewhere, which must not favour or harm it."""
    rows = rows_of({"AdamW": (0.5, 0.6, 0.4), "ours": (0.5, 0.6, 0.4)}, seeds=(0, 1))
    rows += [row("ours", 2e-3, seed, validation=0.0) for seed in (2, 3)]
    assert best_rate(plan, rows, "ours") == 2e-3


def test_unfinished_learning_rates_do_not_count(plan):
    rows = [row(label, 1e-3, seed, validation=0.1) for seed in SEEDS for label in plan.optimizers]
    rows += [row(label, 2e-3, 0, validation=0.9) for label in plan.optimizers]
    assert best_rate(plan, rows, "ours") == 1e-3
    assert math.isnan(best_rate(plan, [], "ours"))


def test_a_run_that_blew_up_is_the_worst(plan):
    rows = rows_of({"AdamW": (0.5, math.nan, 0.4), "ours": (math.nan, math.nan, 0.01)})
    assert best_rate(plan, rows, "AdamW") == 1e-3
    assert best_rate(plan, rows, "ours") == 4e-3


def test_less_may_be_better(tmp_path):
    plan = make_plan(tmp_path, greater_is_better=False, validation_metric="eval_accuracy")
    rows = rows_of({"AdamW": (0.5, 0.6, 0.4), "ours": (0.5, 0.4, 0.6)}, test=lambda label, *_: 0.1 * len(label))
    assert [outcome.learning_rate for outcome in outcomes(plan, rows)] == [4e-3, 2e-3]
    assert outcomes(plan, rows)[1].difference.by_seed == pytest.approx([0.1] * 4)  # 0.5 and 0.4: ours is better


@pytest.mark.parametrize(
    ("curves", "expected"),
    [
        ({"AdamW": (0.1, 0.2, 0.1), "ours": (0.1, 0.2, 0.1)}, RATES),
        ({"AdamW": (0.3, 0.2, 0.1), "ours": (0.1, 0.2, 0.1)}, (5e-4, *RATES)),
        ({"AdamW": (0.3, 0.2, 0.1), "ours": (0.1, 0.2, 0.3)}, (5e-4, *RATES, 8e-3)),
    ],
)
def test_grid_grows_where_someone_is_best_at_its_end(plan, curves, expected):
    assert extended(plan, rows_of(curves), RATES) == pytest.approx(expected)


def test_grid_grows_where_an_end_is_as_good_as_the_best(plan):
    flat = {"AdamW": (0.1, 0.5, 0.2), "ours": (0.1, 0.5, 0.5)}
    assert extended(plan, rows_of(flat), RATES) == (*RATES, 8e-3)


def test_only_rates_that_all_have_count(plan):
    """A row that is left over from another grid gives its optimizer no learning rate that the others had not."""
    rows = rows_of({"AdamW": (0.1, 0.5, 0.2), "ours": (0.1, 0.5, 0.2)})
    rows += [row("ours", 1.6e-2, seed, validation=0.9) for seed in SEEDS]
    assert best_rate(plan, rows, "ours") == 2e-3
    assert [outcome.is_inside for outcome in outcomes(plan, rows)] == [True, True]


def test_a_seed_that_blew_up_is_no_tie(plan):
    rows = rows_of(
        {"AdamW": (0.1, 0.5, 0.2), "ours": (0.1, 0.5, 0.2)},
        test=lambda label, rate, seed: math.nan if (label, seed) == ("ours", 3) else 0.5,
    )
    results = outcomes(plan, rows)
    assert results[1].difference.verdict == "diverged"
    assert not results[1].difference.within
    assert "0 better, 0 tie, 0 worse, 1 diverged" in printing.summary(plan, results)


def test_interval_is_students():
    """Of 1, 2, 3, 4: mean 2.5, standard error 0.6455, t(0.975, 3) = 3.1824."""
    estimate = Estimate.of([1.0, 2.0, 3.0, 4.0])
    assert (estimate.mean, estimate.low, estimate.high) == pytest.approx((2.5, 0.44574, 4.55426), abs=1e-4)
    assert math.isnan(Estimate.of([1.0]).low)
    assert Estimate.of([2.0, 2.0]) == Estimate(2.0, 2.0, 2.0, 2)


@pytest.mark.parametrize(
    ("shift", "noise", "verdict", "within"),
    [(0.02, 0.001, "better", True), (-0.02, 0.001, "worse", False), (-0.001, 0.01, "tie", True),
     (-0.01, 0.02, "tie", False)],
)  # fmt: skip
def test_verdicts(plan, shift, noise, verdict, within):
    """The interval decides between better, tie and worse; the tolerance of 0.2 points is a count of its own."""

    def accuracy(label, rate, seed):
        return 0.5 + 0.05 * seed + (shift + noise * (-1) ** seed if label == "ours" else 0.0)

    rows = rows_of({"AdamW": (0.1, 0.2, 0.1), "ours": (0.1, 0.2, 0.1)}, test=accuracy)
    baseline, ours = outcomes(plan, rows)
    assert baseline.difference is None
    assert ours.difference.estimate.mean == pytest.approx(shift)
    assert (ours.difference.verdict, ours.difference.within) == (verdict, within)
    text = printing.table(plan, [baseline, ours]) + printing.summary(plan, [baseline, ours])
    assert f"{100 * shift:+.2f} (" in text
    assert f"1 {verdict}" in text
    assert f"{int(within)} of 1 within 0.2 points or better" in text


def test_an_end_of_the_grid_is_said(plan):
    results = outcomes(plan, rows_of({"AdamW": (0.1, 0.2, 0.1), "ours": (0.3, 0.2, 0.1)}))
    assert [outcome.is_inside for outcome in results] == [True, False]
    assert "0.001 (at an end of the grid)" in printing.table(plan, results)
    assert "| 0.001 | 10.00 | **30.00** |" in printing.curves(plan, results).replace("10.01", "10.00").replace(
        "30.01", "30.00"
    )


def test_nothing_yet(plan):
    text = printing.table(plan, outcomes(plan, []))
    assert "none yet" in text
    assert "not measured yet" in text


def test_what_is_shown_besides_is_the_mean_at_the_chosen_rate(tmp_path):
    plan = make_plan(tmp_path, also_shown=["spikes"])
    rows = rows_of({"AdamW": (0.1, 0.9, 0.2), "ours": (0.1, 0.2, 0.9)})
    for found in rows:
        found["metrics"]["spikes"] = 10.0 * RATES.index(found["learning_rate"]) + found["seed"]
    rows[-1]["metrics"].pop("spikes")  # the last seed of ours at its best rate
    assert outcomes(plan, rows)[0].also == (11.5,)
    assert math.isnan(outcomes(plan, rows)[1].also[0])
    header, _, first, second = printing.table(plan, outcomes(plan, rows)).splitlines()
    assert header.endswith("| spikes |")
    assert first.endswith("| 11.5 |")
    assert second.endswith("|  |")
