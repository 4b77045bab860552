"""From records to a tidy table: a row per cell and metric, with intervals and paired differences. Imports no torch.

    table = aggregate("results", baseline="snapkv", families={"main": "vector* score"})

docs/statistics.md says what is computed, and why. Nothing is averaged over cells, and of two cells only the examples
that both have are compared. What a reader should know of a row stands in its `marks`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvbench import plugins
from kvbench.budget import Budget
from kvbench.errors import UsageError
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
from kvbench.report.table import described
from kvbench.store import SOLO, cells, read_cell, read_solo

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
    *("bytes_held", "bytes_full", "share", *BYTES[2:], "tiers", *SECONDS, *OWN),
    *("commit", "dirty", "version", "weights", "data", "hardware", "marks"),
)
COUNTS = ("n", "clusters", "n_full", "n_baseline", "win", "tie", "loss")  # 0 where nothing was compared
WORDS = ("interval", "test", "adjust", "declared")  # and empty


@dataclass
class _Cell:
    """What is read of a folder: its columns of the table, and its examples' numbers."""

    facts: dict[str, Any]
    key: tuple[str, ...]  # cells of the same key were asked the same examples
    data: tuple[str, ...]  # unless these hashes differ
    versions: tuple[Any, ...]
    ids: list[str]
    clusters: list[str]
    strata: list[str]
    values: dict[str, Float[ndarray, " examples"]]
    marks: list[str]
    at: Any = None  # where its examples stand among those of its key

    @property
    def ended(self) -> bool:
        return self.facts["status"] in ENDED


@dataclass
class _Row:
    """A row in the making, and the columns of numbers that its intervals are of."""

    cell: _Cell
    metric: str
    values: Float[ndarray, " examples"] | None = None  # NaN: this cell has no such number
    full: Float[ndarray, " examples"] | None = None  # differences from the full cache
    base: Float[ndarray, " examples"] | None = None
    found: dict[str, Any] = field(default_factory=dict)
    marks: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What patterns of families are held against."""
        facts = self.cell.facts
        return " ".join([*(facts[key] for key in ("method", "budget", "task", "model", "protocol")), self.metric])


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
    found = [_read(folder, results) for folder in cells(results)]
    if not found:
        raise UsageError(f"no cells in {results}")
    if twice := [digest for digest, count in Counter(cell.facts["cell"] for cell in found).items() if count > 1]:
        folders = [cell.facts["folder"] for cell in found if cell.facts["cell"] == twice[0]]
        raise UsageError(f"one cell is in {len(folders)} folders, {' and '.join(folders)}: keep one of them")
    labels = sorted({cell.facts["method"] for cell in found})
    plugins.known("baseline", baseline, labels)
    _mark_other_data(found)
    groups: list[tuple[list[_Cell], list[_Row]]] = []
    for _, group in groupby(sorted(found, key=lambda cell: (cell.key, cell.data)), key=lambda c: (c.key, c.data)):
        alike = list(group)
        groups.append((alike, _rows(alike, baseline)))
    rows = [row for _, made in groups for row in made]
    corrected = _families(rows, families or {})
    tests = max((len(members) for members in corrected.values()), default=1)
    for alike, made in groups:
        _estimate(alike, made, tests, resamples)
    for (how, name), members in corrected.items():
        p = np.array([row.found.get("p", np.nan) for row in members])
        for row, adjusted in zip(members, (holm if how == "holm" else benjamini_hochberg)(p), strict=True):
            row.found |= {"p_adjusted": adjusted, "adjust": how, "declared": name if how == "holm" else ""}
    table = pd.DataFrame([_columns(row, baseline) for row in rows], columns=list(COLUMNS))
    order = ["task", "model", "protocol", "generate", "seed", "metric", "method", "budget"]
    return table.sort_values(order, key=_sorted, kind="stable", ignore_index=True)


def _sorted(column: pd.Series) -> pd.Series:
    return column.map(budget_order) if column.name == "budget" else column


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
    console = Console()
    if not console.is_terminal:
        console.width = 190
    console.print(shown)
    rest = f", {len(main) - rows} of them not shown" if len(main) > rows else ""
    commits = table["commit"].nunique()
    said = f"{len(main)} cells{rest}; {len(table)} rows in the files."
    console.print(said + (f" Records are of {commits} commits." if commits > 1 else ""), highlight=False)


def _between(row: Mapping[Any, Any], *names: str) -> str:
    mean, low, high = (row[name] for name in names)
    ends = "" if np.isnan(low) else f" [{low:.3f}, {high:.3f}]"
    return "" if np.isnan(mean) else f"{mean:.3f}{ends}"


# -- reading --


def _read(folder: Path, results: Path) -> _Cell:
    header, records = read_cell(folder)
    if header["status"] not in ENDED:
        records = []
    identity, about = header["identity"], header["about"]
    said = described(header)
    process, marks = _provenance(header)
    weights = about.get("model", {}).get("weights")
    own = read_solo(folder) if (folder / SOLO).exists() else {}
    held, full = _mean(records, "bytes_held"), _mean(records, "bytes_full")
    facts = said | {
        "folder": str(folder.relative_to(results)),
        "method_name": identity["method"]["name"],
        **_traits(identity["method"]["name"]),
        "task_name": identity["task"]["name"],
        "generate": identity["generate"],
        "status": header["status"],
        "reason": header.get("reason", ""),
        **{name: _mean(records, name) for name in (*BYTES, *SECONDS)},
        "share": held / full if full else np.nan,
        "tiers": _tiers(records),
        **{name: _mean([own], name) for name in OWN},
        **process,
        "weights": weights or "",
        "data": about.get("data", ""),
    }
    facts["needs_calibration"] = facts["needs_calibration"] or bool(about.get("artefacts"))
    if header["status"] == "running":
        marks.append("not done")
    elif header["status"] == "done" and header["examples"] != len(records):
        marks.append(f"{header['examples'] - len(records)} records missing")
    infos = [record.get("info", {}) for record in records]
    return _Cell(
        facts=facts,
        key=tuple(
            json.dumps(identity[part], sort_keys=True) for part in ("task", "model", "protocol", "seed", "generate")
        ),
        data=(str(facts["data"]), str(weights)),
        versions=(process["commit"], process["version"]),
        ids=[record["id"] for record in records],
        clusters=[record["cluster_id"] for record in records],
        strata=[sub_task(info) for info in infos],
        values={name: values for name in BETTER if (values := _numbers(records, name)) is not None},
        marks=marks,
    )


def sub_task(info: Mapping[str, Any]) -> str:
    """Which part of a task an example is of, from its record's `info`; most tasks have none."""
    return "/".join(str(info[name]) for name in ("set", "part") if name in info)


def _numbers(records: Sequence[Mapping[str, Any]], name: str) -> Float[ndarray, " examples"] | None:
    values = np.array([record.get(name) for record in records], dtype=float)
    return None if np.isnan(values).all() else values


def _mean(records: Sequence[Mapping[str, Any]], name: str) -> float:
    values = _numbers(records, name)
    return np.nan if values is None else float(np.nanmean(values))


def _tiers(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    sums: Counter[str] = Counter()
    for record in records:
        sums.update(record.get("tiers") or {})
    return {name: total / len(records) for name, total in sums.items()}


@cache
def _files() -> dict[str, Path]:
    return plugins.files("methods")


@cache
def _traits(method: str) -> dict[str, Any]:
    """What the plugin's file says; nothing of a method that lies elsewhere."""
    if method not in _files():
        return {"family": "", "trust": "", "needs_calibration": False, "query_aware": False, "budgeted": True}
    about = plugins.about(_files()[method])
    said = about.traits
    return {
        "family": said.get("family", ""),
        "trust": said.get("trust", ""),
        "needs_calibration": about.fitted,
        "query_aware": said.get("query_aware") == "True",
        "budgeted": said.get("budgeted") != "False",
    }


def _provenance(header: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Under what a cell's records were made, by the processes that made some, and what to mark of it."""
    segments = [one for one in header["segments"] if one["first_example"] is not None] or header["segments"][-1:]
    commits = list(dict.fromkeys(one["commit"] for one in segments))
    versions = list(dict.fromkeys(json.dumps(one["versions"], sort_keys=True) for one in segments))
    machines = list(dict.fromkeys(_machine(one["hardware"]) for one in segments))
    dirty = any(one["dirty"] for one in segments)
    marks = {
        "dirty commit": dirty,
        "commit unknown": None in commits,
        "mixed commits": len(commits) > 1,
        "mixed versions": len(versions) > 1,
        "mixed hardware": len(machines) > 1,
    }
    found = {
        "commit": ", ".join(commit or "?" for commit in commits),
        "dirty": dirty,
        "version": ", ".join(dict.fromkeys(json.loads(text)["kvbench"] for text in versions)),
        "hardware": ", ".join(machines),
    }
    return found, [text for text, holds in marks.items() if holds]


def _machine(hardware: Mapping[str, Any]) -> str:
    device = hardware.get("device", "cpu")
    return str(hardware["cpu"] if device == "cpu" else device)


# -- who is compared with whom --


def _mark_other_data(found: Sequence[_Cell]) -> None:
    """Cells of one name whose data or weights are not the same are never compared."""
    hashes: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for cell in found:
        hashes.setdefault(cell.key, set()).add(cell.data)
    for cell in found:
        if len(hashes[cell.key]) > 1:
            cell.marks.append("data or weights differ from other cells'")


def _rows(alike: list[_Cell], baseline: str) -> list[_Row]:
    """The rows of cells that were asked the same examples, with their values and differences, all over one list of ids.

    `alike` share task, model, protocol, seed, generate, and the hashes of data and weights.
    """
    index: dict[str, int] = {}
    for cell in alike:
        cell.at = np.array([index.setdefault(name, len(index)) for name in cell.ids], dtype=int)
    metrics = [name for name in BETTER if any(name in cell.values for cell in alike)]
    full = next((cell for cell in alike if cell.facts["method"] == "full" and cell.ended), None)
    bases = {cell.facts["budget"]: cell for cell in alike if cell.facts["method"] == baseline and cell.ended}
    rows = []
    for cell in alike:
        base = bases.get(cell.facts["budget"])
        if base is None:
            base = next((one for one in bases.values() if not one.facts["budgeted"]), None)
        for metric in metrics or ["score" if cell.facts["generate"] else "answer_nll"]:
            if not cell.ended:
                rows.append(_Row(cell, metric))
            elif metric in cell.values:
                row = _Row(cell, metric, _spread(cell, metric, len(index)))
                row.full = _difference(row, full, "full cache", len(index))
                row.base = row.full if base and base is full else _difference(row, base, "baseline", len(index))
                rows.append(row)
    return rows


def _spread(cell: _Cell, metric: str, n: int) -> Float[ndarray, " examples"]:
    values = np.full(n, np.nan)
    values[cell.at] = cell.values[metric]
    return values


def _difference(row: _Row, other: _Cell | None, what: str, n: int) -> Float[ndarray, " examples"] | None:
    if other is None or row.metric not in other.values:
        if row.cell.facts["method"] != "full":
            row.marks.append(f"no {what}")
        return None
    if other is row.cell:
        return None
    assert row.values is not None
    theirs = _spread(other, row.metric, n)
    if (np.isnan(row.values) != np.isnan(theirs)).any():
        row.marks.append(f"examples differ from {what}'s")
    for name, ours, his in zip(("commit", "version"), row.cell.versions, other.versions, strict=True):
        if ours != his:
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
            raise UsageError(f"no comparison is in family {name}: '{families[name]}' is no pattern of any '{_FORM}'")
    return found


_FORM = "method budget task model protocol metric"


# -- numbers --


def _estimate(alike: list[_Cell], rows: list[_Row], tests: int, resamples: int | None) -> None:
    """Intervals and p-values of the rows, in `found`. Columns of the same examples are done at once."""
    clusters, strata = _examples(alike)
    columns: dict[bytes, list[tuple[_Row, str, Float[ndarray, " examples"]]]] = {}
    for row in rows:
        for what in ("values", "full", "base"):
            values = getattr(row, what)
            if values is not None and not (what == "base" and row.base is row.full):
                mask = ~np.isnan(values)
                if mask.any():
                    columns.setdefault(mask.tobytes(), []).append((row, what, values))
    for mask, jobs in columns.items():
        kept = np.frombuffer(mask, dtype=bool)
        shape = Clusters(clusters[kept], strata[kept])
        matrix = np.stack([values[kept] for _, _, values in jobs], axis=1)
        bounds = np.array([_bounds(row.metric, what, matrix[:, i]) for i, (row, what, _) in enumerate(jobs)]).T
        found = intervals(matrix, shape, np.random.default_rng(0), bounds=bounds)
        medians = np.median(matrix, axis=0)
        tested = [
            i for i, (row, what, _) in enumerate(jobs) if what == "base" or (what == "full" and row.base is row.full)
        ]
        p = p_values(matrix[:, tested], shape, np.random.default_rng(0), tests=tests, resamples=resamples)
        chance = dict(zip(tested, zip(p.p, p.test, strict=True), strict=True))
        for i, ((row, what, _), one) in enumerate(zip(jobs, found, strict=True)):
            row.marks += ["few clusters"] * one.few
            if what == "values":
                row.found |= {"n": one.n, "clusters": one.clusters, "interval": one.made, "median": medians[i]}
                row.found |= _ends("mean", one)
                row.marks += ["nothing varies"] * (one.made == "exact")
            if what == "full":
                row.found |= _ends("vs_full", one) | {"n_full": one.n}
            if i in chance:
                wins = win_tie_loss(matrix[:, i : i + 1], BETTER[row.metric])[:, 0]
                row.found |= _ends("vs_baseline", one) | {"n_baseline": one.n}
                row.found |= dict(zip(("p", "test"), chance[i], strict=True))
                row.found |= dict(zip(("win", "tie", "loss"), wins, strict=True))
                row.found["smallest_difference"] = smallest_difference(one.error, one.freedom)
    _flips(rows)


def _examples(alike: list[_Cell]) -> tuple[ndarray, ndarray]:
    """The cluster and the sub-task of each example; cells that disagree are refused."""
    n = 1 + max((int(cell.at.max()) for cell in alike if len(cell.at)), default=-1)
    clusters, strata = np.full(n, None, dtype=object), np.full(n, None, dtype=object)
    for cell in alike:
        for of, mine in ((clusters, cell.clusters), (strata, cell.strata)):
            named = np.array(mine, dtype=object)
            was = of[cell.at]
            if bad := [i for i in np.flatnonzero(was != named) if was[i] is not None]:
                raise UsageError(
                    f"{cell.facts['folder']}: example {cell.ids[bad[0]]} is of {named[bad[0]]}, in other cells of "
                    f"{was[bad[0]]}; they were not asked the same: keep them in different results folders"
                )
            of[cell.at] = named
    return clusters, strata


def _bounds(metric: str, what: str, values: Float[ndarray, " examples"]) -> tuple[float, float]:
    """Between what the values of a column must lie; of differences how far they can go. Some tasks' scores pass 1."""
    low, high = RANGE[metric]
    if what != "values":
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
                share[id(row.cell)] = float((row.full[binary] != 0).mean())
    for row in rows:
        row.found["flips"] = share.get(id(row.cell), np.nan)


def _columns(row: _Row, baseline: str) -> dict[str, Any]:
    marks = "; ".join(dict.fromkeys([*row.cell.marks, *row.marks]))
    said = {"metric": row.metric, "better": BETTER[row.metric], "baseline": baseline, "marks": marks}
    numbers: dict[str, Any] = dict.fromkeys(COUNTS, 0) | dict.fromkeys(WORDS, "") | row.found
    return row.cell.facts | said | numbers
