"""Which runs belong together, and what their curves have in common."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

from hf_tam.lab.report.reading import LOGGED_RATE, SEEDS, ReportError, Run, as_number

# What a label names first; it names three of the settings that differ, or as many as tell the groups apart.
_FIRST = ("optim", "learning_rate", LOGGED_RATE, "optim_args", "model_name_or_path", "dataset_name", "lora_r")
_NAMED = 3


@dataclass
class Group:
    """Runs that differ by their seed only, or that agree in the setting of `--group-by`."""

    label: str
    runs: list[Run]

    def label_of(self, run: Run) -> str:
        """What one of the runs is called where it is drawn alone."""
        return self.label if len(self.runs) == 1 else f"{run.name}, of {self.label}"


class Band(NamedTuple):
    """A curve: at each step the mean over runs, and the least and the largest value.

    The mean is NaN where one of the runs is NaN or infinite, the others are of the finite ones. `nonfinite` has every
    such value of any run, with its step.
    """

    steps: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]
    nonfinite: tuple[tuple[int, float], ...] = ()


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
    named = _named(runs, differing) if by is None else [by]
    texts = {name: _texts(runs, name) for name in named}
    more = 0 if by is not None else len(differing) - len(named)
    return [Group(_label(group, texts, more), group) for group in members.values()]


def _key(run: Run, by: str | None) -> str:
    if by is not None:
        return show(run.settings.get(by))
    if not run.settings or not SEEDS & run.settings.keys():  # nothing tells that it is another seed of another run
        return run.name
    return json.dumps({key: value for key, value in run.settings.items() if key not in SEEDS}, sort_keys=True)


def _named(runs: list[Run], differing: list[str]) -> list[str]:
    """The settings that the labels name."""

    def told_apart(names: list[str]) -> int:
        return len({tuple(show(run.settings.get(name)) for name in names) for run in runs})

    chosen: list[str] = []
    for name in sorted(differing, key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST)):
        if len(chosen) < _NAMED or told_apart([*chosen, name]) > told_apart(chosen):
            chosen.append(name)
    return chosen


def _texts(runs: list[Run], name: str) -> dict[str, str]:
    """What a label says for each value of a setting: numbers with four digits, if these tell them apart."""
    values = {show(run.settings.get(name)): run.settings.get(name) for run in runs}
    short = {text: f"{value:.4g}" if isinstance(value, float) else text for text, value in values.items()}
    return short if len(set(short.values())) == len(short) else {text: text for text in values}


def _label(runs: list[Run], texts: dict[str, dict[str, str]], more: int) -> str:
    first = runs[0]
    known = [name for name in texts if name in first.settings or not first.is_partial]
    shown = [f"{name}={texts[name][show(first.settings.get(name))]}" for name in known]
    if more:
        shown.append(f"{more} more differ")
    if not shown and len(runs) == 1:
        return first.name
    if not shown:
        names = [run.name for run in runs]
        shown = names if len(names) <= _NAMED else [names[0], f"{names[1]} and {len(names) - 2} more"]
    return f"{', '.join(shown)} ({f'{len(runs)} runs' if len(runs) > 1 else first.name})"


def differing_settings(runs: list[Run]) -> list[str]:
    """The names of the settings that are not the same in all runs, as far as that is known."""
    names = dict.fromkeys(key for run in runs for key in run.settings)
    return [
        name
        for name in names
        if len({show(run.settings.get(name)) for run in runs if name in run.settings or not run.is_partial}) > 1
    ]


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
    finite = [[value for value in column if math.isfinite(value)] for column in columns]
    nonfinite = [(step, value) for values in series for step, value in values.items() if not math.isfinite(value)]
    if not steps and not nonfinite:
        return None
    return Band(
        steps,
        [fmean(kept) if len(kept) == len(column) else math.nan for kept, column in zip(finite, columns, strict=True)],
        [min(kept, default=math.nan) for kept in finite],
        [max(kept, default=math.nan) for kept in finite],
        tuple(sorted(nonfinite, key=lambda pair: pair[0])),
    )


def apart(group: Group) -> list[str]:
    """What runs of a group logged at no step that all of them have, so that they have no curve in common."""
    keys = dict.fromkeys(key for run in group.runs for key in run.keys())
    return [key for key in keys if band(group, key) is None and any(run.series(key) for run in group.runs)]


class Heatmap(NamedTuple):
    """The damping of layer groups over steps: one row a layer group, None where it was not logged, NaN as logged."""

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
    found = {
        (row["group"].removesuffix(f".{part}"), row["step"]): as_number(row["damping_mean"])
        for row in rows
        if "damping_mean" in row
    }
    return Heatmap(part, layers, steps, [[found.get((layer, step)) for step in steps] for layer in layers])
