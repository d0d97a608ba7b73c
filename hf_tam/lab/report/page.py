"""The page itself."""

from __future__ import annotations

import base64
import math
from pathlib import Path
from typing import Any

from hf_tam.lab.report.figures import Picture, draw_all
from hf_tam.lab.report.grouping import Group, apart, differing_settings, group_runs, show
from hf_tam.lab.report.looks import THEMES
from hf_tam.lab.report.nonfinite import describe
from hf_tam.lab.report.reading import REWARDS, ReportError, Run, read_runs

# What is shown first of the final metrics, and in which unit.
_UNITS = {
    "tokens_per_second": "tokens per second",
    "samples_per_second": "samples per second",
    "peak_gpu_memory_mib": "peak GPU memory, allocated (MiB)",
    "peak_process_memory_mib": "peak memory of the main process (MiB)",
    "seconds": "seconds in all",
}
_FINAL = ("optimizer", "strategy", "trained_parameters", "training_records", "steps", "train_loss", "damping_mean")
_ABSENT = "–"  # noqa: RUF001


def write_report(folders: list[Path], output: Path, *, by: str | None = None) -> list[Path]:
    """Write the page and, beside it, its pictures as PNG files.

    Returns:
        The files written, the page first.

    Raises:
        ReportError: A run cannot be read, or the page cannot be written.
    """
    runs = read_runs(folders)
    groups = group_runs(runs, by=by)
    pictures = draw_all(groups)
    page = _render(runs, groups, pictures)
    files = {output: page.encode()}
    for picture in pictures:
        for theme in THEMES:
            suffix = "" if theme == "light" else "-dark"
            files[output.with_name(f"{output.stem}-{picture.name}{suffix}.png")] = picture.png[theme]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        for path, content in files.items():
            path.write_bytes(content)
    except OSError as error:
        raise ReportError(f"{output} cannot be written: {error.strerror}.") from error
    return list(files)


def _render(runs: list[Run], groups: list[Group], pictures: list[Picture]) -> str:
    from jinja2 import Environment

    template = Path(__file__).with_name("page.html.j2").read_text(encoding="utf-8")
    undrawn = [
        f"{group.label}: {', '.join(keys)} cannot be drawn, since its runs logged it at no step that they share."
        for group in groups
        if (keys := apart(group))
    ]
    differing = differing_settings(runs)
    everything = sorted({name for run in runs for name in run.settings})
    encoded = [
        {"title": picture.title, "caption": picture.caption}
        | {theme: base64.b64encode(picture.png[theme]).decode() for theme in THEMES}
        for picture in pictures
    ]
    return (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(template)
        .render(
            runs=[run.name for run in runs],
            notices=[*undrawn, *(notice for run in runs for notice in [*describe(run), *run.notices])],
            has_bands=any(len(group.runs) > 1 for group in groups),
            pictures=encoded,
            finals=_finals(runs),
            differing=[(name, [show(run.settings.get(name)) for run in runs]) for name in differing],
            same=[
                (name, show(next(run.settings[name] for run in runs if name in run.settings)))
                for name in everything
                if name not in differing
            ],
        )
    )


def _finals(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """One row a metric: its name with the unit, and the value of every run."""
    names = dict.fromkeys(key for run in runs for key in run.facts)
    measured = [name for name in names if name.startswith(("eval_", "test_")) and not name.endswith("_runtime")]
    chosen = [*_FINAL, *(name for name in measured if not name.endswith("_per_second")), *REWARDS, *_UNITS]
    units = _UNITS | {name: f"{name} (last logged in training)" for name in REWARDS}
    return [
        (units.get(name, name.replace("_", " ")), [_number(run.facts.get(name, _ABSENT)) for run in runs])
        for name in chosen
        if name in names
    ]


def _number(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, float):
        return "NaN" if math.isnan(value) else f"{value:,.0f}" if 1000 <= abs(value) < math.inf else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
