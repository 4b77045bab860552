"""The tidy table that `aggregate` makes, a row per cell and metric: its columns, its files, some of its rows.

Imports no torch. docs/statistics.md defines the columns.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from rich.markup import escape
from rich.table import Table

from kvbench.budget import Budget
from kvbench.errors import UsageError
from kvbench.plugins import known
from kvbench.report.terminal import terminal

BETTER: dict[str, Literal["higher", "lower"]] = {
    "score": "higher",
    "answer_nll": "lower",
    "kl_full": "lower",
    "agree_full": "higher",
}
RANGE = {"score": (0.0, 1.0), "answer_nll": (0.0, np.inf), "kl_full": (0.0, np.inf), "agree_full": (0.0, 1.0)}
BYTES = ("bytes_held", "bytes_full", "bytes_shared", "bytes_read", "bytes_offloaded", "tokens_kept", "tokens_context")
SECONDS = ("prefill_s", "compress_s", "ttft_s", "tpot_s", "joules_token")
ENDED = ("done", "running")  # cells that have results: all, or those so far
OWN = ("own_ratio", "own_ratio_low", "own_ratio_high")

COLUMNS = (
    *("cell", "folder", "method", "method_name", "family", "trust", "needs_calibration", "query_aware", "budget"),
    *("task", "task_name", "model", "protocol", "seed", "generate", "status", "reason"),
    *("metric", "better", "n", "clusters", "mean", "low", "high", "median", "interval"),
    *("vs_full", "vs_full_low", "vs_full_high", "n_full"),
    *("baseline", "vs_baseline", "vs_baseline_low", "vs_baseline_high", "n_baseline"),
    *("p", "test", "p_adjusted", "adjust", "declared", "flips", "win", "tie", "loss", "smallest_difference"),
    *(*BYTES[:2], "share", *BYTES[2:], "tiers", *SECONDS, *OWN),
    *("commit", "dirty", "version", "weights", "data", "hardware", "marks"),
)
SETTING = ("model", "protocol", "seed", "task", "generate")  # cells that differ in method and budget only share it
RUN = SETTING[:3]  # and cells of all tasks


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


def finished(rows: pd.DataFrame) -> pd.Series:
    """Which rows have all of their examples."""
    return rows["status"].eq("done") & rows["mean"].notna()


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


@cache
def budget_order(budget: str) -> tuple[str, float]:
    """By which budgets are sorted."""
    parsed = Budget.parse(budget)
    return parsed.unit, float(parsed.amount)


def write(table: pd.DataFrame, out: str | Path) -> tuple[Path, Path]:
    """`out`.parquet and `out`.csv; `tiers` as JSON."""
    flat = table.assign(tiers=table["tiers"].map(lambda tiers: json.dumps(tiers) if tiers else ""))
    parquet, csv = Path(f"{out}.parquet"), Path(f"{out}.csv")
    try:
        parquet.parent.mkdir(parents=True, exist_ok=True)
        flat.to_parquet(parquet, index=False)
        flat.to_csv(csv, index=False)
    except OSError as error:
        raise UsageError(f"could not write {parquet} and {csv}: {error.strerror}") from error
    return parquet, csv


def print_table(table: pd.DataFrame, rows: int = 40) -> None:
    """The score of each cell, or else its NLL, beside the baseline: what fits a screen, and how much more there is."""
    scored = table["cell"].isin(table["cell"][table["metric"] == "score"])
    main = table[table["metric"] == np.where(scored, "score", "answer_nll")]
    baseline = table["baseline"].iloc[0]
    shown = Table()
    left = ("task", "protocol", "method", "metric", "marks")
    for name in (*left[:3], "budget", "metric", "n", "mean", f"less {baseline}'s", "p adjusted", "+/=/-", "marks"):
        shown.add_column(name, justify="left" if name in left else "right")
    for row in main.head(rows).to_dict("records"):
        texts = [row[name] for name in ("task", "protocol", "method", "budget", "metric")]
        texts += [str(row["n"]), _between(row, "mean", "low", "high")]
        texts.append(_between(row, "vs_baseline", "vs_baseline_low", "vs_baseline_high"))
        tested = row["test"] != ""
        texts.append(f"{row['p_adjusted']:.2g} {row['adjust']}" if tested else "")
        texts.append(f"{row['win']}/{row['tie']}/{row['loss']}" if tested else "")
        texts.append(row["marks"] if row["status"] in ENDED else f"{row['status']}: {row['reason']}")
        shown.add_row(*map(escape, texts))
    console = terminal(190)
    console.print(shown)
    rest = f", {len(main) - rows} of them not shown" if len(main) > rows else ""
    commits = table["commit"].nunique()
    said = f"{len(main)} cells{rest}; {len(table)} rows in the files."
    console.print(said + (f" Records are of {commits} commits." if commits > 1 else ""), highlight=False)


def _between(row: Mapping[Any, Any], *names: str) -> str:
    mean, low, high = (row[name] for name in names)
    ends = "" if np.isnan(low) else f" [{low:.3f}, {high:.3f}]"
    return "" if np.isnan(mean) else f"{mean:.3f}{ends}"
