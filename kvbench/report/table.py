"""Records as a table: a row per example. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from kvbench.errors import UsageError
from kvbench.list import options_of_preset, presets, user_conf_folder
from kvbench.store import cells, read_cell, read_solo

_ABOUT_A_CELL = ("format", "label", "digest", "identity")


def read(results: str | Path = "results") -> pd.DataFrame:
    """Every record of a results folder, a row per example: what its cell was, then the record's fields.

    `method`, `budget`, `task`, `model`, `protocol`, `seed` and `cell` say what the cell was: behind a name stand the
    options that are not at their defaults, as in tables; options that make a preset have its name. docs/metrics.md
    defines the other fields. Of cells that are not finished there is what they have.
    """
    table = examples(dict.fromkeys(cells(Path(results).expanduser())))
    if table.empty:
        raise UsageError(f"no records in {results}")
    return table


def examples(limits: Mapping[Path, int | None]) -> pd.DataFrame:
    """The records of cells, by their folders; of each so many of the first ones (None: all)."""
    rows = []
    for folder, limit in limits.items():
        header, records = read_cell(folder)
        rows += [described(header) | record for record in records[:limit]]
    return pd.DataFrame(rows)


def solos(folders: Iterable[Path]) -> pd.DataFrame:
    """What `measure=solo` found of cells, a row each."""
    found = map(read_solo, folders)
    return pd.DataFrame([described(one) | {k: v for k, v in one.items() if k not in _ABOUT_A_CELL} for one in found])


def described(header: dict[str, Any]) -> dict[str, Any]:
    """What a cell is, as tables name it."""
    identity = header["identity"]
    task = dict(identity["task"])
    name = task.pop("name")
    changed = ",".join(f"{key}={value}" for key, value in task.items())
    return {
        "method": method_label(header),
        "budget": identity["budget"],
        "task": name + (f"({changed})" if changed else ""),
        "model": identity["model"]["name"],
        "protocol": identity["protocol"],
        "seed": identity["seed"],
        "cell": header["digest"],
    }


def method_label(header: Mapping[str, Any]) -> str:
    """The method as tables show it: `tiered` where its options are just that preset's today, or `vector(power=0.5)`."""
    return _presets(user_conf_folder()).get(_content(header["identity"]["method"]), header["label"])


@cache
def _presets(_: Path | None) -> dict[str, str]:
    """Content -> name; the user's folder says which."""
    files = presets("methods")
    return {_content(options_of_preset(name, files)): name for name in files}


def _content(method: Mapping[str, Any]) -> str:
    return json.dumps(method, sort_keys=True)


def machine(hardware: Mapping[str, Any]) -> str:
    """What a process ran on, as tables name it."""
    device = hardware.get("device", "cpu")
    return hardware["cpu"] if device == "cpu" else device
