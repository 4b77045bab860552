"""The table that `measure=solo` ends with: a line per cell. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from kvbench.report.table import machine, method_label
from kvbench.report.terminal import terminal
from kvbench.store import SOLO, read_solo

COLUMNS = (
    *("method", "budget", "path", "own ms", "full's own ms", "ratio", "95 % interval", "prefill s", "compress s"),
    *("TTFT s", "ms/token", "95th pct", "held MiB", "of full", "working MiB"),
)


def row(record: dict[str, Any]) -> tuple[str, ...]:
    """The texts of `COLUMNS`."""
    ratio, interval = "none shows", ""
    if record["own_ratio"] is not None:
        ratio = f"{record['own_ratio']:.3f}"
        interval = f"{record['own_ratio_low']:.3f} to {record['own_ratio_high']:.3f}"
    seconds = (record[name] for name in ("prefill_s", "compress_s", "ttft_s"))
    return (
        method_label(record),
        record["identity"]["budget"],
        record["path"],
        *(f"{record[name] * 1e3:.2f}" for name in ("own_s", "own_full_s")),
        ratio,
        interval,
        *(f"{value:.2f}" for value in seconds),
        *(f"{record[name] * 1e3:.2f}" for name in ("tpot_s", "tpot_p95_s")),
        f"{record['bytes_held'] / 2**20:.2f}",
        f"{record['bytes_held'] / record['bytes_full']:.4f}",
        f"{record['bytes_working'] / 2**20:.2f}",
    )


def print_solo(folders: Sequence[Path], new: int) -> None:
    """Prints what was measured of cells, and where it is kept."""
    records = [read_solo(folder) for folder in folders]
    if not records:
        return
    first = records[0]
    task, model = first["identity"]["task"]["name"], first["identity"]["model"]["name"]
    where = f"{machine(first['process']['hardware'])}, threads: {first['threads']}, {first['steps']} steps in turn"
    title = f"Own time of caches: {task}, {first['tokens_context']:,} tokens, {model}; {where}"
    table = Table(title=title, title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("method", "path") else "right")
    for record in records:
        table.add_row(*row(record))
    console = terminal(190)
    console.print(table)
    if any(record["path"] == "decoded" for record in records):
        console.print("decoded: methods that act in time have no fast path; they attend over decoded rows.")
    done = "" if new else "nothing to do: this was measured already (redo=true does it again). "
    console.print(f"{done}{SOLO} in: {', '.join(map(str, folders))}", soft_wrap=True, markup=False, highlight=False)
