"""Quality against what it costs, drawn: a line a method, and the Pareto frontier. Imports no torch.

The numbers are those of `kvbench.report.frontier`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from kvbench.cell import slug
from kvbench.report.frontier import COSTS, QUALITIES, Panel, areas, points, reach
from kvbench.report.names import file_names, short
from kvbench.report.style import COLOURS, COLUMN, GREY, INK, STYLE, save, spread, width

HUES = COLOURS[:-1]  # black is the frontier's
FEW = 8  # so many methods all have a colour and a marker, some a colour twice
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STROKES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))


def write(found: Sequence[Panel], out: Path) -> list[Path]:
    """Figures and tables of panels: `out`-<task>-<protocol>.png, .pdf and .svg, `out`-points.csv and `out`-area.csv."""
    look, files = looks(found), []
    for panel, name in zip(found, file_names([panel.points.iloc[0] for panel in found]), strict=True):
        files += save(draw(panel, look), out.with_name(f"{out.name}-{name}"))
    for what, table in (("points", points(found)), ("area", areas(found))):
        files.append(out.with_name(f"{out.name}-{what}.csv"))
        table.to_csv(files[-1], index=False)
    return files


@dataclass(frozen=True)
class Look:
    colour: str
    marker: str = ""
    stroke: Any = "-"


def looks(found: Sequence[Panel]) -> dict[str, Look]:
    """How each method looks that figures highlight: the same in all of them, and no two the same in one."""
    together = [highlighted(panel) for panel in found]
    number: dict[str, int] = {}
    for name in sorted({name for names in together for name in names}):
        near = {number[other] for names in together if name in names for other in names if other in number}
        hues = Counter(i % len(HUES) for i in near)
        free = set(range(len(HUES) * len(MARKERS))) - near
        number[name] = min(free, key=lambda i: (hues[i % len(HUES)], i))
    return {
        name: Look(HUES[i % len(HUES)], MARKERS[i % len(MARKERS)], STROKES[i // len(HUES) % len(STROKES)])
        for name, i in number.items()
    }


def highlighted(panel: Panel) -> list[str]:
    """All of a few methods; of many those on the frontier, and those that dominate most, one for each colour."""
    points = panel.points
    if points["method"].nunique() <= FEW:
        return sorted(points["method"].unique())
    on = points.loc[points["on_frontier"], "method"].unique()
    size = {method: panel.area(part)[0] for method, part in points.groupby("method", sort=True) if method not in on}
    others = sorted(size, key=lambda method: -size[method])
    return sorted([*on, *others[: max(0, len(HUES) - len(on))]])


def draw(panel: Panel, look: dict[str, Look]) -> Figure:
    """A panel at the width of a column. Every method's name stands where its line ends; bold: on the frontier."""
    with matplotlib.rc_context(STYLE):
        return _draw(panel, look)


def _draw(panel: Panel, look: dict[str, Look]) -> Figure:
    points, sign = panel.points, panel.sign
    bright = highlighted(panel)
    on = set(points.loc[points["on_frontier"], "method"])
    texts = short(list(points["method"].unique()), 22)
    size = 6.5 if len(texts) <= 12 else 5.5
    gap = 1.2 * size / 72
    left, bottom, top = (0.48 if sign > 0 else 0.66), 0.56, 0.22
    right = 0.33 + max(width(text, size, label in on) for label, text in texts.items())
    tall = max(1.75, gap * len(texts))
    figure = Figure(figsize=(COLUMN, tall + bottom + top))
    high = tall + bottom + top
    axis = figure.add_axes((left / COLUMN, bottom / high, 1 - (left + right) / COLUMN, tall / high))
    _scales(axis, panel)
    labels = []
    for method in sorted(texts):
        line, mine = points[points["method"] == method], look[method] if method in bright else Look(GREY)
        _line(axis, panel, line, mine, band=method in on or len(texts) <= FEW)
        end = line["cost"].iloc[-1], sign * line["quality"].iloc[-1]
        labels.append(_Label(texts[method], end, mine, method in on))
    legend: dict[str, Any] = {"frontier, 95 % band": _frontier(axis, panel)}
    if panel.full:
        middle, low, up = (sign * number for number in panel.full)
        legend["full cache"] = axis.axhline(middle, color=INK, ls=(0, (1, 1)), lw=0.9, zorder=3, gid="full")
        axis.axhspan(low, up, color=INK, alpha=0.05, lw=0, zorder=0)
    _names(axis, labels, size, gap / tall, COLUMN - left - right)
    figure.text(0.01, 1 - 0.05 / high, panel.title, va="top", size=7)
    axis.set_xlabel(COSTS[panel.x][0], labelpad=1, loc="left")
    axis.set_ylabel(QUALITIES[panel.metric] + ("" if sign > 0 else "\n(lower is better)"), labelpad=2)
    corner: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0.0, 0.0), "borderaxespad": 0.1}
    style: dict[str, Any] = {"ncols": 2, "frameon": False, "fontsize": 7, "handlelength": 1.8, "columnspacing": 1.2}
    figure.legend(list(legend.values()), list(legend), **corner, **style)
    return figure


def _line(axis: Axes, panel: Panel, line: pd.DataFrame, look: Look, band: bool) -> None:
    """A method's points: in grey without a marker of its own."""
    cost, value = line["cost"], panel.sign * line["quality"]
    style: dict[str, Any] = {"color": look.colour, "gid": f"method-{slug(line['method'].iloc[0])}"}
    if not look.marker:
        axis.plot(cost, value, lw=0.4, marker=".", ms=2, mew=0, alpha=0.8, zorder=2, **style)
        return
    axis.plot(cost, value, ls=look.stroke, lw=1.1, marker=look.marker, ms=4, mec="white", mew=0.4, zorder=4, **style)
    if band:
        axis.fill_between(cost, *panel.shown(line), color=look.colour, alpha=0.13, lw=0, zorder=1)
    if panel.x == "own_ratio":  # the only cost that has an interval of its own
        axis.hlines(value, line["own_ratio_low"], line["own_ratio_high"], color=look.colour, lw=0.7, zorder=4)


def _frontier(axis: Axes, panel: Panel) -> tuple[Any, Any]:
    """The frontier up to the reference's cost, and where all of it lies with 95 %: a band and a line."""
    cost = panel.points["cost"].to_numpy(float)
    lines = []
    for quality in (panel.points["quality"].to_numpy(float), *panel.limits(panel.points)):
        costs, best = reach(cost, quality)
        lines.append((np.append(costs, max(costs[-1], panel.reference[0])), panel.sign * np.append(best, best[-1])))
    grid = np.unique(np.concatenate([costs for costs, _ in lines]))
    low, high = (best[np.searchsorted(costs, grid, side="right") - 1] for costs, best in lines[1:])
    style: dict[str, Any] = {"step": "post", "color": INK, "alpha": 0.12, "lw": 0, "zorder": 1, "gid": "frontier-band"}
    band = axis.fill_between(grid, low, high, **style)
    (line,) = axis.step(*lines[0], where="post", color=INK, lw=1.2, zorder=3, gid="frontier")
    return band, line


def _scales(axis: Axes, panel: Panel) -> None:
    """Costs on a log axis; so is KL, down to its smallest decade, with 0 at the end of a linear piece below."""
    axis.set_xscale("log")
    cost = panel.points["cost"]
    low, high = cost.min(), max(cost.max(), min(panel.reference[0], 4 * cost.max()))
    pad = (high / low) ** 0.04
    axis.set_xlim(low / pad, high * pad)
    ticks = _ticks(low / pad, high * pad)
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.xaxis.set_minor_locator(NullLocator())
    shown = panel.sign * np.append(panel.points["quality"].to_numpy(float), panel.full[0] if panel.full else [])
    if panel.metric == "kl_full" and (shown > 0).any():
        least = 10 ** np.floor(np.log10(shown[shown > 0].min()))
        axis.set_yscale("symlog", linthresh=least, linscale=0.3)
        axis.set_ylim(-0.3 * least, 2 * shown.max())
    else:
        bottom, above = min(shown.min(), 0.0 if panel.metric == "score" else np.inf), shown.max()
        axis.set_ylim(bottom - 0.04 * (above - bottom), above + 0.06 * (above - bottom))


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers for a log axis, three or more where there are so many."""
    tens = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ("1", "125", "12357"):
        ticks = [float(f"{step}e{ten}") for ten in tens for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            break
    return ticks


@dataclass(frozen=True)
class _Label:
    text: str
    end: tuple[float, float]  # of the line, in data
    look: Look
    bold: bool


def _names(axis: Axes, labels: Sequence[_Label], size: float, gap: float, wide: float) -> None:
    """Names right of the axes, each as near to its line's end as the others let it, and a thread to it.

    `gap` is a share of the axes' height, `wide` their width in inches.
    """
    ends = axis.transAxes.inverted().transform(axis.transData.transform([label.end for label in labels]))
    heights = spread(ends[:, 1], gap, 0.0, 1.0)
    thread, mark, text = (1 + inches / wide for inches in (0.12, 0.18, 0.24))
    for label, (x, y), height in zip(labels, ends, heights, strict=True):
        at: dict[str, Any] = {"transform": axis.transAxes, "color": label.look.colour, "clip_on": False}
        axis.plot([x, 1.0, thread], [y, y, height], lw=0.3, zorder=1, **at)
        axis.plot([mark], [height], label.look.marker or "None", ms=3.5, mew=0, **at)
        colour = label.look.colour if label.look.marker else "#555555"
        weight = "bold" if label.bold else "normal"
        axis.text(
            text, height, label.text, transform=axis.transAxes, va="center", size=size, color=colour, weight=weight
        )
