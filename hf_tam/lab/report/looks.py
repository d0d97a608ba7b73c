"""How the pictures of the report look: grounds, colours, line styles, legends."""

from __future__ import annotations

import itertools
import math
import textwrap
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from typing import Any, NamedTuple

# Okabe and Ito's colours, which the colour-blind can tell apart; the dark page has the lighter ones.
_COLOURS = {
    "light": ("#0072B2", "#D55E00", "#009E73", "#AA4499", "#56B4E9", "#B8860B"),
    "dark": ("#56B4E9", "#E69F00", "#2DC49A", "#E08FC0", "#F0E442", "#FF8A5C"),
}
_STYLES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "D", "P", "*", "h", "p", "X")
_PAGE = {"light": ("#ffffff", "#1b1f24", "#d5d9de"), "dark": ("#14181d", "#e4e8ec", "#3a424b")}
THEMES = ("light", "dark")
# What stands for a value that has no place on the axis: its marker, at which edge it is drawn, and which way from it.
NONFINITE = {"NaN": ("x", 0.03, 1), "+inf": ("^", 0.97, -1), "-inf": ("v", 0.03, 1)}
_LINE_LENGTH = 96


def ink(theme: str) -> str:
    """The colour of text."""
    return _PAGE[theme][1]


class Look(NamedTuple):
    """What tells one curve from another; `needs_marker` where only the marker does."""

    color: str
    linestyle: str
    marker: str
    needs_marker: bool

    def of_line(self, *, marker: bool = True) -> dict[str, Any]:
        """What matplotlib's lines take."""
        return {"color": self.color, "linestyle": self.linestyle, "marker": self.marker if marker else "",
                "markersize": 4, "linewidth": 1.8}  # fmt: skip


def curve_look(number: int, theme: str) -> Look:
    """The look of a curve: 192 numbers differ, the first 24 by colour and line style alone."""
    colours = _COLOURS[theme]
    once_round = math.lcm(len(colours), len(_STYLES))  # then each colour goes on with the other styles
    rounds = number // (2 * once_round)
    style = _STYLES[(number + number // once_round) % len(_STYLES)]
    return Look(colours[number % len(colours)], style, _MARKERS[rounds % len(_MARKERS)], rounds > 0)


def kind(value: float) -> str:
    """Which of `NONFINITE` a value is."""
    return "NaN" if math.isnan(value) else "+inf" if value > 0 else "-inf"


def new_figure(theme: str, panels: int, *, height: float = 3.2, columns: int = 3) -> tuple[Any, list[Any]]:
    """A figure with so many axes, `columns` of them beside each other."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    ground, text, line = _PAGE[theme]
    inks = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), text)
    columns = min(panels, columns)
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


def label_axes(panel: Any, horizontal: str, vertical: str) -> None:
    """Name the axes; steps are whole numbers, and names no mathematics."""
    from matplotlib.ticker import MaxNLocator

    panel.set_xlabel(horizontal)
    panel.set_ylabel(vertical, parse_math=False)
    panel.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def add_legend(figure: Any, labels: Mapping[int, str], theme: str, *, nonfinite: Collection[str] = ()) -> None:
    """Put a legend above the axes, whole: the figure grows by it, and long labels go on in a second line.

    Args:
        figure: what the curves are drawn in.
        labels: by the number of the curve. They are no mathematics, and may begin with an underscore.
        theme: light or dark.
        nonfinite: which marks of `NONFINITE` were drawn.
    """
    from matplotlib.lines import Line2D

    curves = [curve_look(number, theme) for number in labels]
    handles = [Line2D([], [], **look.of_line(marker=look.needs_marker)) for look in curves]
    marks = [mark for mark in NONFINITE if mark in nonfinite]
    handles += [Line2D([], [], color=ink(theme), linestyle="", marker=NONFINITE[mark][0]) for mark in marks]
    wrapped = [
        "\n".join(textwrap.wrap(label, _LINE_LENGTH, break_on_hyphens=False))
        for label in [*labels.values(), *(f"{mark}, at its step" for mark in marks)]
    ]
    columns = 110 // (6 + max((len(label) for label in wrapped), default=0))
    legend = figure.legend(
        handles, [str(number) for number in range(len(handles))], loc="outside upper left", frameon=False,
        ncols=max(1, min(4, columns)), handlelength=3.5, labelcolor=ink(theme),
    )  # fmt: skip
    for text, label in zip(legend.get_texts(), wrapped, strict=True):
        text.set_parse_math(False)
        text.set_text(label)
    width, height = figure.get_size_inches()
    with _without_warnings():
        figure.set_size_inches(width, height + legend.get_window_extent().height / figure.dpi)


def add_title(figure: Any, title: str, theme: str) -> None:
    """Say above the axes what they show; the figure grows by it."""
    lines = textwrap.wrap(title, _LINE_LENGTH, break_on_hyphens=False)
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=10, color=ink(theme), parse_math=False)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.2 * len(lines))


def to_png(figure: Any) -> bytes:
    """The picture of a figure."""
    target = BytesIO()
    with _without_warnings():
        figure.savefig(target, format="png", dpi=130)
    return target.getvalue()


@contextmanager
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a name in letters that the font lacks
        yield
