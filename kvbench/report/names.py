"""How tables and figures, and their files, are called. Imports no torch."""

from __future__ import annotations

import re
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
    """Label -> a text of about `most` characters: options behind the first make way.

    Labels that would then be alike show the options in which they differ; where those are too long, their beginning and
    a number.
    """
    alike: dict[str, list[str]] = {}
    for label in labels:
        group = alike.setdefault(_cut(label, most), [])
        if label not in group:
            group.append(label)
    found = {}
    for text, group in alike.items():
        texts = [text] if len(group) == 1 else [_cut_end(one, 2 * most) for one in _told_apart(group)]
        uses, seen = Counter(texts), Counter[str]()
        for label, one in zip(group, texts, strict=True):
            seen[one] += 1
            found[label] = one if uses[one] == 1 else f"{one} {seen[one]}"
    return found


def _told_apart(labels: Sequence[str]) -> list[str]:
    """Labels of one method with the options that all have left out."""
    split = [_options(label) for label in labels]
    common = set.intersection(*(set(options) for _, options in split))
    texts = []
    for name, options in split:
        own = [option for option in options if option not in common]
        rest = ["…"] if len(own) < len(options) else []
        texts.append(f"{name}({','.join(own + rest)})" if options else name)
    return texts


def _options(label: str) -> tuple[str, list[str]]:
    """(name, options) of a label such as name(a=1,b=[1, 2]): commas inside brackets are no ends."""
    name, _, inside = label.removesuffix(")").partition("(")
    return name, [part for part in re.split(r",(?![^\[{(]*[\]})])", inside) if part]


def _cut_end(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _cut(label: str, most: int) -> str:
    name, bracket, options = label.partition("(")
    if len(label) <= most or not bracket:
        return label
    first = options.partition(",")[0]
    return f"{name}({first},…)" if len(name) + len(first) + 4 <= most else f"{name}(…)"
