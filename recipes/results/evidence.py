"""The README's tables of comparisons: `python -m recipes.results.evidence`.

A comparison is a plan in recipes/comparisons/; its rows, as `hf-tam compare` wrote them, lie in this folder under the
same name. A plan without rows is said to be not measured yet.
"""

from __future__ import annotations

from pathlib import Path

from hf_tam.compare import printing
from hf_tam.compare.choosing import Row, outcomes
from hf_tam.compare.plan import load_plan
from hf_tam.compare.running import Journal

PLANS = Path(__file__).parents[1] / "comparisons"
FOLDER = Path(__file__).parent


def section(path: Path, folder: Path = FOLDER) -> str:
    """The tables of one comparison.

    Args:
        path: The plan.
        folder: Where its rows are.

    Returns:
        Markdown.
    """
    plan = load_plan(path)
    rows = Journal(folder / f"compare-{plan.name}.jsonl").of(plan)
    title = f"**{plan.name}** ([plan](recipes/comparisons/{path.name}))"
    if not rows:
        return f"{title}: not measured yet."
    results = outcomes(plan, rows)
    link = f"[rows](recipes/results/compare-{plan.name}.jsonl)"
    facts = f"{title}: {len(rows)} runs, {link}{_where(rows)}. {printing.summary(plan, results)}"
    search = f"{plan.validation_metric} in the search, mean of {plan.search_seeds} seeds, the chosen in bold:"
    return "\n\n".join([facts, printing.table(plan, results), search, printing.curves(plan, results)])


def _where(rows: list[Row]) -> str:
    """What the rows were measured on, where they say it."""
    found = [row["environment"] for row in rows if row.get("environment")]
    places = {f"{place['device']}, torch {place['torch']}" for place in found if "device" in place}
    return f" ({'; '.join(sorted(places))})" if places else ""


def sections(folder: Path = FOLDER) -> str:
    """All comparisons, by name."""
    return "\n\n".join(section(path, folder) for path in sorted(PLANS.glob("*.yaml")))


if __name__ == "__main__":
    print(sections())
