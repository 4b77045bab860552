"""From records to the tidy table: a row per cell and metric, with intervals and paired differences. Imports no torch.

    table = aggregate("results", baseline="snapkv", families={"main": "vector* score"})

docs/statistics.md says what is computed, and why. Nothing is averaged over cells, and of two cells only the examples
that both have are compared. What a reader should know of a row stands in its `marks`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from numpy import ndarray

from kvbench import plugins
from kvbench.errors import UsageError
from kvbench.report.records import CellRecords, read_records
from kvbench.report.statistics import (
    Clusters,
    Interval,
    benjamini_hochberg,
    holm,
    intervals,
    p_values,
    smallest_difference,
    win_tie_loss,
)
from kvbench.report.tidy import BETTER, COLUMNS, RANGE, budget_order
from kvbench.store import cells

COUNTS = ("n", "clusters", "n_full", "n_baseline", "win", "tie", "loss")  # 0 where nothing was compared
WORDS = ("interval", "test", "adjust", "declared")  # and empty
FORM = "method budget task model protocol metric"  # what patterns of families are held against


def aggregate(
    results: str | Path,
    baseline: str = "full",
    families: Mapping[str, str] | None = None,
    resamples: int | None = None,
) -> pd.DataFrame:
    """The tidy table of a results folder: `COLUMNS`, a row per cell and metric (docs/statistics.md).

    `baseline` is a method as tables name it (`snapkv`, `vector(base=keydiff)`). `families` are the comparisons with it
    that were declared beforehand: a name, and a pattern of "method budget task model protocol metric", as in
    `{"main": "vector* 0.1 * score"}`; p-values are adjusted by Holm in each, and by Benjamini-Hochberg over all others
    of a metric. `resamples` are those of the p-values; by default as many as the corrections ask for.
    """
    results = Path(results).expanduser()
    found = [read_records(folder, results) for folder in cells(results)]
    if not found:
        raise UsageError(f"no cells in {results}")
    if twice := [digest for digest, count in Counter(cell.digest for cell in found).items() if count > 1]:
        folders = [cell.facts["folder"] for cell in found if cell.digest == twice[0]]
        raise UsageError(f"one cell is in {len(folders)} folders, {' and '.join(folders)}: keep one of them")
    plugins.known("baseline", baseline, sorted({cell.facts["method"] for cell in found}))
    groups = [(group, _rows(group, baseline)) for group in _groups(found)]
    rows = [row for _, some in groups for row in some]
    corrected = _families(rows, families or {})
    tests = max((len(members) for members in corrected.values()), default=1)
    for group, some in groups:
        _estimate(group, some, tests, resamples)
    for (how, name), members in corrected.items():
        p = np.array([row.found.get("p", np.nan) for row in members])
        for row, adjusted in zip(members, (holm if how == "holm" else benjamini_hochberg)(p), strict=True):
            row.found |= {"p_adjusted": adjusted, "adjust": how, "declared": name if how == "holm" else ""}
    table = pd.DataFrame([_columns(row, baseline) for row in rows], columns=list(COLUMNS))
    order = ["task", "model", "protocol", "generate", "seed", "metric", "method", "budget"]
    return table.sort_values(order, key=_sorted, kind="stable", ignore_index=True)


def _sorted(column: pd.Series) -> pd.Series:
    return column.map(budget_order) if column.name == "budget" else column


# -- who is compared with whom --


@dataclass(frozen=True)
class _Group:
    """Cells that were asked the same examples: all that is of each example stands at the same place."""

    cells: list[CellRecords]
    at: dict[str, Int[ndarray, " _"]]  # by digest: the places of a cell's examples
    n: int
    marks: list[str]

    def values(self, cell: CellRecords, metric: str) -> Float[ndarray, " all"]:
        """NaN where the cell has no such number."""
        values = np.full(self.n, np.nan)
        values[self.at[cell.digest]] = cell.values[metric]
        return values


@dataclass
class _Row:
    """A row in the making, and the columns of numbers that its intervals are of."""

    cell: CellRecords
    metric: str
    marks: list[str]
    values: Float[ndarray, " examples"] | None = None
    full: Float[ndarray, " examples"] | None = None  # differences from the full cache
    base: Float[ndarray, " examples"] | None = None  # the same column where the full cache is the baseline
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What patterns of families are held against: `FORM`."""
        facts = self.cell.facts | {"metric": self.metric}
        return " ".join(facts[part] for part in FORM.split())

    @property
    def columns(self) -> list[tuple[tuple[str, ...], Float[ndarray, " examples"]]]:
        """The columns that have numbers, and of what."""
        if self.base is self.full:
            named = {("values",): self.values, ("full", "base"): self.full}
        else:
            named = {("values",): self.values, ("full",): self.full, ("base",): self.base}
        return [(of, some) for of, some in named.items() if some is not None and not np.isnan(some).all()]


def _groups(found: Sequence[CellRecords]) -> Iterator[_Group]:
    """Cells of one task, model, protocol, seed and `generate` whose data or weights differ are never compared."""
    kinds = Counter(key for key, _ in {(cell.key, cell.data) for cell in found})
    order = sorted(found, key=lambda cell: (cell.key, cell.data))
    for (key, _), group in groupby(order, key=lambda cell: (cell.key, cell.data)):
        alike, places = list(group), dict[str, int]()
        at = {cell.digest: np.array([places.setdefault(i, len(places)) for i in cell.ids], int) for cell in alike}
        yield _Group(alike, at, len(places), ["data or weights differ from other cells'"] * (kinds[key] > 1))


def _rows(group: _Group, baseline: str) -> list[_Row]:
    """The rows of a group's cells, with their values and differences."""
    metrics = [name for name in BETTER if any(name in cell.values for cell in group.cells)]
    ended = [cell for cell in group.cells if cell.ended]
    full = next((cell for cell in ended if cell.facts["method"] == "full"), None)
    bases = {cell.facts["budget"]: cell for cell in ended if cell.facts["method"] == baseline}
    for_all = next((cell for cell in bases.values() if not cell.facts["budgeted"]), None)
    rows = []
    for cell in group.cells:
        base = bases.get(cell.facts["budget"], for_all)
        for metric in metrics or ["score" if cell.facts["generate"] else "answer_nll"]:
            row = _Row(cell, metric, list(group.marks))
            if metric in cell.values:
                row.values = group.values(cell, metric)
                row.full = _difference(group, row, full, "full cache")
                row.base = row.full if base and base is full else _difference(group, row, base, "baseline")
            if metric in cell.values or not cell.ended:
                rows.append(row)
    return rows


def _difference(group: _Group, row: _Row, other: CellRecords | None, what: str) -> Float[ndarray, " examples"] | None:
    if other is None or row.metric not in other.values:
        if row.cell.facts["method"] != "full":
            row.marks.append(f"no {what}")
        return None
    if other is row.cell:
        return None
    assert row.values is not None
    theirs = group.values(other, row.metric)
    if (np.isnan(row.values) != np.isnan(theirs)).any():
        row.marks.append(f"examples differ from {what}'s")
    for name, one, another in zip(("commit", "version"), row.cell.versions, other.versions, strict=True):
        if one != another:
            row.marks.append(f"{name} differs from {what}'s")
    return row.values - theirs


def _families(rows: Iterable[_Row], families: Mapping[str, str]) -> dict[tuple[str, str], list[_Row]]:
    """The rows that are corrected together, by ("holm", family) or ("bh", metric)."""
    found: dict[tuple[str, str], list[_Row]] = {("holm", name): [] for name in families}
    for row in rows:
        if row.base is None or np.isnan(row.base).all():
            continue
        names = [name for name, pattern in families.items() if fnmatchcase(row.name, pattern)]
        if len(names) > 1:
            raise UsageError(f"'{row.name}' is in the families {' and '.join(names)}: it can be in one")
        found.setdefault(("holm", names[0]) if names else ("bh", row.metric), []).append(row)
    for (_, name), members in found.items():
        if not members:
            raise UsageError(f"no comparison is in family {name}: '{families[name]}' is no pattern of any '{FORM}'")
    return found


# -- numbers --


def _estimate(group: _Group, rows: list[_Row], tests: int, resamples: int | None) -> None:
    """Intervals and p-values of the rows, in `found`. Columns of the same examples are done at once."""
    clusters, strata = _examples(group)
    together: dict[bytes, list[tuple[_Row, tuple[str, ...], Float[ndarray, " examples"]]]] = {}
    for row in rows:
        for of, values in row.columns:
            together.setdefault((~np.isnan(values)).tobytes(), []).append((row, of, values))
    for mask, columns in together.items():
        kept = np.frombuffer(mask, dtype=bool)
        shape = Clusters(clusters[kept], strata[kept])
        matrix = np.stack([values[kept] for _, _, values in columns], axis=1)
        bounds = np.array([_bounds(row.metric, of, matrix[:, i]) for i, (row, of, _) in enumerate(columns)]).T
        found = intervals(matrix, shape, np.random.default_rng(0), bounds=bounds)
        tested = [i for i, (_, of, _) in enumerate(columns) if "base" in of]
        p = p_values(matrix[:, tested], shape, np.random.default_rng(0), tests=tests, resamples=resamples)
        chance = dict(zip(tested, zip(p.p, p.test, strict=True), strict=True))
        for i, ((row, of, _), one) in enumerate(zip(columns, found, strict=True)):
            row.marks += ["few clusters"] * one.few
            if "values" in of:
                row.found |= _ends("mean", one) | {"median": np.median(matrix[:, i])}
                row.found |= {"n": one.n, "clusters": one.clusters, "interval": one.made}
                row.marks += ["nothing varies"] * (one.made == "exact")
            if "full" in of:
                row.found |= _ends("vs_full", one) | {"n_full": one.n}
            if "base" in of:
                wins = win_tie_loss(matrix[:, i : i + 1], BETTER[row.metric])[:, 0]
                row.found |= _ends("vs_baseline", one) | {"n_baseline": one.n}
                row.found |= dict(zip(("p", "test", "win", "tie", "loss"), (*chance[i], *wins), strict=True))
                row.found["smallest_difference"] = smallest_difference(one.error, one.freedom)
    _flips(rows)


def _examples(group: _Group) -> tuple[ndarray, ndarray]:
    """The cluster and the sub-task of each example; cells that disagree are refused."""
    clusters, strata = np.full(group.n, None, dtype=object), np.full(group.n, None, dtype=object)
    for cell in group.cells:
        at = group.at[cell.digest]
        for of, mine in ((clusters, cell.clusters), (strata, cell.strata)):
            named = np.array(mine, dtype=object)
            was = of[at]
            if bad := [i for i in np.flatnonzero(was != named) if was[i] is not None]:
                raise UsageError(
                    f"{cell.facts['folder']}: example {cell.ids[bad[0]]} is of {named[bad[0]]}, in other cells of "
                    f"{was[bad[0]]}; they were not asked the same: keep them in different results folders"
                )
            of[at] = named
    return clusters, strata


def _bounds(metric: str, of: tuple[str, ...], values: Float[ndarray, " examples"]) -> tuple[float, float]:
    """Between what the values of a column must lie; of differences how far they can go. Some tasks' scores pass 1."""
    low, high = RANGE[metric]
    if "values" not in of:
        low, high = low - high, high - low
    return (low, high) if values.min() >= low and values.max() <= high else (-np.inf, np.inf)


def _ends(name: str, found: Interval) -> dict[str, float]:
    low, high = ("low", "high") if name == "mean" else (f"{name}_low", f"{name}_high")
    return {name: found.mean, low: found.low, high: found.high}


def _flips(rows: list[_Row]) -> None:
    """The share of a cell's 0/1 scores that are not the full cache's, in all its rows."""
    share = {}
    for row in rows:
        if row.metric == "score" and row.full is not None and row.values is not None:
            theirs = row.values - row.full
            binary = np.isin(row.values, (0, 1)) & np.isin(theirs, (0, 1))
            if binary.any():
                share[row.cell.digest] = float((row.full[binary] != 0).mean())
    for row in rows:
        row.found["flips"] = share.get(row.cell.digest, np.nan)


def _columns(row: _Row, baseline: str) -> dict[str, Any]:
    marks = "; ".join(dict.fromkeys([*row.cell.marks, *row.marks]))
    said = {"metric": row.metric, "better": BETTER[row.metric], "baseline": baseline, "marks": marks}
    numbers: dict[str, Any] = dict.fromkeys(COUNTS, 0) | dict.fromkeys(WORDS, "") | row.found
    return row.cell.facts | said | numbers
