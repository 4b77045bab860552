"""Which cells of a column are the best, and which can't be told from them on the same examples. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kvbench.report.records import sub_task
from kvbench.report.statistics import Clusters, intervals
from kvbench.report.tidy import RANGE, finished
from kvbench.store import read_cell

Row = dict[Any, Any]  # of the tidy table


@dataclass(frozen=True)
class Column:
    """Cells that are compared: one for each method, asked the same examples."""

    title: str
    cells: dict[str, Row]  # by method; the full cache is not among them
    full: Row | None
    best: frozenset[str]  # methods
    near: frozenset[str]


Read = Callable[[str], pd.DataFrame]  # a cell's folder -> its examples


def compared(title: str, rows: pd.DataFrame, read: Read) -> Column:
    """`rows` of the tidy table, one metric, as a column: with what is best, and what can't be told from it."""
    cells = {row["method"]: row for row in rows[rows["method_name"] != "full"].to_dict("records")}
    done = rows[finished(rows)]
    fulls = done[done["method_name"] == "full"].to_dict("records")
    means = done[done["method_name"] != "full"].set_index("method")["mean"]
    best: list[str] = []
    near: set[str] = set()
    if len(means):
        top = means.max() if done["better"].iloc[0] == "higher" else means.min()
        best = list(means.index[means == top])
        examples = {name: read(cells[name]["folder"]) for name in means.index if means[name] != top}
        near = alike(examples, read(cells[min(best)]["folder"]), RANGE[done["metric"].iloc[0]][1])
    return Column(title, cells, fulls[0] if fulls else None, frozenset(best), frozenset(near))


def alike(others: Mapping[str, pd.DataFrame], best: pd.DataFrame, widest: float) -> set[str]:
    """The cells whose paired difference from the best has an interval that contains 0, or too few documents for one.

    `widest` is how far two values can be apart.
    """
    same: dict[tuple[str, ...], list[str]] = {}  # cells that share the same examples with the best
    for name, cell in others.items():
        same.setdefault(tuple(best.index.intersection(cell.index, sort=False)), []).append(name)
    found = set()
    for ids, names in same.items():
        if ids:
            theirs = best.loc[list(ids)]
            differences = [others[name].loc[list(ids), "value"] - theirs["value"] for name in names]
            clusters = Clusters(list(theirs["cluster"]), list(theirs["sub_task"]))
            matrix, rng = np.stack(differences, axis=1).astype(float), np.random.default_rng(0)
            each = intervals(matrix, clusters, rng, bounds=(-widest, widest))
            found |= {name for name, one in zip(names, each, strict=True) if not (one.low > 0 or one.high < 0)}
    return found


def values(folder: Path, metric: str) -> pd.DataFrame:
    """The examples of a cell: value, cluster and sub-task, by id."""
    _, records = read_cell(folder)
    rows = [
        (record["id"], record[metric], record["cluster_id"], sub_task(record["info"]))
        for record in records
        if record.get(metric) is not None
    ]
    return pd.DataFrame(rows, columns=["id", "value", "cluster", "sub_task"]).set_index("id")
