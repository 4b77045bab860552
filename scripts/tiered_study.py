"""The answers that docs/prereg_tiered.md asks for, from the records of conf/experiment/tiered_vs_rivals.yaml or
tiered_open.yaml.

python scripts/tiered_study.py results/tiered_vs_rivals

Writes study.md and study.csv into the folder. Cells that are not finished are compared on what both sides have: `n` in
the page. Those of which a side has nothing are left out.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kvbench.report.statistics import holm
from kvbench.report.study import beside, command, difference, examples, markdown, signed, within_margin, written
from kvbench.report.table import method_label

ARMS = {"full": "full", "vector": "mix"}  # by method; all others are rivals


def read(results: Path) -> pd.DataFrame:
    """A row per example and cell. `arm`: full, mix or rival."""

    def about(header: dict[str, Any]) -> dict[str, Any]:
        arm = ARMS.get(header["identity"]["method"]["name"], "rival")
        return {"arm": arm, "method": method_label(header)}

    return examples(results, ("bytes_held", "bytes_budget"), about, "tiered_vs_rivals")


def compare(table: pd.DataFrame) -> pd.DataFrame:
    """A row per task, protocol and budget: the mix beside its rival."""
    groups = beside(table, ["task", "protocol", "budget"], ["rival", "mix"])
    found = []
    for row, part, nll, clusters in groups:
        rng = np.random.default_rng(0)
        values, gap = (nll["mix"] - nll["rival"]).to_numpy(), (nll["rival"] - nll["full"]).to_numpy()
        row["which rival"] = part[part.arm == "rival"].method.iloc[0]
        row["over"] = int((part.bytes_held > part.bytes_budget).sum())
        row |= difference(values, clusters, rng, "less", tests=len(groups))
        found.append(row | within_margin(values, gap, clusters, rng))
    result = pd.DataFrame(found)
    result["Holm p"] = holm(result.pop("p").to_numpy())
    result["better"] = result["Holm p"] < 0.05
    return result.rename(columns={"holds": "non-inferior"})


def page(result: pd.DataFrame) -> str:
    shown = result.assign(difference=[signed(row) for row in result.to_dict("records")])
    columns = ["task", "protocol", "budget", "n", "full", "rival", "mix", "difference", "Holm p", "better"]
    columns += ["bound", "margin", "non-inferior", "which rival"]
    forms = {"Holm p": "{:.2g}", "n": "{:.0f}"}
    forms |= dict.fromkeys(("full", "rival", "mix"), "{:.3f}") | dict.fromkeys(("bound", "margin"), "{:.4f}")
    counts = (
        f"Of {len(result)} cells: better in {result['better'].sum()} (Holm), non-inferior in "
        f"{result['non-inferior'].sum()}; the interval lies below 0 in {(result.high < 0).sum()} and above it in "
        f"{(result.low > 0).sum()}. In {(result['rival'] - result['full'] < 0.01).sum()} the rival is within 0.01 nat "
        f"of the full cache. Records over budget: {result['over'].sum()}."
    )
    return "\n\n".join(
        [
            "# The tiered mix beside its rivals",
            "Written by `scripts/tiered_study.py` from the records in this folder; what was asked: "
            "docs/prereg_tiered.md. NLL of the reference text in nats a token; differences are paired, mix less rival, "
            "with 95 % intervals over source documents; p-values are one-sided, Holm's of all cells. Non-inferior: the "
            "one-sided 95 % bound below the margin.",
            counts,
            markdown(shown, columns, forms),
        ]
    )


def write(folder: Path) -> str:
    result = compare(read(folder))
    return written(folder, result, page(result) + "\n")


if __name__ == "__main__":
    sys.exit(command(__doc__, "results/tiered_vs_rivals", write))
