"""The pictures of the report, each in a light and in a dark form."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from hf_tam.lab.report.grouping import Band, Group, Heatmap, band, heatmaps
from hf_tam.lab.report.reading import Run

_NEUTRAL = 0.5
_MOST_LABELS = 48
# Okabe and Ito's colours, which the colour-blind can tell apart; the dark page has the lighter ones.
_COLOURS = {
    "light": ("#0072B2", "#D55E00", "#009E73", "#AA4499", "#56B4E9", "#B8860B"),
    "dark": ("#56B4E9", "#E69F00", "#2DC49A", "#E08FC0", "#F0E442", "#FF8A5C"),
}
_STYLES = ("-", "--", ":", "-.")
_PAGE = {"light": ("#ffffff", "#1b1f24", "#d5d9de"), "dark": ("#14181d", "#e4e8ec", "#3a424b")}
_MAPS = {"light": "RdBu_r", "dark": "berlin"}
THEMES = ("light", "dark")


@dataclass
class Picture:
    """One picture: `name` for its file, `title` and `caption` for the page, PNG bytes by theme."""

    name: str
    title: str
    caption: str
    png: dict[str, bytes]


def draw_all(groups: list[Group]) -> list[Picture]:
    """Draw every picture that there are values for."""
    evaluations = _evaluation_keys(groups)
    wanted = [
        ("loss", "Training loss", ["loss"], ["training loss"]),
        (
            "evaluation",
            "Evaluation",
            evaluations,
            [key.removeprefix("eval_").replace("_", " ") for key in evaluations],
        ),
        ("gradient-norm", "Gradient norm", ["grad_norm"], ["gradient norm (L2)"]),
    ]
    pictures = []
    for name, title, keys, units in wanted:
        present = [(key, unit) for key, unit in zip(keys, units, strict=True) if any(band(g, key) for g in groups)]
        if present:
            png = {theme: _curves(groups, present, theme) for theme in THEMES}
            caption = "Of all gradients together, before clipping." if name == "gradient-norm" else ""
            pictures.append(Picture(name, title, caption, png))
    if any(band(group, "torque/damping_mean") for group in groups):
        png = {theme: _damping(groups, theme) for theme in THEMES}
        caption = "Line: mean over parameter tensors; band: from the 10th to the 90th percentile of the tensors."
        pictures.append(Picture("damping", "Damping over time", caption, png))
    return pictures + _draw_heatmaps(groups)


def _evaluation_keys(groups: list[Group]) -> list[str]:
    keys = dict.fromkeys(key for group in groups for run in group.runs for row in run.metrics for key in row)
    return [key for key in keys if key.startswith("eval_") and not key.endswith(("_runtime", "_per_second"))][:6]


def _curves(groups: list[Group], keys: Sequence[tuple[str, str]], theme: str) -> bytes:
    figure, axes = _new_figure(theme, len(keys))
    for panel, (key, unit) in zip(axes, keys, strict=True):
        curves = [(number, curve) for number, group in enumerate(groups) if (curve := band(group, key))]
        for number, curve in curves:
            _draw_band(panel, curve, number, theme, marked=key.startswith("eval_"))
        if _spans_magnitudes([value for _, curve in curves for value in curve.low + curve.high]):
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter("{x:g}")
            unit = f"{unit} (log scale)"
        _label(panel, "optimizer step", unit)
    return _finish(figure, [group.label for group in groups], theme)


def _spans_magnitudes(values: Sequence[float]) -> bool:
    """Whether a linear axis would press most of the curve against the bottom."""
    finite = [value for value in values if math.isfinite(value)]
    return bool(finite) and min(finite) > 0.0 and max(finite) > 10.0 * min(finite)


def _damping(groups: list[Group], theme: str) -> bytes:
    figure, (panel,) = _new_figure(theme, 1)
    shown = []
    for number, group in enumerate(groups):
        curve = band(group, "torque/damping_mean")
        if curve is None:
            continue
        low, high = band(group, "torque/damping_p10"), band(group, "torque/damping_p90")
        if low is not None and high is not None and low.steps == high.steps == curve.steps:
            curve = Band(curve.steps, curve.mean, low.mean, high.mean)
        _draw_band(panel, curve, number, theme)
        shown.append((number, group.label))
    panel.axhline(_NEUTRAL, color=_PAGE[theme][1], linewidth=1, linestyle=(0, (1, 3)))
    _label(panel, "optimizer step", "damping d (0.5: as AdamW)")
    return _finish(figure, [label for _, label in shown], theme, numbers=[number for number, _ in shown])


def _draw_band(panel: Any, curve: Band, number: int, theme: str, *, marked: bool = False) -> None:
    colours = _COLOURS[theme]
    colour = colours[number % len(colours)]
    marker = "o" if marked or len(curve.steps) == 1 else None
    style = _STYLES[number % len(_STYLES)]
    panel.plot(curve.steps, curve.mean, color=colour, linestyle=style, linewidth=1.8, marker=marker, markersize=4)
    if curve.low != curve.high:
        panel.fill_between(curve.steps, curve.low, curve.high, color=colour, alpha=0.22, linewidth=0)


def _draw_heatmaps(groups: list[Group]) -> list[Picture]:
    runs = [run for group in groups for run in group.runs if run.torque]
    maps = {run.name: heatmaps(run) for run in runs}
    values = [v for found in maps.values() for one in found for row in one.values for v in row if v is not None]
    reach = max((abs(value - _NEUTRAL) for value in values), default=0.0) or 0.01
    caption = "Mean damping of the tensors of each layer group; the colours mean the same in all heatmaps."
    return [
        Picture(
            f"heatmap-{number}",
            f"Damping by layer: {run.name}",
            caption,
            {theme: _heatmap(run, maps[run.name], reach, theme) for theme in THEMES},
        )
        for number, run in enumerate(runs, start=1)
    ]


def _heatmap(run: Run, maps: list[Heatmap], reach: float, theme: str) -> bytes:
    rows = max(len(one.layers) for one in maps)
    figure, axes = _new_figure(
        theme, len(maps), height=max(2.6, 1.4 + 0.24 * min(rows, _MOST_LABELS)), side_by_side=True
    )
    image = None
    for panel, one in zip(axes, maps, strict=True):
        numbers = [[math.nan if value is None else value for value in row] for row in one.values]
        edges = [one.steps[0] - (one.steps[1] - one.steps[0] if len(one.steps) > 1 else 1), *one.steps]
        image = panel.pcolormesh(
            edges, range(len(one.layers) + 1), numbers, cmap=_MAPS[theme], vmin=_NEUTRAL - reach, vmax=_NEUTRAL + reach
        )
        every = math.ceil(len(one.layers) / _MOST_LABELS)
        places = range(0, len(one.layers), every)
        panel.set_yticks([place + 0.5 for place in places], [one.layers[place] for place in places], fontsize=8)
        panel.invert_yaxis()
        panel.grid(visible=False)
        for text in panel.get_yticklabels():
            text.set_parse_math(False)  # a $ in a name begins no formula
        panel.set_title(one.part or "all tensors", fontsize=10)
        _label(panel, "optimizer step", "")
    bar = figure.colorbar(image, ax=list(axes), fraction=0.04, pad=0.02)
    ink = _PAGE[theme][1]
    bar.set_label("damping d (0.5: as AdamW)", color=ink)
    bar.ax.tick_params(color=ink, labelcolor=ink)
    bar.outline.set_visible(False)
    return _png(figure)


def _new_figure(theme: str, panels: int, *, height: float = 3.2, side_by_side: bool = False) -> tuple[Any, list[Any]]:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    ground, ink, line = _PAGE[theme]
    inks = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), ink)
    columns = min(panels, 2 if side_by_side else 3)
    rows = math.ceil(panels / columns)
    grounds = {"figure.facecolor": ground, "axes.facecolor": ground, "savefig.facecolor": ground}
    with rc_context(
        {**inks, **grounds, "axes.edgecolor": line, "grid.color": line, "axes.grid": True, "font.size": 9}
    ):
        figure = Figure(figsize=(9.5, height * rows), layout="constrained")
        axes = list(itertools.chain.from_iterable(figure.subplots(rows, columns, squeeze=False)))
    for unused in axes[panels:]:
        unused.remove()
    for panel in axes[:panels]:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(linewidth=0.6)
        panel.set_axisbelow(True)
    return figure, axes[:panels]


def _label(panel: Any, horizontal: str, vertical: str) -> None:
    from matplotlib.ticker import MaxNLocator

    panel.set_xlabel(horizontal)
    panel.set_ylabel(vertical)
    panel.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def _finish(figure: Any, labels: Sequence[str], theme: str, *, numbers: Sequence[int] | None = None) -> bytes:
    """Put the legend above the axes, and draw. Labels are no mathematics, and may begin with an underscore."""
    from matplotlib.lines import Line2D

    colours = _COLOURS[theme]
    numbers = range(len(labels)) if numbers is None else numbers
    handles = [
        Line2D([], [], color=colours[number % len(colours)], linestyle=_STYLES[number % len(_STYLES)], linewidth=1.8)
        for number in numbers
    ]
    legend = figure.legend(
        handles, [str(number) for number in numbers], loc="outside upper left", frameon=False,
        ncols=2 if max(map(len, labels), default=0) < 50 else 1, labelcolor=_PAGE[theme][1],
    )  # fmt: skip
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_parse_math(False)
        text.set_text(label if len(label) <= 100 else f"{label[:99]}…")
    return _png(figure)


def _png(figure: Any) -> bytes:
    target = BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a name in letters that the font lacks
        figure.savefig(target, format="png", dpi=130)
    return target.getvalue()
