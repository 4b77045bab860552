"""Quality against what it costs, as numbers: the Pareto frontier and the area it dominates. Imports no torch.

Everything is made from the table of `kvbench.report.aggregate`: what is uncertain is what its intervals say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from scipy import stats

from kvbench.errors import UsageError
from kvbench.plugins import known
from kvbench.report.names import short
from kvbench.report.tidy import RANGE, RUN, SETTING, alone, finished

# Column -> what it is called, and what a unit of it is.
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
    rows = rows.assign(usable=finished(rows) & (rows[x] > 0))
    if not rows["usable"].any():
        raise UsageError(f"no finished cell has {metric} and {x}")
    found = []
    for _, run in rows.groupby(list(RUN), sort=True):
        tasks = [part for _, part in run.groupby(["task", "generate"], sort=True) if part["usable"].any()]
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
    rows = pd.concat([part[part["usable"]] for part in tasks])
    cell = ["method", "method_name", "budget"]
    every = rows.groupby(cell)["task"].transform("count") == len(tasks)
    squares = {"low": (rows["mean"] - rows["low"]) ** 2, "high": (rows["high"] - rows["mean"]) ** 2}
    by = rows.assign(**squares)[every].groupby(cell, sort=True, as_index=False)
    found = by.agg({"mean": "mean", x: "mean", "low": "sum", "high": "sum", "n": "sum", "clusters": "sum"})
    found["low"] = found["mean"] - np.sqrt(found["low"]) / len(tasks)
    found["high"] = found["mean"] + np.sqrt(found["high"]) / len(tasks)
    for key in (*RUN, "metric", "better"):
        found[key] = tasks[0][key].iloc[0]
    return found.assign(
        task=f"mean of {len(tasks)} tasks",
        task_name="mean",
        generate=True,
        status="done",
        usable=True,
        others=int((~every).sum()),
        folder="",
    )


def _panel(rows: pd.DataFrame, x: str, reference: tuple[float, float] | None) -> Panel | None:
    if rows.empty:
        return None
    about = rows.iloc[0]
    alone(rows)
    sign = 1 if about["better"] == "higher" else -1
    ends = ["low", "high"] if sign > 0 else ["high", "low"]
    points = rows[rows["usable"]].assign(
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
    left = rows.loc[~rows["usable"], "status"].replace("done", f"without {x}").value_counts()
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
