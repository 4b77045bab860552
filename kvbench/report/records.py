"""What the folder of a cell says of it, as the tidy table has it. Imports no torch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from kvbench import plugins
from kvbench.report.table import described, machine
from kvbench.report.tidy import BETTER, BYTES, ENDED, OWN, SECONDS
from kvbench.store import SOLO, read_cell, read_solo


@dataclass(frozen=True)
class CellRecords:
    """A cell's columns of the table, and its examples' numbers."""

    facts: dict[str, Any]
    key: tuple[str, ...]  # cells of the same key were asked the same examples
    data: tuple[str, ...]  # unless these hashes differ
    versions: tuple[Any, ...]
    ids: list[str]
    clusters: list[str]
    strata: list[str]
    values: dict[str, Float[ndarray, " examples"]]
    marks: list[str]

    @property
    def digest(self) -> str:
        return self.facts["cell"]

    @property
    def ended(self) -> bool:
        return self.facts["status"] in ENDED


def read_records(folder: Path, results: Path) -> CellRecords:
    """What a cell's folder says. Of one that failed no numbers: what it has is not all of it."""
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
    return CellRecords(
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
    machines = list(dict.fromkeys(machine(one["hardware"]) for one in segments))
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
