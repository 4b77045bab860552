"""Bytes and fidelity along an answer, as a picture. Imports no torch."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from kvbench.report.style import COLOURS

PANELS = {
    "bytes_held": "held on the device, MiB",
    "bytes_read": "read per token, MiB",
    "kl_full": "KL to the full cache, nats",
}
STROKES = ("-", "--", ":", "-.")


def curves(table: pd.DataFrame, window: int = 32) -> Figure:
    """A panel each for bytes held, bytes read and KL, over the tokens of the answer; the KL as a moving mean.

    `table` has the rows of `kvbench.measure.along`; contexts are averaged.
    """
    mean = table.groupby(["method", "token"], sort=False)[list(PANELS)].mean()
    figure = Figure(figsize=(4.2 * len(PANELS), 4.2), layout="constrained")
    axes = figure.subplots(1, len(PANELS))
    for axis, (field, title) in zip(axes, PANELS.items(), strict=True):
        for i, (method, rows) in enumerate(mean.groupby(level="method", sort=False)):
            line = rows[field].droplevel("method")
            line = line / 2**20 if field.startswith("bytes") else line.rolling(window, min_periods=1).mean()
            stroke = STROKES[i // len(COLOURS) % len(STROKES)]
            axis.plot(line, stroke, color=COLOURS[i % len(COLOURS)], lw=1.2, label=method)
        axis.set_xlabel("token of the answer")
        axis.set_title(title, fontsize=9)
        axis.set_yscale("linear" if field.startswith("bytes") else "log")
        axis.set_ylim(bottom=0 if field.startswith("bytes") else 1e-3)
        axis.tick_params(labelsize=8)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=7, frameon=False)
    return figure


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Means over the answer, and the peak of what is held: a row a method, bytes in MiB."""
    by = table.groupby("method", sort=False)
    found = by[["agree_full", "kl_full"]].mean()
    for field in ("bytes_held", "bytes_read", "bytes_moved"):
        found[field.replace("bytes_", "") + " MiB"] = by[field].mean() / 2**20
    found["peak MiB"] = by["bytes_held"].max() / 2**20
    return found.round(3)
