"""Needles in a haystack as a picture: how the score depends on context length and depth. Imports no torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from kvbench.errors import UsageError
from kvbench.report.table import method_label
from kvbench.store import cells, read_cell


def needles(results: Path, field: str = "score") -> pd.DataFrame:
    """A row per asked needle: cell (method and budget), context (tokens), depth (0..1), and the example's `field`."""
    rows = []
    for folder in cells(results):
        header, records = read_cell(folder)
        name = f"{method_label(header)}, {header['identity']['budget']}, {header['identity']['protocol']}"
        for record in records:
            info = record["info"]
            if record.get(field) is not None and "depths" in info and "context" in info:
                rows += [(name, info["context"], depth, record[field]) for depth in info["depths"]]
    if not rows:
        raise UsageError(f"no records of task=niah with {field} in {results}")
    return pd.DataFrame(rows, columns=["cell", "context", "depth", field])


def heatmap(table: pd.DataFrame, field: str = "score", bins: int = 5) -> Figure:
    """One panel per cell: context length across, depth down, the mean of `field` and how many needles it is of."""
    table = table.assign(row=(table["depth"] * bins).astype(int).clip(upper=bins - 1))
    names = sorted(table["cell"].unique())
    lengths = sorted(table["context"].unique())
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    size = (max(2.6, 0.8 * len(lengths) + 1.4) * columns, 2.6 * rows)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    low, high = (0, 1) if field == "score" else (table[field].min(), table[field].max())
    for axis, name in zip(axes.flat, names, strict=False):
        part = table[table["cell"] == name]
        mean, count = (
            part.pivot_table(index="row", columns="context", values=field, aggfunc=what)
            .reindex(index=range(bins), columns=lengths)
            .to_numpy()
            for what in ("mean", "count")
        )
        image = axis.imshow(mean, vmin=low, vmax=high, cmap="viridis", aspect="auto")
        for (i, j), value in np.ndenumerate(mean):
            if count[i, j] > 0:
                dark = (value - low) / max(high - low, 1e-9) < 0.6
                text = f"{value:.2f}\n(n={count[i, j]:.0f})"
                axis.text(j, i, text, ha="center", va="center", fontsize=6, color="white" if dark else "black")
        axis.set_title(name, fontsize=8)
        axis.set_xticks(range(len(lengths)), [str(length) for length in lengths], fontsize=7)
        depths = [f"{100 * i / bins:.0f}-{100 * (i + 1) / bins:.0f} %" for i in range(bins)]
        axis.set_yticks(range(bins), depths, fontsize=7)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    figure.supxlabel("context (tokens)", fontsize=8)
    figure.supylabel("depth of the needle", fontsize=8)
    figure.colorbar(image, ax=axes, shrink=0.8, label=field)
    return figure
