"""Quality against what it costs: a line a method, the Pareto frontier and the area it dominates. Imports no torch.

Everything is made from the table of `kvbench.report.aggregate`: what is uncertain is what its intervals say.
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
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from scipy import stats

from kvbench.cell import slug
from kvbench.errors import UsageError
from kvbench.plugins import known
from kvbench.report.aggregate import RANGE
from kvbench.report.curves import COLOURS
from kvbench.report.style import COLUMN, GREY, INK, SETTING, STYLE, file_names, save, short, spread, width

# Column -> what an axis says, and what a unit of it is.
COSTS = {
    "share": ("bytes held, share of full cache", 1.0),
    "bytes_held": ("bytes held, MiB", 2.0**20),
    "bytes_read": ("bytes read per token, MiB", 2.0**20),
    "bytes_offloaded": ("bytes in the host's memory, MiB", 2.0**20),
    "tokens_kept": ("tokens kept per KV head", 1.0),
    "prefill_s": ("prefill, s", 1.0),
    "compress_s": ("planning and packing, s", 1.0),
    "ttft_s": ("time to first token, s", 1.0),
    "tpot_s": ("time per token, s", 1.0),
    "own_ratio": ("own time per token, share of full cache's", 1.0),
    "joules_token": ("energy per token, J", 1.0),
}
QUALITIES = {
    "score": "score",
    "answer_nll": "NLL of the reference, nats/token",
    "kl_full": "KL to the full cache, nats",
    "agree_full": "top-1 agreement with the full cache",
}
RUN = SETTING[:3]
HUES = COLOURS[:-1]  # black is the frontier's
FEW = 8  # so many methods all have a colour and a marker, some a colour twice
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STROKES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))

Points = Float[np.ndarray, " points"]


def frontier(cost: Points, quality: Points, alike: float = 0.0) -> Bool[np.ndarray, " points"]:
    """The points that no other beats: at least as cheap and as good, and better in one of the two.

    Costs that differ by no more than a share `alike` count as equal.
    """
    least, most = cost[:, None], cost * (1 + alike)  # [i, j]: is i beaten by j?
    better = quality - quality[:, None]
    return ~((cost <= least * (1 + alike)) & (better >= 0) & ((most < least) | (better > 0))).any(axis=1)


def reach(cost: Points, quality: Points) -> tuple[Float[np.ndarray, " rises"], Float[np.ndarray, " rises"]]:
    """The best quality at each cost or less: costs at which it rises, and what it rises to."""
    order = np.lexsort((-quality, cost))
    best = np.maximum.accumulate(quality[order])
    rises = np.diff(best, prepend=-np.inf) > 0
    return cost[order][rises], best[rises]


def area(cost: Points, quality: Points, reference: tuple[float, float]) -> float:
    """The area that points dominate, up to the reference (cost, quality): decades of cost x quality.

    The integral, over log10 of the cost up to the reference's, of the best quality that is reached, less the
    reference's, where it is above it.
    """
    costs, best = reach(cost, quality)
    steps = np.diff(np.log10(np.append(costs, np.inf).clip(max=reference[0])))
    return float((steps * (best - reference[1]).clip(min=0)).sum())


@dataclass(frozen=True)
class Panel:
    """What one figure shows. Quality is the metric's mean, negative where lower is better; `low`, `high` likewise."""

    title: str
    metric: str
    better: str
    x: str
    points: pd.DataFrame  # method, budget, cost, quality, low, high, on_frontier, ...
    full: tuple[float, float, float] | None  # the full cache's quality, low, high
    reference: tuple[float, float]  # cost, quality
    left_out: str  # which cells are not shown, in words

    @property
    def sign(self) -> int:
        return 1 if self.better == "higher" else -1

    def shown(self, points: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
        """Low and high as the metric has them."""
        low, high = self.sign * points["low"], self.sign * points["high"]
        return (low, high) if self.sign > 0 else (high, low)

    def limits(self, points: pd.DataFrame) -> tuple[Points, Points]:
        """Low and high of points that hold for all of them at once with 95 %: their intervals, widened (Bonferroni).

        A point of one cluster has no interval: it may lie anywhere.
        """
        freedom = points["clusters"].to_numpy(float) - 1
        wider = stats.t.isf(0.025 / len(points), freedom) / stats.t.isf(0.025, freedom)
        mean, low, high = (points[name].to_numpy(float) for name in ("quality", "low", "high"))
        least, most = sorted(self.sign * bound for bound in RANGE[self.metric])
        least, most = min(least, *mean), max(most, *mean)  # some tasks' scores pass 1
        low, high = mean - wider * (mean - low), mean + wider * (high - mean)
        low = np.where(np.isnan(low), np.minimum(mean, self.reference[1]), low)
        return low.clip(least, most), np.where(np.isnan(high), most, high).clip(least, most)

    def area(self, points: pd.DataFrame) -> tuple[float, float, float]:
        """The dominated area, and an interval for it."""
        cost = points["cost"].to_numpy(float)
        qualities = (points["quality"].to_numpy(float), *self.limits(points))
        found = [area(cost, quality, self.reference) for quality in qualities]
        return found[0], found[1], found[2]


def chosen(table: pd.DataFrame, tasks: Sequence[str] = (), methods: Sequence[str] = ()) -> pd.DataFrame:
    """The rows of some tasks and methods, by name or label; of methods the full cache, too. None named: all."""
    for what, names in (("task", tasks), ("method", methods)):
        there = set(table[what]) | set(table[f"{what}_name"])
        for name in names:
            known(f"{what} in these results", name, sorted(there))
    if tasks:
        table = table[table["task"].isin(tasks) | table["task_name"].isin(tasks)]
    if methods:
        table = table[table["method"].isin(methods) | table["method_name"].isin([*methods, "full"])]
    return table


def alone(rows: pd.DataFrame) -> None:
    """Refuses two cells where tables and figures have room for one: they differ in what neither shows."""
    where = [*SETTING, "method", "budget"]
    twice = rows[rows.duplicated(where, keep=False)].sort_values(where, kind="stable")
    if len(twice):
        one, other = twice.iloc[0], twice.iloc[1]
        raise UsageError(
            f"two cells are {one['method']} at {one['budget']} in {one['task']}, {one['protocol']}, {one['model']}: "
            f"{one['folder']} and {other['folder']}; keep one of them"
        )


def panels(
    table: pd.DataFrame, metric: str = "score", x: str = "share", reference: tuple[float, float] | None = None
) -> list[Panel]:
    """A panel for each model, protocol, seed and task; and, of more than one task, one for their average.

    `reference` is where areas end: a cost and a value of the metric, as the axes show them. Otherwise the full cache's
    cost, and 0, or where lower is better the worst mean of the panel.
    """
    known("metric", metric, QUALITIES)
    known("x", x, COSTS)
    rows = table[table["metric"] == metric]
    if x not in rows or not _usable(rows, x).any():
        raise UsageError(f"no finished cell has {metric} and {x}")
    found = []
    for _, run in rows.groupby(list(RUN), sort=True):
        tasks = [part for _, part in run.groupby(["task", "generate"], sort=True) if _usable(part, x).any()]
        found += [_panel(part, x, reference) for part in tasks]
        # A task that was run with answers and without is one task: the one with answers, which comes last.
        once = {part["task"].iloc[0]: part for part in tasks}
        if len(once) > 1:
            found.append(_panel(average(list(once.values()), x), x, reference))
    return [panel for panel in found if panel is not None]


def average(tasks: Sequence[pd.DataFrame], x: str) -> pd.DataFrame:
    """One row for each method and budget that has been finished for every task: the means over tasks.

    Tasks weigh the same, and count as independent: the squared half-widths of their intervals add up.
    """
    rows = pd.concat([part[_usable(part, x)] for part in tasks])
    by = rows.groupby(["method", "method_name", "budget"], sort=True)
    every = by["task"].transform("count") == len(tasks)
    squares = {"low": (rows["mean"] - rows["low"]) ** 2, "high": (rows["high"] - rows["mean"]) ** 2}
    by = rows.assign(**squares)[every].groupby(["method", "method_name", "budget"], sort=True)
    found = by.agg(
        {"mean": "mean", x: "mean", "low": "sum", "high": "sum", "n": "sum", "clusters": "sum"}
    ).reset_index()
    found["low"] = found["mean"] - np.sqrt(found["low"]) / len(tasks)
    found["high"] = found["mean"] + np.sqrt(found["high"]) / len(tasks)
    for key in (*RUN, "metric", "better"):
        found[key] = tasks[0][key].iloc[0]
    return found.assign(
        task=f"mean of {len(tasks)} tasks",
        task_name="mean",
        generate=True,
        status="done",
        others=int((~every).sum()),
        folder="",
    )


def _usable(rows: pd.DataFrame, x: str) -> pd.Series:
    return rows["status"].eq("done") & rows["mean"].notna() & rows[x].gt(0)


def _panel(rows: pd.DataFrame, x: str, reference: tuple[float, float] | None) -> Panel | None:
    if rows.empty:
        return None
    about = rows.iloc[0]
    alone(rows)
    usable = _usable(rows, x)
    sign = 1 if about["better"] == "higher" else -1
    ends = ["low", "high"] if sign > 0 else ["high", "low"]
    points = rows[usable].assign(
        cost=rows[x] / COSTS[x][1], quality=sign * rows["mean"], low=sign * rows[ends[0]], high=sign * rows[ends[1]]
    )
    full = points[points["method_name"] == "full"]
    points = points[points["method_name"] != "full"].sort_values(["method", "cost"])
    if points.empty:
        return None
    if reference is None:
        most = 1.0 if x in ("share", "own_ratio") else float(full["cost"].max() if len(full) else points["cost"].max())
        reference = most, 0.0 if sign > 0 else -float(points["quality"].min())
    reference = reference[0], sign * reference[1]
    # Budgets are met to a part in a thousand: to be that much cheaper is no merit.
    first = frontier(points["cost"].to_numpy(float), points["quality"].to_numpy(float), alike=0.01)
    points["on_frontier"] = first & (points["cost"] < reference[0]) & (points["quality"] > reference[1])
    left = rows.loc[~usable, "status"].replace("done", f"without {x}").value_counts()
    return Panel(
        title=_title(points),
        metric=str(about["metric"]),
        better=str(about["better"]),
        x=x,
        points=points,
        full=tuple(full[["quality", "low", "high"]].iloc[0]) if len(full) else None,
        reference=reference,
        left_out=", ".join(f"{count} {what}" for what, count in left.sort_index().items()),
    )


def _title(points: pd.DataFrame) -> str:
    about, n = points.iloc[0], points["n"]
    count = f"{n.min():.0f}" if n.nunique() == 1 else f"{n.min():.0f} to {n.max():.0f}"
    return ", ".join([short([about["task"]])[about["task"]], about["protocol"], about["model"], f"n = {count}"])


def write(found: Sequence[Panel], out: Path) -> list[Path]:
    """Figures and tables of panels: `out`-<task>-<protocol>.png, .pdf and .svg, `out`-points.csv and `out`-area.csv."""
    look, files = looks(found), []
    for panel, name in zip(found, file_names([panel.points.iloc[0] for panel in found]), strict=True):
        files += save(draw(panel, look), out.with_name(f"{out.name}-{name}"))
    for what, table in (("points", points(found)), ("area", areas(found))):
        files.append(out.with_name(f"{out.name}-{what}.csv"))
        table.to_csv(files[-1], index=False)
    return files


def summary(found: Sequence[Panel]) -> str:
    """What a terminal shows: per panel the frontier, the largest areas, and what is not drawn or to be wary of."""
    table, blocks = areas(found), []
    for panel in found:
        about, drawn = panel.points.iloc[0], panel.points
        mine = table[(table[list(SETTING)] == about[list(SETTING)]).all(axis=1)]
        mine = mine.sort_values("area", ascending=False, kind="stable").head(8)
        lines = [panel.title]
        x, y = mine["reference_x"].iloc[0], mine["reference_y"].iloc[0]
        lines.append(
            f"  area dominated up to {panel.x} {x:g}, {panel.metric} {y:g} (log10 of {panel.x} x {panel.metric}):"
        )
        lines += [f"  {row.area:8.3f} [{row.low:.3f}, {row.high:.3f}]  {row.method}" for row in mine.itertuples()]
        on = drawn[drawn["on_frontier"]].sort_values("cost")
        lines.append("  on the frontier: " + (", ".join(f"{p.method} {p.budget}" for p in on.itertuples()) or "none"))
        if "others" in drawn:
            lines.append(f"  {len(drawn)} cells that all tasks have; {about['others']} that some lack are left out")
        if panel.left_out:
            lines.append(f"  not drawn: {panel.left_out}")
        marks = drawn.get("marks", pd.Series(dtype=str)).fillna("").str.split("; ").explode()
        lines += [f"  {count} cells: {mark}" for mark, count in marks[marks.ne("")].value_counts().items()]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def points(found: Sequence[Panel]) -> pd.DataFrame:
    """What figures show, a row a point: `x` in the axis's unit, the metric's mean with its interval."""
    first = [*SETTING, "method", "budget", "metric", "mean", "low", "high", "n"]
    rows = []
    for panel in found:
        part = panel.points.assign(**dict(zip(("low", "high"), panel.shown(panel.points), strict=True)))
        rows.append(part[first].assign(x_name=panel.x, x=part["cost"], on_frontier=part["on_frontier"]))
    return pd.concat(rows, ignore_index=True)


def areas(found: Sequence[Panel]) -> pd.DataFrame:
    """The area that each method dominates, and all of them together (`frontier`), with 95 % intervals."""
    rows = []
    for panel in found:
        about = panel.points.iloc[0]
        parts = [("frontier", panel.points), *panel.points.groupby("method", sort=True)]
        for method, points in parts:
            value, low, high = panel.area(points)
            rows.append(
                {key: about[key] for key in SETTING}
                | {"metric": panel.metric, "x": panel.x, "method": method, "cells": len(points)}
                | {"area": value, "low": low, "high": high}
                | {"reference_x": panel.reference[0], "reference_y": panel.sign * panel.reference[1]}
            )
    return pd.DataFrame(rows)


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
