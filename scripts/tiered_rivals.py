"""Which rival of the tiered mix is the best in each cell, from the records of conf/experiment/tiered_tuning.yaml.

python scripts/tiered_rivals.py results/tiered_tuning

Writes into the folder rivals.csv, the best rival of each task, protocol and budget beside the full cache, and
tuning.csv, all that the choice was made from and the mix itself: mean NLL of the reference in nats a token.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from kvbench.errors import UsageError
from kvbench.report.study import command, task_name
from kvbench.report.table import described
from kvbench.store import cells, read_cell

CELL = ["task", "protocol", "budget"]


def read(results: Path) -> pd.DataFrame:
    """A row per cell that is done. `kind`: full, mix (VECTOR's routers, variants included) or rival."""
    rows = []
    for folder in cells(results):
        header, records = read_cell(folder)
        if header["status"] != "done":
            continue
        identity = header["identity"]
        method = identity["method"]["name"]
        rows.append(
            {
                "task": task_name(identity),
                "protocol": identity["protocol"],
                "budget": float(identity["budget"]),
                "method": described(header)["method"],
                "kind": {"full": "full", "vector": "mix"}.get(method, "rival"),
                "answer_nll": sum(one["answer_nll"] for one in records) / len(records),
                "n": len(records),
            }
        )
    if not rows:
        raise UsageError(f"no finished cells in {results}: python -m kvbench.experiment tiered_tuning")
    return pd.DataFrame(rows).sort_values([*CELL, "answer_nll"], ignore_index=True)


def rivals(table: pd.DataFrame) -> pd.DataFrame:
    """The best rival of each cell, and what the full cache has there."""
    best = table[table.kind == "rival"].drop_duplicates(CELL).drop(columns="kind")
    full = table[table.kind == "full"].set_index(["task", "protocol"]).answer_nll.rename("full")
    return best.rename(columns={"method": "rival"}).join(full, on=["task", "protocol"])


def write(folder: Path) -> str:
    table = read(folder)
    chosen = rivals(table)
    table.round(4).to_csv(folder / "tuning.csv", index=False)
    chosen.round(4).to_csv(folder / "rivals.csv", index=False)
    return chosen.to_string(index=False, float_format="{:.3f}".format)


if __name__ == "__main__":
    sys.exit(command(__doc__, "results/tiered_tuning", write))
