"""The table a run ends with: one line per cell, from its records. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from kvbench import plugins
from kvbench.store import read_cell

COLUMNS = {
    "score": ("score", "{:.3f}"),
    "answer_nll": ("NLL", "{:.3f}"),
    "kl_full": ("KL to full", "{:.3f}"),
    "agree_full": ("top-1", "{:.3f}"),
    "tokens_kept": ("tokens kept", "{:.0f}"),
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
    for name in ("method", "trust", "budget", "n", "bytes held", "of full", *(title for title, _ in COLUMNS.values())):
        table.add_column(name, justify="left" if name in ("method", "trust") else "right")
    for folder in folders:
        header, records = read_cell(folder)
        held, full = mean(records, "bytes_held"), mean(records, "bytes_full")
        file = files.get(header["identity"]["method"]["name"])  # None: another folder's plugin
        trust = plugins.about(file).traits.get("trust", "") if file else ""
        row = [header["label"], trust, header["identity"]["budget"], str(len(records))]
        row += [f"{held:,.0f}", f"{held / full:.4f}"] if held and full else ["", ""]
        for field, (_, form) in COLUMNS.items():
            value = mean(records, field)
            scaled = value / 2**20 if value is not None and field == "bytes_shared" else value
            row.append("" if scaled is None else form.format(scaled))
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console.width = 160
    console.print(table)
    done = "" if new else "nothing to do: these records are complete (redo=true makes them again). "
    where = ", ".join(map(str, folders)) if len(folders) <= 4 else f"{folders[0].parent}/ ({len(folders)} cells)"
    console.print(f"{done}Records: {where}", soft_wrap=True, markup=False, highlight=False)
