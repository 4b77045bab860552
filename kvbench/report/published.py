"""Is a published figure met? Checks are files in conf/published/, verdicts a function of records. Imports no torch.

A check names cells of kvbench and what a source says of them: values, or an order of methods. PASS: the interval of
what was measured lies inside the margin around the source's value; FAIL: outside; else INCONCLUSIVE, with the number of
examples that would decide. docs/published.md says more.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kvbench.errors import UsageError
from kvbench.list import conf_folder
from kvbench.plugins import known
from kvbench.report.statistics import Clusters, Interval, interval
from kvbench.report.table import method_label
from kvbench.store import read_cell

PASS, FAIL, INCONCLUSIVE = "PASS", "FAIL", "INCONCLUSIVE"
TIERS = ("quick", "full")
READ_FROM = ("text", "table", "plot", "unknown")
METRICS = {"score": 100.0, "held_out_r2": 1.0}  # and what a record's number is multiplied by


@dataclass
class Source:
    """Where a figure stands."""

    what: str = MISSING
    url: str = MISSING
    arxiv: str | None = None
    read_from: str = MISSING  # READ_FROM
    verified: bool = MISSING  # was the figure seen there by who wrote this file?
    note: str = ""


@dataclass
class Tier:
    limit: int | None = MISSING  # examples of each cell; null: all
    gpu_minutes: int = MISSING  # of all cells; an estimate, until somebody has measured it


@dataclass
class Check:
    """A file of conf/published/. `options`, and those of a cell, are those of `python -m kvbench.run`."""

    source: Source = MISSING
    template: str = MISSING  # what is known of the prompt, here and there
    budget: str = MISSING  # nominal or true
    metric: str = MISSING  # METRICS; held_out_r2:<maps of the artefact>
    margin: float = MISSING  # in the metric's points
    margin_why: str = MISSING
    gate: str | None = None  # the check of the full cache that must pass first
    gate_note: str = ""  # why there is none
    tiers: dict[str, Tier] = MISSING
    options: dict[str, Any] = MISSING  # of all cells
    cells: dict[str, dict[str, Any]] = MISSING  # name -> what else it is
    repeats: list[dict[str, Any]] = field(default_factory=lambda: [{}])  # each cell is made once with each of these
    values: dict[str, float] = field(default_factory=dict)  # cell -> the source's figure
    orders: list[list[Any]] = field(default_factory=list)  # of cells, the best first; those in an inner list tie
    proves: str | None = None  # the method that a PASS makes `published`

    def configurations(self, cell: str) -> list[dict[str, Any]]:
        """The command-line options of a cell: several, if it is repeated."""
        # In Python's options a list is a sweep, and a tuple a value that is a list.
        return [
            {name: tuple(value) if isinstance(value, list) else value for name, value in merged.items()}
            for repeat in self.repeats
            for merged in [self.options | self.cells[cell] | repeat]
        ]

    def model(self, cell: str) -> str:
        """The model of a cell, by the name that kvbench has for it."""
        options = self.options | self.cells[cell]
        return options.get("model.name") or options["model"]

    def of(self, model: str | None) -> Check:
        """What the check claims of one model; None: all."""
        cells = {name: options for name, options in self.cells.items() if model in (None, self.model(name))}
        values = {name: value for name, value in self.values.items() if name in cells}
        orders = [order for order in self.orders if cells.keys() >= set(_flat(order))]
        return replace(self, cells=cells, values=values, orders=orders)

    @property
    def relations(self) -> list[tuple[str, str, str]]:
        """What the orders claim: (a, ">", b) of neighbours, and (a, "~", b) of those that tie."""
        found = []
        for order in self.orders:
            ranks = [rank if isinstance(rank, list) else [rank] for rank in order]
            found += [(a, ">", b) for high, low in itertools.pairwise(ranks) for a, b in itertools.product(high, low)]
            found += [(a, "~", b) for rank in ranks for a, b in itertools.combinations(rank, 2)]
        return found


def _flat(order: Sequence[Any]) -> list[str]:
    return [cell for rank in order for cell in (rank if isinstance(rank, list) else [rank])]


@dataclass(frozen=True)
class Finding:
    """The verdict on one claim of a check."""

    claim: str
    verdict: str
    why: str
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0
    needed: int | None = None  # examples that would decide it, if the estimate stays where it is


def load(folder: Path | None = None) -> dict[str, Check]:
    """The checks of a folder (default: conf/published/), those that are gates first. Raises UsageError."""
    folder = folder or conf_folder() / "published"
    checks = {file.stem: _read(file) for file in sorted(folder.glob("*.yaml"))}
    for name, check in checks.items():
        if check.gate:
            known(f"gate of {name}", check.gate, checks)
            if checks[check.gate].gate or not checks[check.gate].values:
                raise UsageError(f"{name}: its gate {check.gate} must be a value, without a gate of its own")
            if check.tiers.keys() - checks[check.gate].tiers.keys():
                raise UsageError(f"{name}: its gate {check.gate} must be of the same tiers")
    return dict(sorted(checks.items(), key=lambda one: (one[1].gate is not None, one[0])))


def chosen(checks: Mapping[str, Check], names: Sequence[str], tier: str, model: str | None) -> dict[str, Check]:
    """The named checks of a tier (none named: all), what they claim of one model, and their gates. Gates come first."""
    if model:
        known("model", model, sorted({check.model(cell) for check in checks.values() for cell in check.cells}))
    for name in names:
        known("check", name, checks)
    found = {
        name: check.of(model) for name, check in checks.items() if name in (names or checks) and tier in check.tiers
    }
    found = {name: check for name, check in found.items() if check.cells}
    if not found:
        raise UsageError(f"no such check in tier {tier}: {', '.join(checks)}")
    gates = {check.gate: checks[check.gate] for check in found.values() if check.gate}
    return dict(sorted((gates | found).items(), key=lambda one: one[1].gate is not None))


def _read(file: Path) -> Check:
    try:
        check = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Check), OmegaConf.load(file)))
    except OmegaConfBaseException as error:
        raise UsageError(f"{file}: {str(error).splitlines()[0]} ({error.full_key})") from error
    assert isinstance(check, Check)

    def refuse(reason: str) -> None:
        raise UsageError(f"{file}: {reason}")

    named = [*check.values, *(cell for relation in check.relations for cell in relation[::2])]
    if bool(check.values) == bool(check.relations):
        refuse("give either values or orders")
    for name in named:
        known("cell", name, check.cells)
    if unused := check.cells.keys() - set(named):
        refuse(f"nothing is said of cell {', '.join(sorted(unused))}")
    for tier in check.tiers:
        known("tier", tier, TIERS)
    known("read_from", check.source.read_from, READ_FROM)
    known("budget", check.budget, ("nominal", "true"))
    known("metric", check.metric.partition(":")[0], METRICS)
    if check.margin < 0 or (check.values and check.margin == 0):
        refuse("the margin must be above 0")
    if not (check.gate or check.gate_note):
        refuse("name a gate, or say in gate_note why there is none")
    return check


def observations(folders: Sequence[Path], metric: str, limit: int | None = None) -> pd.DataFrame:
    """The first records of a cell (or its repeats) for `judge`. Raises UsageError where a cell is not done."""
    rows = []
    for folder in folders:
        header, records = read_cell(folder)
        if header["status"] != "done":
            raise UsageError(
                f"{method_label(header)} is {header['status']}: {header.get('reason', 'not all examples')}"
            )
        for record in records[:limit]:
            if record.get(metric) is None:
                raise UsageError(f"{folder} has no {metric}")
            value = METRICS[metric] * record[metric]
            rows.append((record["id"], value, record["cluster_id"], record["info"].get("set", "")))
    return pd.DataFrame(rows, columns=["id", "value", "cluster", "stratum"])


def judge(check: Check, found: Mapping[str, pd.DataFrame], gate: str | None = None) -> list[Finding]:
    """The verdict on each claim, from the observations of the cells; `gate` is the gate's verdict.

    All intervals of a check hold together at 95 % (Bonferroni).
    """
    claims: list[tuple[str, tuple[str, ...]]] = [
        (f"{cell} = {value:g}", (cell,)) for cell, value in check.values.items()
    ]
    claims += [(" ".join(relation), relation[::2]) for relation in check.relations]
    level = 1 - 0.05 / len(claims)
    findings = []
    for claim, cells in claims:
        tables = [found[cell] for cell in cells if cell in found]
        if check.gate and gate != PASS:
            finding = Finding(claim, INCONCLUSIVE, f"gate not passed: {check.gate} is {gate or 'not run'}")
        elif len(tables) < len(cells):
            finding = Finding(claim, INCONCLUSIVE, f"no records of {', '.join(c for c in cells if c not in found)}")
        elif len(cells) == 1:
            around = check.values[cells[0]]
            bounds = (-math.inf, 1.0) if check.metric.startswith("held_out_r2") else (0.0, 100.0)
            finding = _placed(claim, _mean(tables[0], level, bounds), around - check.margin, around + check.margin)
        else:
            ours, theirs = (table.set_index("id") for table in tables)
            if set(ours.index) != set(theirs.index):
                finding = Finding(claim, INCONCLUSIVE, "the cells were not asked the same examples")
            else:
                paired = ours.assign(value=ours["value"] - theirs["value"])
                ends = (0.0, math.inf) if ">" in claim else (-check.margin, check.margin)
                finding = _placed(claim, _mean(paired, level, (-100.0, 100.0)), *ends)
        findings.append(finding)
    return findings


def _mean(table: pd.DataFrame, level: float, bounds: tuple[float, float]) -> Interval:
    """The mean over sub-tasks of their means, as the sources have it."""
    strata = table["stratum"].to_numpy(dtype=str)
    sizes = table.groupby("stratum")["value"].transform("size").to_numpy(dtype=float)
    weights = len(table) / (sizes * table["stratum"].nunique())
    values = table["value"].to_numpy(dtype=float) * weights
    return interval(
        values, Clusters(table["cluster"].to_numpy(dtype=str), strata), np.random.default_rng(0), level, bounds
    )


def _placed(claim: str, seen: Interval, least: float, most: float) -> Finding:
    """Where an interval lies: inside from `least` to `most`, outside, or neither."""
    if math.isnan(seen.low):
        return Finding(claim, INCONCLUSIVE, "one example has no interval", seen.mean, n=seen.n, needed=2)
    numbers = (seen.mean, seen.low, seen.high, seen.n)
    inside = f"{seen.mean:.4g} ({seen.low:.4g} to {seen.high:.4g}, n = {seen.n}) against {least:.4g} to {most:.4g}"
    if least < seen.low and seen.high < most:
        return Finding(claim, PASS, inside, *numbers)
    if seen.high < least or most < seen.low:
        return Finding(claim, FAIL, inside, *numbers)
    gap = min(abs(seen.mean - end) for end in (least, most))
    needed = math.ceil(seen.n * ((seen.high - seen.low) / 2 / gap) ** 2) if gap else None
    told = f"n = {needed:,} would decide" if needed else "no n decides: the estimate lies on the margin"
    return Finding(claim, INCONCLUSIVE, f"{inside}: {told}", *numbers, needed)


def overall(findings: Sequence[Finding]) -> str:
    """FAIL if a claim fails, PASS if all pass."""
    verdicts = {finding.verdict for finding in findings}
    return FAIL if FAIL in verdicts else PASS if verdicts == {PASS} else INCONCLUSIVE


def lines(name: str, findings: Sequence[Finding]) -> Iterator[str]:
    for finding in findings:
        yield f"{finding.verdict:<12}  {name}  {finding.claim}: {finding.why}"


def verdict(check: Check, tier: str, findings: Sequence[Finding], folders: Sequence[Path]) -> dict[str, Any]:
    """What a verdict file holds: what was claimed and found, and what the records were made with."""
    headers = [read_cell(folder)[0] for folder in folders]
    segments = [segment for header in headers for segment in header["segments"] if segment["first_example"]]
    return {
        "verdict": overall(findings),
        "tier": tier,
        "claimed": _claimed(check),
        "findings": [asdict(finding) for finding in findings],
        "cells": [header["digest"] for header in headers],
        "commits": sorted({str(segment["commit"]) for segment in segments}),
        "dirty": any(segment["dirty"] is not False for segment in segments),
        "versions": sorted({str(segment["versions"]["kvbench"]) for segment in segments}),
        "devices": sorted({str(segment["hardware"].get("device")) for segment in segments}),
    }


def proved(checks: Mapping[str, Check], folder: Path) -> dict[str, list[str]]:
    """Method -> the checks whose committed verdict files make it `published`.

    Such a file says PASS, of what its check claims today, from records of clean commits.
    """
    found: dict[str, list[str]] = {}
    for file in sorted(folder.glob("*.json")):
        said, check = json.loads(file.read_text(encoding="utf-8")), checks.get(file.stem)
        clean = bool(said["commits"]) and not said["dirty"]
        if check and check.proves and said["verdict"] == PASS and clean and said["claimed"] == _claimed(check):
            found.setdefault(check.proves, []).append(file.stem)
    return found


def _claimed(check: Check) -> dict[str, Any]:
    whole = asdict(check)
    return {key: whole[key] for key in ("metric", "margin", "gate", "options", "cells", "repeats", "values", "orders")}
