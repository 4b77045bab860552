"""VECTOR with maps of the task's own domain beside maps of others, from the records of
conf/experiment/vector_domains.yaml. Exploratory: docs/experiments.md says what came out.

python scripts/domain_study.py results/vector_domains

Writes study.md and study.csv into the folder. Cells that are not finished are compared on what all arms have: `n` in
the page.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kvbench.report.statistics import benjamini_hochberg
from kvbench.report.study import beside, command, difference, examples, markdown, signed, vector_arm, written

DOMAIN = "essays"  # what the study's texts and haystacks are
ARMS = ["base", "paper, left out", "paper, in domain", "ours, left out", "ours, in domain"]
PAIRS = [(arm, "base") for arm in ARMS[1:]] + [
    (f"{name}, in domain", f"{name}, left out") for name in ("paper", "ours")
]


def arm(method: Mapping[str, Any]) -> tuple[str, str]:
    """(scorer, arm) of a method's identity: `vector_arm`'s, and of which domain its maps are."""
    scorer, name = vector_arm(method)
    if name in ("paper", "ours"):
        name += ", in domain" if DOMAIN in method["texts"] else ", left out"
    return scorer, name


def read(results: Path) -> pd.DataFrame:
    """A row per example and cell."""

    def about(header: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(("scorer", "arm"), arm(header["identity"]["method"]), strict=True))

    return examples(results, (), about, "vector_domains")


def compare(table: pd.DataFrame) -> pd.DataFrame:
    """A row per task, scorer, budget and pair of arms."""
    groups = beside(table, ["task", "protocol", "scorer", "budget"], ARMS)
    found = []
    for row, _, nll, clusters in groups:
        rng = np.random.default_rng(0)
        for ours, theirs in PAIRS:
            values = (nll[ours] - nll[theirs]).to_numpy()
            one = difference(values, clusters, rng, "both", tests=len(groups) * len(PAIRS))
            found.append({**row, "pair": f"{ours} - {theirs}", **one})
    result = pd.DataFrame(found)
    result["q"] = benjamini_hochberg(result["p"].to_numpy())
    return result


def page(result: pd.DataFrame) -> str:
    where = ["task", "protocol", "scorer", "budget"]
    marked = [signed(row) + ("\\*" if row["q"] < 0.05 else "") for row in result.to_dict("records")]
    differences = result.assign(shown=marked).pivot(index=where, columns="pair", values="shown").reset_index()
    means = result.drop_duplicates(where)
    pairs = [f"{ours} - {theirs}" for ours, theirs in PAIRS]
    return "\n\n".join(
        [
            "# VECTOR in its maps' domain and out of it",
            "Written by `scripts/domain_study.py` from the records in this folder; exploratory (docs/experiments.md). "
            "*Paper*: its recipe, remade; *ours*: 8-bit, 4-bit, 4-bit key + estimated value, evicted. *In domain*: "
            f"maps of other {DOMAIN}; *left out*: of four other texts. NLL of the reference text in nats a token; "
            "differences are paired, with 95 % intervals over source documents; \\*: p < .05 after Benjamini-Hochberg "
            f"over all {len(result)} differences.",
            markdown(means, [*where, "n", "full", *ARMS], dict.fromkeys(("full", *ARMS), "{:.3f}")),
            markdown(differences, [*where, *pairs[:4]], {}),
            markdown(differences, [*where, *pairs[4:]], {}),
        ]
    )


def write(folder: Path) -> str:
    result = compare(read(folder))
    return written(folder, result, page(result) + "\n")


if __name__ == "__main__":
    sys.exit(command(__doc__, "results/vector_domains", write))
