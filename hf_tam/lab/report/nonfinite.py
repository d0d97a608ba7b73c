"""Says in words where a run was NaN or infinite."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from hf_tam.lab.report.reading import Run, as_number

_MOST_STEPS = 5
_MOST_LAYERS = 3


def describe(run: Run) -> list[str]:
    """Return one sentence for what went wrong at the same steps: `loss is NaN from step 12 on`."""
    logged: dict[str, list[str]] = {}
    for key in run.keys():
        if (words := _where(run.series(key))) is not None:
            logged.setdefault(words, []).append(key)
    layers: dict[str, dict[int, float]] = {}
    for row in run.torque:
        if (number := as_number(row.get("damping_mean", ""))) is not None:
            layers.setdefault(row["group"], {})[row["step"]] = number
    dampings: dict[str, list[str]] = {}
    for layer, values in layers.items():
        if (words := _where(values)) is not None:
            dampings.setdefault(words, []).append(layer)
    return [
        *(f"{run.name}: {_listed(keys)} {_is(keys)} {words}." for words, keys in logged.items()),
        *(f"{run.name}: the damping of {_layers(names)} is {words}." for words, names in dampings.items()),
    ]


def _where(values: Mapping[int, float]) -> str | None:
    """What is not finite, and at which steps; None where everything is."""
    steps = sorted(values)
    odd = [step for step in steps if not math.isfinite(values[step])]
    if not odd:
        return None
    kinds = {"NaN" if math.isnan(values[step]) else "infinite" for step in odd}
    what = " or ".join(sorted(kinds))
    if odd == steps:
        return f"{what} at every step that it was logged at, from {odd[0]} on"
    if len(odd) > 1 and odd == steps[-len(odd) :]:
        return f"{what} from step {odd[0]} on"
    if len(odd) <= _MOST_STEPS:
        return f"{what} at step{'s' if len(odd) > 1 else ''} {_listed([str(step) for step in odd])}"
    return f"{what} at {len(odd)} of {len(steps)} logged steps, first at {odd[0]} and last at {odd[-1]}"


def _is(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _layers(names: Sequence[str]) -> str:
    if len(names) <= _MOST_LAYERS:
        return _listed(names)
    return f"{', '.join(names[:_MOST_LAYERS])} and {len(names) - _MOST_LAYERS} more layer groups"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
