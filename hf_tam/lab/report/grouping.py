"""Which runs belong together, and what their curves have in common."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

from hf_tam.lab.report.reading import SEEDS, ReportError, Run


@dataclass
class Group:
    """Runs that differ by their seed only, or that agree in the setting of `--group-by`."""

    label: str
    runs: list[Run]


class Band(NamedTuple):
    """A curve: at each step the mean over runs, and the least and the largest value."""

    steps: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


def group_runs(runs: list[Run], *, by: str | None = None) -> list[Group]:
    """Group runs by all their settings but the seed, or by one setting.

    Raises:
        ReportError: No run has the setting.
    """
    if by is not None and not any(by in run.settings for run in runs):
        known = sorted({key for run in runs for key in run.settings})
        raise ReportError(f"--group-by {by}: no run has such a setting (they have {', '.join(known) or 'none'}).")
    members: dict[str, list[Run]] = {}
    for run in runs:
        members.setdefault(_key(run, by), []).append(run)
    differing = [key for key in differing_settings(runs) if key not in SEEDS]
    return [Group(_label(group, differing, by), group) for group in members.values()]


def _key(run: Run, by: str | None) -> str:
    if by is not None:
        return show(run.settings.get(by))
    if not run.settings or not SEEDS & run.settings.keys():  # nothing tells that it is another seed of another run
        return run.name
    return json.dumps({key: value for key, value in run.settings.items() if key not in SEEDS}, sort_keys=True)


def _label(runs: list[Run], differing: list[str], by: str | None) -> str:
    if by is not None:
        label = f"{by}={show(runs[0].settings.get(by))}"
    elif len(runs) == 1 and not 0 < len(differing) <= 3:
        return runs[0].name
    else:
        shown = [f"{key}={show(runs[0].settings.get(key))}" for key in differing[:3]]
        label = ", ".join(shown) or runs[0].name
    return f"{label} ({len(runs)} runs)" if len(runs) > 1 else f"{label} ({runs[0].name})"


def differing_settings(runs: list[Run]) -> list[str]:
    """The names of the settings that are not the same in all runs."""
    names = dict.fromkeys(key for run in runs for key in run.settings)
    return [name for name in names if len({show(run.settings.get(name)) for run in runs}) > 1]


def show(value: Any) -> str:
    """A setting as text."""
    return "not given" if value is None else value if isinstance(value, str) else json.dumps(value, default=str)


def band(group: Group, key: str) -> Band | None:
    """The curve of a group, over the steps that all its runs with such values logged."""
    series = [values for run in group.runs if (values := run.series(key))]
    if not series:
        return None
    steps = sorted(set.intersection(*(set(values) for values in series)))
    columns = [[values[step] for values in series] for step in steps]
    return Band(steps, [fmean(column) for column in columns], [min(c) for c in columns], [max(c) for c in columns])


class Heatmap(NamedTuple):
    """The damping of layer groups over steps: one row a layer group, None where it was not logged."""

    part: str
    layers: list[str]
    steps: list[int]
    values: list[list[float | None]]


def heatmaps(run: Run) -> list[Heatmap]:
    """The heatmaps of a run: one, or with an adapter one for each of its matrices."""
    parts: dict[str, list[dict[str, Any]]] = {}
    for row in run.torque:
        match = re.search(r"\.(lora_[AB])$", row["group"])
        parts.setdefault(match[1] if match else "", []).append(row)
    return [_heatmap(part, rows) for part, rows in sorted(parts.items())]


def _heatmap(part: str, rows: list[dict[str, Any]]) -> Heatmap:
    layers = list(dict.fromkeys(row["group"].removesuffix(f".{part}") for row in rows))
    steps = sorted({row["step"] for row in rows})
    found = {(row["group"].removesuffix(f".{part}"), row["step"]): row.get("damping_mean") for row in rows}
    return Heatmap(part, layers, steps, [[found.get((layer, step)) for step in steps] for layer in layers])
