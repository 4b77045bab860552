"""The answers that docs/prereg.md asks for, from the records of conf/experiment/vector_vs_base.yaml.

python scripts/vector_study.py results/vector_vs_base

Writes study.md and study.csv into the folder. Cells that are not finished are compared on what both sides have: `n` in
the page.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kvbench.report.statistics import holm
from kvbench.report.study import (
    beside,
    command,
    difference,
    examples,
    markdown,
    signed,
    vector_arm,
    within_margin,
    written,
)

BASES, ARMS = ("keydiff", "kvzip", "snapkv"), ("base", "twin", "paper", "ours")
PAIRS = {"ours - base": "less", "paper - base": "less", "ours - twin": "both"}  # a family each, and its tests' side


def read(results: Path) -> pd.DataFrame:
    """A row per example and cell: `scorer` and `arm` say which it is, `draw` of which calibration documents."""

    def about(header: dict[str, Any]) -> dict[str, Any]:
        method = header["identity"]["method"]
        base, kind = vector_arm(method)
        return {"scorer": base, "arm": kind, "draw": method.get("calibration_draw", 0)}

    return examples(results, ("bytes_held", "bytes_full", "bytes_budget", "bytes_shared"), about, "vector_vs_base")


def compare(table: pd.DataFrame) -> pd.DataFrame:
    """A row per task, base and budget: the arms' NLL and bytes, and every difference that was asked for."""
    found = []
    groups = beside(table[table.draw == 0], ["task", "protocol", "scorer", "budget"], ARMS)
    for row, part, nll, clusters in groups:
        row["held"] = part[part.arm == "ours"].bytes_held.mean()
        row["shared"] = part[part.arm == "ours"].bytes_shared.mean()
        row["bytes_full"] = part.bytes_full.mean()
        row["over"] = int((part.bytes_held > part.bytes_budget).sum())
        rng = np.random.default_rng(0)
        for pair, side in PAIRS.items():
            ours, theirs = pair.split(" - ")
            values = (nll[ours] - nll[theirs]).to_numpy()
            one = difference(values, clusters, rng, side, tests=len(BASES) * 6)
            row |= {pair: one.pop("mean")} | {f"{pair}, {name}": value for name, value in one.items()}
            if theirs == "base":
                gap = (nll["base"] - nll["full"]).to_numpy()
                margin = within_margin(values, gap, clusters, rng)
                row |= {f"{ours}, {name}": margin[name] for name in ("bound", "margin")}
                row[f"{ours} non-inferior"] = margin["holds"]
        found.append(row)
    result = pd.DataFrame(found)
    for pair in PAIRS:
        result[f"{pair}, Holm p"] = holm(result.pop(f"{pair}, p").to_numpy())
    return result


def page(result: pd.DataFrame, draws: pd.DataFrame) -> str:
    lines = [
        "# VECTOR beside its bases",
        "Written by `scripts/vector_study.py` from the records in this folder; what was asked: docs/prereg.md. NLL of "
        "the reference text in nats a token; differences are paired, with 95 % intervals over source documents; "
        "p-values are Holm's of the 18 cells of a family. Non-inferior: the one-sided 95 % bound below the margin.",
        markdown(
            result,
            ["task", "scorer", "budget", "n", "full", *ARMS],
            {"n": "{:.0f}", **dict.fromkeys(("full", *ARMS), "{:.3f}")},
        ),
    ]
    for pair in PAIRS:
        name = pair.split(" - ")[0]
        shown = result.assign(
            difference=[
                signed({"mean": mean, "low": low, "high": high})
                for mean, low, high in result[[pair, f"{pair}, low", f"{pair}, high"]].to_numpy()
            ]
        )
        columns = ["task", "scorer", "budget", "clusters", "difference", f"{pair}, Holm p"]
        forms = {"clusters": "{:.0f}", f"{pair}, Holm p": "{:.2g}"}
        if pair.endswith("base"):
            columns += [f"{name}, bound", f"{name}, margin", f"{name} non-inferior"]
            forms |= {f"{name}, bound": "{:.4f}", f"{name}, margin": "{:.4f}"}
        lines += [f"## {pair}", markdown(shown, columns, forms)]
    held, shared = result["held"].mean(), result["shared"].mean()
    saved = result["bytes_full"].mean() - held
    lines.append(
        f"Bytes: ours holds {held / 2**20:.2f} MiB a context on average and shares {shared / 2**20:.2f} MiB of maps a "
        f"model, paid for from {int(np.ceil(shared / saved))} contexts on beside full caches. Records over budget: "
        f"{result['over'].sum():.0f}."
    )
    if len(draws):
        lines += ["## Another draw of the calibration documents", markdown(draws, list(draws.columns), {})]
    return "\n\n".join(lines) + "\n"


def spread(table: pd.DataFrame) -> pd.DataFrame:
    """NLL by calibration draw, on the examples that all draws have."""
    mine = table[table.arm.isin(("ours", "paper")) & (table.scorer == "keydiff") & (table.budget == 0.1)]
    rows = []
    for (task, kind), part in mine.groupby(["task", "arm"]):
        nll = part.pivot(index="id", columns="draw", values="answer_nll").dropna()
        if len(nll) and nll.shape[1] > 1:
            means = nll.mean()
            each = ", ".join(f"{value:.4f}" for value in means)
            rows.append({"task": task, "arm": kind, "n": len(nll), "NLL": each, "sd": f"{means.std():.4f}"})
    return pd.DataFrame(rows)


def write(folder: Path) -> str:
    table = read(folder)
    result = compare(table)
    return written(folder, result, page(result, spread(table)))


if __name__ == "__main__":
    sys.exit(command(__doc__, "results/vector_vs_base", write))
