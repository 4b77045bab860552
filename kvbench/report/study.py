"""What studies share: their records, paired differences with their tests and margins, a table, a command.

Differences are of losses in nats a token, ours less theirs. Imports no torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray

from kvbench.errors import UsageError
from kvbench.report.statistics import Clusters, Side, interval, noninferior, p_values
from kvbench.store import cells, read_cell

ABSOLUTE, RELATIVE = 0.01, 0.05  # of the margin: nat, and share of the gap to the full cache


def examples(
    results: Path, fields: Sequence[str], about: Callable[[dict[str, Any]], dict[str, Any]], experiment: str
) -> pd.DataFrame:
    """A row per example and cell: `task`, `protocol`, `budget` and what `about` says of the cell's header, then the
    record's `id`, `cluster_id`, `answer_nll` and `fields`.

    Raises:
        UsageError: there are none; `experiment` makes them.
    """
    rows = []
    for folder in cells(results):
        header, records = read_cell(folder)
        identity = header["identity"]
        cell = {"task": task_name(identity), "protocol": identity["protocol"], "budget": float(identity["budget"])}
        cell |= about(header)
        rows += [cell | {name: one[name] for name in ("id", "cluster_id", "answer_nll", *fields)} for one in records]
    if not rows:
        raise UsageError(f"no records in {results}: python -m kvbench.experiment {experiment}")
    return pd.DataFrame(rows)


def vector_arm(method: Mapping[str, Any]) -> tuple[str, str]:
    """(base, arm) of a method's identity in studies of VECTOR: full, base, twin (4 bits), paper (its recipe), ours."""
    name = method["name"]
    if name == "compose":
        return method.get("scorer", "snapkv"), "twin"
    if name == "vector":
        return method.get("base", "snapkv"), "paper" if method.get("router") == "paper" else "ours"
    return ("", "full") if name == "full" else (name, "base")


def beside(
    table: pd.DataFrame, by: Sequence[str], arms: Sequence[str]
) -> list[tuple[dict[str, Any], pd.DataFrame, pd.DataFrame, Clusters]]:
    """For each group of `by` (task and protocol first): the start of its row (what it is, `n`, `clusters`, mean NLL of
    each arm and of full), its records, NLL by example and arm, and the clusters of these examples.

    Only examples that all arms and the full cache have; a group without any is left out.

    Raises:
        UsageError: none has any.
    """
    full, found = table[table.arm == "full"], []
    for key, part in table[table.arm != "full"].groupby(list(by)):
        nll = part.pivot(index="id", columns="arm", values="answer_nll").reindex(columns=list(arms))
        same = full[(full.task == key[0]) & (full.protocol == key[1])].set_index("id")
        nll = nll.assign(full=same.answer_nll).dropna()
        if len(nll):
            clusters = Clusters(same.cluster_id[nll.index].to_numpy())
            row = {**dict(zip(by, key, strict=True)), "n": len(nll), "clusters": clusters.count, **nll.mean()}
            found.append((row, part, nll, clusters))
    if not found:
        raise UsageError(f"no cell has examples of all of full, {', '.join(arms)} yet")
    return found


def task_name(identity: Mapping[str, Any]) -> str:
    """A cell's task, as studies name it: "lm", "niah, 4 needles"."""
    task = identity["task"]
    if task["name"] != "niah":
        return str(task["name"])
    needles = task.get("needles", 1)
    return f"niah, {needles} needle" + "s" * (needles > 1)


def difference(
    values: Float[ndarray, " examples"], clusters: Clusters, rng: np.random.Generator, side: Side, tests: int
) -> dict[str, float]:
    """`mean`, its 95 % interval `low` to `high`, and `p`, one of `tests` that a correction will be over."""
    one = interval(values, clusters, rng)
    p = p_values(values[:, None], clusters, rng, side, tests=tests).p[0]
    return {"mean": one.mean, "low": one.low, "high": one.high, "p": float(p)}


def within_margin(
    values: Float[ndarray, " examples"],
    gap: Float[ndarray, " examples"],
    clusters: Clusters,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """`bound`, `margin` and whether `holds`: the margin is 0.01 nat, or 5 % of `gap` where that is more on average.

    `gap` is theirs less the full cache's; its noise counts where it is the margin.
    """
    margin = max(ABSOLUTE, RELATIVE * float(gap.mean()))
    found = noninferior(values, clusters, rng, RELATIVE * gap if margin > ABSOLUTE else ABSOLUTE)
    return {"bound": found.bound, "margin": margin, "holds": found.holds}


def signed(one: Mapping[str, Any]) -> str:
    """A difference with its interval, as studies show it."""
    return f"{one['mean']:+.4f} ({one['low']:+.4f} to {one['high']:+.4f})"


def markdown(table: pd.DataFrame, columns: Sequence[str], forms: Mapping[str, str]) -> str:
    """Some columns of a table; a cell that is not there stays empty."""
    rows = [
        ["" if pd.isna(row[c]) else forms.get(c, "{}").format(row[c]) for c in columns] for _, row in table.iterrows()
    ]
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def written(folder: Path, table: pd.DataFrame, page: str) -> str:
    """`page`, after it was written into a results folder as study.md, beside the table as study.csv."""
    (folder / "study.md").write_text(page)
    table.to_csv(folder / "study.csv", index=False)
    return page


def command(about: str, results: str, make: Callable[[Path], str]) -> int:
    """The command line of a study's script: prints what `make` writes of a results folder; returns the exit code."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", default=Path(results))
    try:
        print(make(parser.parse_args().results))
    except UsageError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0
