"""The table a run ends with: one line per cell, from its records. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from kvbench import plugins
from kvbench.list import axis
from kvbench.report.table import method_label
from kvbench.report.terminal import terminal
from kvbench.store import read_cell

COLUMNS = {
    "score": ("score", "{:.3f}"),
    "answer_nll": ("NLL", "{:.3f}"),
    "kl_full": ("KL to full", "{:.3f}"),
    "agree_full": ("top-1", "{:.3f}"),
    "tokens_kept": ("tokens kept", "{:.0f}"),
    "bytes_read": ("read/step MiB", "{:.2f}"),
    "bytes_moved": ("moved/step MiB", "{:.2f}"),
    "bytes_shared": ("shared MiB", "{:.2f}"),
    "compress_s": ("compress s", "{:.3f}"),
    "ttft_s": ("TTFT s", "{:.2f}"),
    "tpot_s": ("s/token", "{:.3f}"),
}


def mean(records: Sequence[dict[str, Any]], name: str) -> float | None:
    """The mean of a field over the records that have it."""
    values = [record[name] for record in records if record.get(name) is not None]
    return fmean(values) if values else None


def print_summary(folders: Sequence[Path], new: int) -> None:
    """Prints the means of finished cells, and where their records are."""
    first = read_cell(folders[0])[0]["identity"]
    title = f"{first['task']['name']}, {first['model']['name']}, {first['protocol']}"
    table = Table(title=title, title_justify="left")
    files = plugins.files("methods")
    rows = []
    for folder in folders:
        header, records = read_cell(folder)
        file = files.get(header["identity"]["method"]["name"])  # None: another folder's plugin
        row = {"method": method_label(header), "trust": "", "budget of": ""}
        if file:
            row |= {"trust": plugins.about(file).traits.get("trust", ""), "budget of": axis(file)}
        row |= {"budget": header["identity"]["budget"], "n": str(len(records))}
        held, full = mean(records, "bytes_held"), mean(records, "bytes_full")
        row |= {"bytes held": f"{held:,.0f}", "of full": f"{held / full:.4f}"} if held and full else {}
        for field, (name, form) in COLUMNS.items():
            value = mean(records, field)
            scaled = value / 2**20 if value is not None and field.startswith("bytes") else value
            if scaled or field not in ("bytes_shared", "bytes_moved"):
                row[name] = "" if scaled is None else form.format(scaled)
        rows.append(row)
    left = ("method", "trust", "budget of")
    every = (*left, "budget", "n", "bytes held", "of full", *(name for name, _ in COLUMNS.values()))
    names = [name for name in every if any(row.get(name) for row in rows)]
    for name in names:
        table.add_column(name, justify="left" if name in left else "right")
    for row in rows:
        table.add_row(*(row.get(name, "") for name in names))
    console = terminal(160)
    console.print(table)
    done = "" if new else "nothing to do: these records are complete (redo=true makes them again). "
    where = ", ".join(map(str, folders)) if len(folders) <= 4 else f"{folders[0].parent}/ ({len(folders)} cells)"
    console.print(f"{done}Records: {where}", soft_wrap=True, markup=False, highlight=False)
