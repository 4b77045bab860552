"""Where the bytes of caches went: rows by tier and metadata, and the tokens they hold. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvbench.errors import UsageError
from kvbench.report.names import file_names, short
from kvbench.report.style import COLOURS, COLUMN, STYLE, save, width
from kvbench.report.table import examples
from kvbench.report.tidy import SETTING

# What a bar is made of: its colour, and its hatching, by which it can be told in grey.
PARTS = {
    "exact rows": (COLOURS[0], ""),
    "other tiers": (COLOURS[1], "/////"),
    "metadata": ("#000000", ""),
    "in the host's memory": ("#CCCCCC", "....."),
}
MEANS = ("bytes_held", "bytes_full", "bytes_metadata", "bytes_offloaded", "tokens_context")


def anatomy(table: pd.DataFrame, results: Path, budget: str) -> pd.DataFrame:
    """A row per finished cell of a budget: bytes by part as shares of the full cache's, tokens of the context's.

    An exact row weighs what a row of the full cache does; what is left of the payload belongs to the other tiers.
    `tiers` names these.
    """
    rows = table[table["budget"].eq(budget) & table["status"].eq("done")].drop_duplicates("cell")
    if rows.empty:
        known = ", ".join(sorted(table["budget"].unique()))
        raise UsageError(f"no finished cell at budget {budget}; there are: {known}")
    found = []
    for _, cell in rows.iterrows():
        records = examples({results / cell["folder"]: None})
        mean = records.reindex(columns=list(MEANS)).mean().fillna(0.0)  # a field that a record lacks is 0
        tiers = pd.DataFrame(list(records["tiers"])).fillna(0.0).mean() / mean["tokens_context"]
        tiers = tiers[tiers > 0]
        metadata = mean["bytes_metadata"] / mean["bytes_full"]
        payload = mean["bytes_held"] / mean["bytes_full"] - metadata
        exact = min(float(tiers.get("exact", 0.0)), payload)
        found.append(
            {key: cell[key] for key in (*SETTING, "task_name", "method", "budget", "cell")}
            | {"exact rows": exact, "other tiers": payload - exact, "metadata": metadata}
            | {"in the host's memory": mean["bytes_offloaded"] / mean["bytes_full"]}
            | {f"tokens {name}": share for name, share in tiers.items()}
            | {"tiers": ", ".join(sorted(str(name) for name in tiers.index if name != "exact"))}
        )
    return pd.DataFrame(found)


def write(table: pd.DataFrame, results: Path, budget: str, out: Path) -> list[Path]:
    """A figure for each task, protocol, model and seed: `out`-<task>-<protocol>.png, .pdf, .svg; and `out`.csv."""
    found = anatomy(table, results, budget)
    parts = [part for _, part in found.groupby(list(SETTING), sort=True)]
    files = []
    for part, name in zip(parts, file_names([part.iloc[0] for part in parts]), strict=True):
        files += save(draw(part), out.with_name(f"{out.name}-{name}"))
    files.append(out.with_name(f"{out.name}.csv"))
    found.to_csv(files[-1], index=False)
    return files


def draw(found: pd.DataFrame) -> Figure:
    """Bars of cells that differ in method only, at the width of a column unless names are long: bytes left, tokens
    right."""
    with matplotlib.rc_context(STYLE):
        return _draw(found)


def _draw(found: pd.DataFrame) -> Figure:
    about, rows = found.iloc[0], found.sort_values("method", ascending=False)
    names = short(list(rows["method"])).values()
    labels = [f"{name}\n{tiers}" if tiers else name for name, tiers in zip(names, rows["tiers"], strict=True)]
    size = 7.0 if len(labels) <= 12 else 5.5
    lines = [line for label in labels for line in label.split("\n")]
    left, right, top, bottom, between = 0.1 + max(width(line, size) for line in lines), 0.08, 0.36, 0.5, 0.2
    pitch = 1.5 if len(lines) == len(labels) else 2.6  # between bars, in heights of the letters
    tall, wide = pitch * size / 72 * len(labels), max((COLUMN - left - right - between) / 2, 0.9)
    high, across = tall + top + bottom, left + right + between + 2 * wide
    figure = Figure(figsize=(across, high))
    named = {"tokens exact": "exact rows", "tokens host": "in the host's memory"}
    tokens = rows.filter(like="tokens ").fillna(0.0).rename(columns=lambda name: named.get(name, "other tiers"))
    shares = tokens.T.groupby(level=0).sum().T
    sides = {"bytes / full cache": (rows, labels), "tokens / context": (shares, [])}
    handles: dict[str, Any] = {}
    for column, (title, (parts, ticks)) in enumerate(sides.items()):
        axis = figure.add_axes(((left + column * (wide + between)) / across, bottom / high, wide / across, tall / high))
        handles |= _bars(axis, parts)
        axis.set_title(title, fontsize=6.5, pad=2)
        axis.set_yticks(range(len(ticks)), ticks, fontsize=size)
        axis.set_ylim(-0.6, len(labels) - 0.4)
        axis.tick_params(axis="y", length=0)
        axis.tick_params(axis="x", labelsize=6)
    title = f"{about['task']}, {about['protocol']}, {about['model']}, budget {about['budget']}"
    figure.text(0.01, 1 - 0.05 / high, title, va="top", size=7)
    style: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0.0, 0.0), "frameon": False, "fontsize": 6.5}
    ordered = [name for name in PARTS if name in handles]
    figure.legend([handles[n] for n in ordered], ordered, ncols=2, columnspacing=1.2, borderaxespad=0.1, **style)
    return figure


def _bars(axis: Axes, parts: pd.DataFrame) -> dict[str, Any]:
    start, handles = np.zeros(len(parts)), {}
    for name, (colour, hatch) in PARTS.items():
        if name in parts and (parts[name] > 0).any():
            length = parts[name].to_numpy(float)
            handles[name] = axis.barh(
                range(len(parts)), length, left=start, height=0.74, color=colour, hatch=hatch, ec="white", lw=0.2
            )
            start = start + length
    axis.set_xlim(0, 1.03 * start.max())
    return handles
