"""The leaderboard: a results folder as one HTML file that opens from disk and asks nothing of any network.

Everything that a header or a model wrote goes in as JSON, is put on the page as text, and can't run: the page's policy
allows the one script and the one style sheet that it carries, by their hashes, and no request at all.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup

from kvbench.report.aggregate import aggregate
from kvbench.report.remake import command
from kvbench.report.table import machine
from kvbench.report.tidy import BYTES, OWN, SECONDS, SETTING
from kvbench.store import EXAMPLES, HEADER, SOLO, read_solo

#: metric -> how the page calls it, and its unit
METRICS = {
    "score": ("Score", ""),
    "answer_nll": ("NLL", "nats/token"),
    "kl_full": ("KL to full", "nats"),
    "agree_full": ("Top-1 agreement", ""),
}
#: What a cell is and what it holds: the same in all of its rows of the table.
OF_CELL = (
    *("cell", "folder", "method", "method_name", "family", "trust", "query_aware", "budget", "task", "model"),
    *("protocol", "seed", "generate", "status", "reason", "tiers"),
    *(*BYTES[:2], "share", *BYTES[2:], *SECONDS, *OWN),
)
OF_METRIC = (
    *("n", "clusters", "mean", "low", "high", "median", "interval", "vs_full", "vs_full_low", "vs_full_high"),
    *("vs_baseline", "vs_baseline_low", "vs_baseline_high", "p", "test", "p_adjusted", "adjust"),
    *("flips", "win", "tie", "loss", "smallest_difference", "marks"),
)


def leaderboard(results: str | Path, baseline: str = "full", examples: int = 3, characters: int = 500) -> str:
    """The page of a results folder. `examples` of each cell are shown, its first ones, and so much of each text."""
    table = aggregate(results, baseline=baseline)
    return page(payload(table, Path(results).expanduser(), baseline, examples, characters))


def payload(table: pd.DataFrame, results: Path, baseline: str, examples: int, characters: int) -> dict[str, Any]:
    """What the page shows, as plain JSON values: `table` (of `aggregate`), and what its cells' folders say besides."""
    found: dict[str, Any] = {
        "baseline": baseline,
        "results": str(results),
        "aggregate": aggregation(str(results), baseline),
        "metrics": [],
        "fields": OF_METRIC,
        "processes": [],
        "cells": [],
    }
    present = table.loc[table["mean"].notna()].groupby("metric")["better"].first()
    for name, (label, unit) in METRICS.items():
        if name in present:
            found["metrics"].append({"name": name, "label": label, "unit": unit, "better": present[name]})
    processes: dict[str, int] = {}
    by_cell: dict[str, list[dict[str, Any]]] = {}
    for row in table.to_dict("records"):
        by_cell.setdefault(row["cell"], []).append({str(key): value for key, value in row.items()})
    for rows in by_cell.values():
        one = rows[0]
        header = json.loads((results / one["folder"] / HEADER).read_text(encoding="utf-8"))
        cell = {name: _plain(one[name]) for name in OF_CELL}
        cell["training"] = "fitted per model" if one["needs_calibration"] else "none"
        cell["metrics"] = {
            row["metric"]: [_plain(row[field]) for field in OF_METRIC] for row in rows if row["metric"] in present.index
        }
        cell["about"] = header["about"]
        cell["options"] = header["identity"]["method"]
        cell["finished"] = header.get("finished")
        # Many cells were made by the same process, or by its like.
        cell["processes"] = sorted({_number(processes, _process(segment)) for segment in header["segments"]})
        cell["solo"] = _solo(results / one["folder"])
        limit = header.get("examples") or header["segments"][-1]["limit"]
        cell["command"] = command(header, limit, "remade")
        cell["examples"] = _examples(results / one["folder"], examples, characters)
        found["cells"].append(cell)
    found["processes"] = [json.loads(text) for text in processes]
    _pair(found["cells"], baseline)
    found["commits"] = Counter(process["commit"] for process in found["processes"] if process["commit"])
    return found


def aggregation(results: str, baseline: str) -> str:
    """The command that makes the table of the page's numbers from records."""
    return shlex.join(["python", "scripts/aggregate.py", results, "--baseline", baseline])


def _pair(cells: list[dict[str, Any]], baseline: str) -> None:
    """Says of each cell which one is the full cache's in its setting, which ones it is compared with, and how again."""
    places = {(cell["method"], cell["budget"], *(cell[key] for key in SETTING)): i for i, cell in enumerate(cells)}
    for i, cell in enumerate(cells):
        setting = tuple(cell[key] for key in SETTING)
        cell["full"] = places.get(("full", "1", *setting))
        compared = places.get((baseline, cell["budget"], *setting), places.get((baseline, "1", *setting)))
        cell["beside"] = sorted({one for one in (cell["full"], compared) if one is not None} - {i})
        remade = [cells[one]["method"] for one in (*cell["beside"], i)]
        cell["again"] = aggregation("remade", next(one for one in (baseline, "full", cell["method"]) if one in remade))


def page(found: dict[str, Any]) -> str:
    """The HTML file that shows a `payload`."""
    folder = Path(__file__).with_name("page")
    style, script = ((folder / name).read_text(encoding="utf-8") for name in ("leaderboard.css", "leaderboard.js"))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    template = environment.from_string((folder / "leaderboard.html").read_text(encoding="utf-8"))
    return template.render(
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        data=Markup(in_script(found)),
    )


def in_script(value: Any) -> str:
    """`value` as JSON that ends no script element, opens no comment, and is a line of JavaScript too."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _plain(value: Any) -> Any:
    """`value` as JSON has it; missing numbers are null, others keep five digits, or all before the point."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return round(value) if abs(value) >= 1e4 else float(f"{value:.5g}")
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return None if value is pd.NA else value


def _number(numbers: dict[str, int], process: dict[str, Any]) -> int:
    return numbers.setdefault(json.dumps(process, sort_keys=True), len(numbers))


def _process(segment: dict[str, Any]) -> dict[str, Any]:
    return {key: segment.get(key) for key in ("commit", "dirty", "python", "versions", "hardware")}


def _solo(folder: Path) -> dict[str, Any] | None:
    if not (folder / SOLO).exists():
        return None
    found = read_solo(folder)
    return {
        "path": found["path"],
        "machine": machine(found["process"]["hardware"]),
        "own_s": _plain(found["own_s"]),
        "own_full_s": _plain(found["own_full_s"]),
    }


def _examples(folder: Path, count: int, characters: int) -> list[dict[str, Any]]:
    """The first records of a cell; what is recorded of the reference stands beside the answer."""
    if not (folder / EXAMPLES).exists():
        return []
    with (folder / EXAMPLES).open(encoding="utf-8") as file:
        lines = [line for line in itertools.islice(file, count) if line.endswith("\n")]
    found = []
    for line in lines:
        record = json.loads(line)
        one = {key: _plain(record[key]) for key in ("id", "cluster_id", *METRICS) if record.get(key) is not None}
        one |= {
            key: _clipped(str(record[key]), characters) for key in ("answer", "target") if record.get(key) is not None
        }
        if record.get("references"):
            one["target"] = _clipped(" | ".join(map(str, record["references"])), characters)
        one["info"] = _clipped(json.dumps(record["info"], ensure_ascii=False), characters) if record.get("info") else ""
        found.append(one)
    return found


def _clipped(text: str, characters: int) -> str:
    return text if len(text) <= characters else f"{text[:characters]} … ({len(text):,} characters)"
