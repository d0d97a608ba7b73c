"""The measured comparisons: the overview in docs/measured.md, and comparisons.md beside this file with all tables.

    python -m recipes.results.evidence            prints the overview
    python -m recipes.results.evidence --page     prints comparisons.md

A comparison is a plan in recipes/comparisons/; its rows, as `hf-tam compare` wrote them, lie in this folder under the
same name. A plan without rows is said to be not measured yet, and one whose runs are not all there to be under way.
"""

from __future__ import annotations

import sys
from pathlib import Path

from scipy import stats

from hf_tam.lab.compare import printing
from hf_tam.lab.compare.choosing import Difference, Outcome, Row, outcomes
from hf_tam.lab.compare.journal import Journal
from hf_tam.lab.compare.plan import Plan, load_plan
from recipes.results import summary

PLANS = Path(__file__).parents[1] / "comparisons"
FOLDER = Path(__file__).parent
_STUDIES = ("-variants", "-step-size", "-warmup", "-others")
"""Ends of names of plans that look into the torque itself or at further optimizers, on data of another plan: they are
not counted again."""

_UNNAMED = "2-core virtual machine, torch 2.13 (CPU)"
_PAGE = """\
# Comparisons

Printed by `python -m recipes.results.evidence --page`; a test fails where this page and the rows disagree.

Each of them is one command, `hf-tam compare` with the plan. Every optimizer has the same grid of learning rates and
the same seeds; where a best rate lay at an end, the grid was extended for all. The best rate was chosen by the mean of
the validation metric, then all seeds were run at it, and only then was the test metric looked at. Intervals are
Student's t over seeds, differences are paired by seed: "better" and "worse" where their interval leaves out 0. What a
run was measured on stands beside the rows; where nothing stands there, it was a {unnamed}.

{sections}

## An older comparison, without a validation split

MiniLM in full on 1,536 rows of banking77, 3 epochs of batch 32, linear schedule with 10% warm-up: accuracy on the
3,080 test rows in percent, mean training loss over the run. Learning rates were compared on the test rows, so nothing
can be chosen by this table. Rows: [banking77-minilm.jsonl](banking77-minilm.jsonl); one of them is

```bash
python recipes/classify.py --model_name_or_path MINILM --train_file banking77/train.csv --test_file banking77/test.csv --label_column category --full --max_train_samples 1536 --per_device_train_batch_size 32 --num_train_epochs 3 --warmup_steps 0.1 --lr_scheduler_type linear --learning_rate 1e-3 --optim adatamw --seed 0
```

{older}
"""  # noqa: E501


def overview(folder: Path = FOLDER) -> str:
    """One line for each comparison of a baseline with the torque as it comes, and how often it is better.

    Args:
        folder: Where the rows are.

    Returns:
        Markdown, with links as from a page of docs/.
    """
    lines = [
        "| comparison | metric | baseline: learning rate, test | with torque: learning rate, test"
        " | difference (95%) | |",
        "|---|---|---|---|---|---|",
    ]
    counted: list[Outcome] = []
    rates: list[tuple[float, float]] = []
    missing = []
    for path in _plans():
        plan, rows = _read(path, folder)
        if plan.name.endswith(_STUDIES):
            continue
        baseline, *others = results = outcomes(plan, rows)
        if not _is_finished(plan, results):
            missing.append(plan.name)
            continue
        for outcome in others:
            if _is_as_it_comes(plan, outcome.label):
                lines.append(_line(plan, baseline, outcome))
                counted.append(outcome)
                rates.append((baseline.learning_rate, outcome.learning_rate))
    text = ["\n".join(lines), _counts(counted), _rates(rates)]
    text += [f"Not measured yet: {', '.join(missing)}."] if missing else []
    return "\n\n".join(text)


def _is_finished(plan: Plan, results: list[Outcome]) -> bool:
    """Whether the grid is there, the same for every optimizer, and all seeds at its best rate."""
    grid = set(results[0].curve)
    return set(plan.learning_rates) <= grid and all(
        set(outcome.curve) == grid and outcome.test.count == len(plan.seeds) for outcome in results
    )


def _is_as_it_comes(plan: Plan, label: str) -> bool:
    words = str(plan.optimizers[label].get("optim_args", ""))
    return not any(name in words for name in ("gamma", "scope", "step_size", "torque_steps"))


def step_sizes(folder: Path = FOLDER) -> str:
    """Where the best learning rate of `step_size=paper` lies, in a sentence for each plan that asked.

    Args:
        folder: Where the rows are.
    """
    return " ".join(
        _step_size(PLANS / name, folder, data)
        for name, data in (
            ("banking77-minilm-step-size.yaml", "all weights, 768 rows of banking77"),
            ("clinc150-minilm-step-size.yaml", "LoRA, 750 rows of CLINC150"),
        )
    )


def _step_size(path: Path, folder: Path, data: str) -> str:
    plan, rows = _read(path, folder)
    adamw, ours, paper = results = outcomes(plan, rows)
    if not _is_finished(plan, results):
        return f"On MiniLM ({data}) it is not measured yet."
    return (
        f"On MiniLM ({data}) the best learning rate by validation is {adamw.learning_rate:g} with AdamW, "
        f"{ours.learning_rate:g} with `adatamw`, and {paper.learning_rate:g} with `step_size=paper`, "
        f"{adamw.learning_rate / paper.learning_rate:.0f} times lower."
    )


def _line(plan: Plan, baseline: Outcome, outcome: Outcome) -> str:
    def told(of: Outcome) -> str:
        return f"{of.label} {of.learning_rate:g}, {printing.interval(plan, of.test)}"

    difference = outcome.difference
    assert difference is not None
    change = printing.interval(plan, difference.estimate, sign="+")
    link = f"[{plan.name}](../recipes/results/comparisons.md#{plan.name})"
    metric = plan.test_metric.removeprefix("test_") + printing.unit(plan)
    return f"| {link} | {metric} | {told(baseline)} | {told(outcome)} | {change} | {difference.verdict} |"


def _counts(counted: list[Outcome]) -> str:
    differences = [outcome.difference for outcome in counted if outcome.difference is not None]
    verdicts = [difference.verdict for difference in differences]
    within = sum(difference.within for difference in differences)
    decided = verdicts.count("better") + verdicts.count("worse")
    return (
        f"{verdicts.count('better')} better, {verdicts.count('tie')} ties, {verdicts.count('worse')} worse; "
        f"{within} of {len(counted)} within 0.2 points (losses: 0.002) or better. "
        "A difference is positive where the torque is better. One such interval in 20 leaves out 0 by chance: "
        f"corrected for their number (Benjamini and Hochberg, 5%), {_corrected(differences)} of the {decided} that do "
        "remain."
    )


def _corrected(differences: list[Difference]) -> int:
    """How many differences are not 0 where at most 5% of those said to be so may be there by chance."""
    values = [difference.by_seed for difference in differences if len(set(difference.by_seed)) > 1]
    chances = [stats.ttest_1samp(value, 0.0).pvalue for value in values]
    return int((stats.false_discovery_control(chances) < 0.05).sum()) if chances else 0


def _rates(rates: list[tuple[float, float]]) -> str:
    same = sum(mine == theirs for theirs, mine in rates)
    lower = sum(mine < theirs for theirs, mine in rates)
    return (
        f"The best learning rate is the baseline's in {same} of {len(rates)}, lower on the grid in {lower}, "
        f"higher in {len(rates) - same - lower}."
    )


def page(folder: Path = FOLDER) -> str:
    """All of comparisons.md.

    Args:
        folder: Where the rows are.
    """
    return _PAGE.format(unnamed=_UNNAMED, sections=sections(folder), older=summary.table())


def sections(folder: Path = FOLDER) -> str:
    """All comparisons, by name."""
    return "\n\n".join(section(path, folder) for path in _plans())


def section(path: Path, folder: Path = FOLDER) -> str:
    """The tables of one comparison.

    Args:
        path: The plan.
        folder: Where its rows are.

    Returns:
        Markdown.
    """
    plan, rows = _read(path, folder)
    title = f"## {plan.name}\n\n{_purpose(path)} [Plan](../comparisons/{path.name})"
    if not rows:
        return f"{title}; not measured yet."
    results = outcomes(plan, rows)
    if not _is_finished(plan, results):
        return f"{title}; under way, [rows so far](compare-{plan.name}.jsonl)."
    link = f"[rows](compare-{plan.name}.jsonl)"
    facts = f"{title}, {len(rows)} runs: {link}{_where(rows)}. {printing.summary(plan, results)}"
    search = f"{plan.validation_metric} in the search, mean of {plan.search_seeds} seeds, the chosen in bold:"
    return "\n\n".join([facts, printing.table(plan, results), search, printing.curves(plan, results)])


def _purpose(path: Path) -> str:
    """The plan's first comment, as a sentence."""
    words: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# Purpose:"):
            words.append(line.partition(":")[2].strip())
        elif words and line.startswith("#  "):
            words.append(line.removeprefix("#").strip())
        elif words:
            break
    sentence = " ".join(words)
    return sentence[:1].upper() + sentence[1:]


def _read(path: Path, folder: Path) -> tuple[Plan, list[Row]]:
    plan = load_plan(path)
    return plan, Journal(folder / f"compare-{plan.name}.jsonl").of(plan)


def _plans() -> list[Path]:
    return sorted(PLANS.glob("*.yaml"))


def _where(rows: list[Row]) -> str:
    """What the rows were measured on, where any of them says it."""
    found = [row.get("environment") or {} for row in rows]
    places = {f"{place['device']}, torch {place['torch']}" for place in found if "device" in place}
    if places and any("device" not in place for place in found):
        places.add(f"{_UNNAMED} for {sum('device' not in place for place in found)} of them")
    return f" ({'; '.join(sorted(places))})" if places else ""


if __name__ == "__main__":
    print(page() if "--page" in sys.argv[1:] else overview())
