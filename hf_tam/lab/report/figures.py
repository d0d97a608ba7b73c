"""The pictures of the report, each in a light and in a dark form."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from hf_tam.lab.report import looks
from hf_tam.lab.report.grouping import Band, Group, Heatmap, band, heatmaps
from hf_tam.lab.report.looks import THEMES
from hf_tam.lab.report.reading import REWARDS

_NEUTRAL = 0.5
_MOST_LABELS = 48
_MOST_PANELS = 9
_MAPS = {"light": "RdBu_r", "dark": "berlin"}
_REWARD_UNITS = {
    "rewards/margins": ("margin (chosen - rejected)", 0.0),
    "rewards/accuracies": ("accuracy (pairs with margin > 0)", 0.5),
    "rewards/chosen": ("reward of chosen", 0.0),
    "rewards/rejected": ("reward of rejected", 0.0),
}


@dataclass
class Picture:
    """One picture: `name` for its file, `title` and `caption` for the page, PNG bytes by theme."""

    name: str
    title: str
    caption: str
    png: dict[str, bytes]


class Panel(NamedTuple):
    """What one pair of axes shows.

    Attributes:
        key: what was logged.
        unit: for the vertical axis.
        reference: where a faint line marks that nothing was learnt; the axis is linear then.
    """

    key: str
    unit: str
    reference: float | None = None


def draw_all(groups: list[Group]) -> list[Picture]:
    """Draw every picture that there are values for."""
    keys = list(dict.fromkeys(key for group in groups for run in group.runs for key in run.keys()))
    evaluated = _evaluation_keys(groups, keys)
    shown, others = evaluated[:_MOST_PANELS], [key.removeprefix("eval_") for key in evaluated[_MOST_PANELS:]]
    panels = [Panel(key, key.removeprefix("eval_").replace("_", " ")) for key in shown]
    rewards, sources = _reward_panels(groups, keys)
    norms = [Panel("grad_norm", "gradient norm (L2)")]
    norms_caption = "Of all gradients together, before clipping."
    others_caption = f"Not drawn: {', '.join(others)}." if others else ""
    drawn = [
        _curves_of("loss", "Training loss", "", groups, [Panel("loss", "training loss")]),
        _curves_of("evaluation", "Evaluation", others_caption, groups, panels),
        _curves_of("rewards", "Rewards", _rewards_caption(sources), groups, rewards, columns=sources),
        _curves_of("gradient-norm", "Gradient norm", norms_caption, groups, norms),
        _damping(groups),
    ]
    return [picture for picture in drawn if picture is not None] + _draw_heatmaps(groups)


def _evaluation_keys(groups: list[Group], keys: list[str]) -> list[str]:
    apart = (*REWARDS, "_runtime", "_per_second", "_num_tokens")
    wanted = [key for key in keys if key.startswith("eval_") and not key.endswith(apart)]
    return [key for key in wanted if any(band(group, key) for group in groups)]


def _reward_panels(groups: list[Group], keys: list[str]) -> tuple[list[Panel], list[str]]:
    """A row for each of the rewards, a column for training and each evaluation, and what the columns are."""
    logged = [(key, reward) for key in keys for reward in REWARDS if key.endswith(reward)]
    logged = [(key, reward) for key, reward in logged if any(band(group, key) for group in groups)]
    prefixes = sorted({key.removesuffix(reward) for key, reward in logged})  # training, which has none, is the first
    words = {prefix: _source(prefix) for prefix in prefixes}
    rewards = [reward for reward in REWARDS if any(reward == found for _, found in logged)]
    panels = [
        Panel(f"{prefix}{reward}", f"{_REWARD_UNITS[reward][0]},\n{words[prefix]}", _REWARD_UNITS[reward][1])
        for reward in rewards
        for prefix in prefixes
    ]
    return panels, list(words.values())


def _source(prefix: str) -> str:
    named = prefix.removeprefix("eval_").rstrip("_")
    return "training" if not prefix else f"evaluation {named}".rstrip() if prefix.startswith("eval_") else named


def _rewards_caption(sources: list[str]) -> str:
    return (
        f"Columns: {', '.join(sources)}; a row has one scale. Faint lines: chance for accuracies, else 0. In DPO the "
        "reward of a completion is beta times the logarithm of how much likelier it is than under the reference; TRL "
        "counts an accuracy of 0 where nothing differs yet."
    )


def _picture(name: str, title: str, caption: str, draw: Callable[[str], Any]) -> Picture:
    return Picture(name, title, caption, {theme: looks.to_png(draw(theme)) for theme in THEMES})


def _curves_of(
    name: str, title: str, caption: str, groups: list[Group], panels: list[Panel], *, columns: Sequence[str] = ()
) -> Picture | None:
    curves = [{number: curve for number, group in enumerate(groups) if (curve := band(group, panel.key))}
              for panel in panels]  # fmt: skip
    if not any(curves):
        return None

    def draw(theme: str) -> Any:
        height = 2.5 if columns else 3.2
        figure, axes = looks.new_figure(theme, len(panels), height=height, columns=len(columns) or 3)
        for axis, panel, drawn in zip(axes, panels, curves, strict=True):
            _draw_panel(axis, panel, drawn, theme)
        for start in range(0, len(axes) if columns else 0, len(columns) or 1):
            _share_scale(axes[start : start + len(columns)], curves[start : start + len(columns)])
        return _with_legend(figure, groups, curves, theme)

    return _picture(name, title, caption, draw)


def _draw_panel(axis: Any, panel: Panel, curves: Mapping[int, Band], theme: str) -> None:
    faint = min(0.22, 0.66 / max(1, len(curves)))  # many bands above each other would hide the lines
    for number, curve in curves.items():
        _draw_band(axis, curve, looks.curve_look(number, theme), faint, marked=panel.key.startswith("eval_"))
    broken = [number for number, curve in curves.items() if curve.nonfinite]
    for place, number in enumerate(broken):
        _mark_nonfinite(axis, curves[number], place, looks.curve_look(number, theme).color)
    values = [value for curve in curves.values() for value in curve.low + curve.high if math.isfinite(value)]
    unit = panel.unit
    if not values:
        axis.set_yticks([])
        words = "no finite value" if curves else "not logged"
        axis.text(0.5, 0.5, words, transform=axis.transAxes, ha="center", color=looks.ink(theme))
    elif panel.reference is not None:
        axis.axhline(panel.reference, color=looks.ink(theme), linewidth=1, linestyle=(0, (1, 3)))
    elif min(values) > 0.0 and max(values) > 10.0 * min(values):  # else most of the curve is pressed to the bottom
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        unit = f"{unit} (log scale)"
    looks.label_axes(axis, "optimizer step", unit)


def _share_scale(axes: Sequence[Any], curves: Sequence[Mapping[int, Band]]) -> None:
    drawn = [axis for axis, found in zip(axes, curves, strict=True) if found and len(axis.get_yticks())]
    for axis in drawn:
        axis.set_ylim(min(one.get_ylim()[0] for one in drawn), max(one.get_ylim()[1] for one in drawn))


def _damping(groups: list[Group]) -> Picture | None:
    curves = {}
    for number, group in enumerate(groups):
        curve = band(group, "torque/damping_mean")
        if curve is None:
            continue
        low, high = band(group, "torque/damping_p10"), band(group, "torque/damping_p90")
        if low is not None and high is not None and low.steps == high.steps == curve.steps:
            nonfinite = curve.nonfinite + low.nonfinite + high.nonfinite
            curve = Band(curve.steps, curve.mean, low.mean, high.mean, nonfinite)
        curves[number] = curve
    if not curves:
        return None

    def draw(theme: str) -> Any:
        figure, (axis,) = looks.new_figure(theme, 1)
        _draw_panel(axis, Panel("torque/damping_mean", "damping d (0.5: as AdamW)", _NEUTRAL), curves, theme)
        return _with_legend(figure, groups, [curves], theme)

    caption = "Line: mean over parameter tensors; band: from the 10th to the 90th percentile of the tensors."
    return _picture("damping", "Damping over time", caption, draw)


def _with_legend(figure: Any, groups: list[Group], curves: Sequence[Mapping[int, Band]], theme: str) -> Any:
    """Name what is drawn, and nothing else."""
    labels = {number: group.label for number, group in enumerate(groups) if any(number in found for found in curves)}
    bands = [curve for found in curves for curve in found.values()]
    kinds = {looks.kind(value) for curve in bands for _, value in curve.nonfinite}
    looks.add_legend(figure, labels, theme, nonfinite=kinds)
    return figure


def _draw_band(axis: Any, curve: Band, look: looks.Look, faint: float, *, marked: bool) -> None:
    """Draw a curve, interrupted where it has no finite value; a point between two such is a dot."""
    finite = [False, *map(math.isfinite, curve.mean), False]
    dots = {place for place in range(len(curve.steps)) if not (finite[place] or finite[place + 2])}
    if marked:
        dots.update(range(len(curve.steps)))
    elif look.needs_marker:
        dots.update(range(0, len(curve.steps), math.ceil(len(curve.steps) / 10)))
    axis.plot(curve.steps, curve.mean, markevery=sorted(dots), **look.of_line())
    if curve.low != curve.high:
        axis.fill_between(curve.steps, curve.low, curve.high, color=look.color, alpha=faint, linewidth=0)


def _mark_nonfinite(axis: Any, curve: Band, place: int, colour: str) -> None:
    """Mark NaN and infinities at the edges, the curves that have some a little above or below each other."""
    for kind, (marker, edge, towards) in looks.NONFINITE.items():
        steps = sorted({step for step, value in curve.nonfinite if looks.kind(value) == kind})
        if steps:
            heights = [edge + towards * 0.045 * (place % 20)] * len(steps)
            across = axis.get_xaxis_transform()
            axis.plot(steps, heights, marker, color=colour, markersize=5, transform=across, gid=kind)


def _draw_heatmaps(groups: list[Group]) -> list[Picture]:
    runs = [(run, group.label_of(run)) for group in groups for run in group.runs if run.torque]
    maps = {run.name: heatmaps(run) for run, _ in runs}
    cells = [v for found in maps.values() for one in found for row in one.values for v in row if v is not None]
    reach = max((abs(value - _NEUTRAL) for value in cells if math.isfinite(value)), default=0.0) or 0.01
    caption = "Mean damping of the tensors of each layer group; the colours mean the same in all heatmaps."
    if not all(map(math.isfinite, cells)):
        caption += " ×: NaN or infinite."  # noqa: RUF001
    return [
        _picture(
            f"heatmap-{number}",
            f"Damping by layer: {run.name}",
            caption if label == run.name else f"{label}. {caption}",
            partial(_heatmap, maps[run.name], reach, label if len(runs) > 1 else ""),
        )
        for number, (run, label) in enumerate(runs, start=1)
    ]


def _heatmap(maps: list[Heatmap], reach: float, title: str, theme: str) -> Any:
    rows = max(len(one.layers) for one in maps)
    height = max(2.6, 1.4 + 0.24 * min(rows, _MOST_LABELS))
    figure, axes = looks.new_figure(theme, len(maps), height=height, columns=2)
    image = None
    for panel, one in zip(axes, maps, strict=True):
        image = _draw_heatmap(panel, one, reach, theme)
    bar = figure.colorbar(image, ax=list(axes), fraction=0.04, pad=0.02)
    bar.set_label("damping d (0.5: as AdamW)", color=looks.ink(theme))
    bar.ax.tick_params(color=looks.ink(theme), labelcolor=looks.ink(theme))
    bar.outline.set_visible(False)
    if title:
        looks.add_title(figure, title, theme)
    return figure


def _draw_heatmap(panel: Any, one: Heatmap, reach: float, theme: str) -> Any:
    numbers = [[v if v is not None and math.isfinite(v) else math.nan for v in row] for row in one.values]
    edges = [one.steps[0] - (one.steps[1] - one.steps[0] if len(one.steps) > 1 else 1), *one.steps]
    image = panel.pcolormesh(
        edges, range(len(one.layers) + 1), numbers, cmap=_MAPS[theme], vmin=_NEUTRAL - reach, vmax=_NEUTRAL + reach
    )
    odd = [(row, column) for row, values in enumerate(one.values) for column, value in enumerate(values)
           if value is not None and not math.isfinite(value)]  # fmt: skip
    if odd:
        middles = [(edges[column] + edges[column + 1]) / 2 for _, column in odd]
        panel.plot(middles, [row + 0.5 for row, _ in odd], "x", color=looks.ink(theme), markersize=4, gid="NaN")
    every = math.ceil(len(one.layers) / _MOST_LABELS)
    places = range(0, len(one.layers), every)
    panel.set_yticks([place + 0.5 for place in places], [one.layers[place] for place in places], fontsize=8)
    panel.invert_yaxis()
    panel.grid(visible=False)
    for text in panel.get_yticklabels():
        text.set_parse_math(False)  # a $ in a name begins no formula
    panel.set_title(one.part or "all tensors", fontsize=10)
    some = f"{len(places)} of the {len(one.layers)} layer groups are named"
    looks.label_axes(panel, "optimizer step", some if every > 1 else "")
    return image
