"""How tables and figures, and their files, are called. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pandas as pd

from kvbench.cell import slug
from kvbench.report.tidy import SETTING


def file_names(about: Sequence[pd.Series]) -> list[str]:
    """How the files of figures are called: by task and protocol, and by what else of their `SETTING` differs."""
    table = pd.DataFrame([one[[*SETTING, "task_name"]] for one in about])
    alone = table.groupby("task_name")["task"].transform("nunique") == 1
    table["name"] = table["task_name"].where(alone, table["task"])  # with its options only where it has to be
    table["generate"] = table["generate"].map({True: "answers", False: "fed"})
    alike = table.groupby(["task", "protocol"])
    told = ["name", "protocol", *(key for key in ("model", "seed", "generate") if (alike[key].nunique() > 1).any())]
    return ["-".join(slug(str(value))[:60].strip("_") for value in row) for row in table[told].itertuples(index=False)]


def short(labels: Sequence[str], most: int = 26) -> dict[str, str]:
    """Label -> a text of about `most` characters: options behind the first make way, unless two would be alike."""
    cut = {label: _cut(label, most) for label in labels}
    uses = Counter(cut.values())
    return {label: text if uses[text] == 1 else label for label, text in cut.items()}


def _cut(label: str, most: int) -> str:
    name, bracket, options = label.partition("(")
    if len(label) <= most or not bracket:
        return label
    first = options.partition(",")[0]
    return f"{name}({first},…)" if len(name) + len(first) + 4 <= most else f"{name}(…)"
