"""What figures share: a style for a paper's column, names that fit, labels apart from each other, files.

Imports no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from scipy.optimize import isotonic_regression

from kvbench.cell import slug
from kvbench.errors import UsageError

COLUMN, PAGE = 3.3, 6.9  # inches: one column, and the width of the text
GREY, INK = "#999999", "#000000"
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.5,
    "pdf.fonttype": 42,  # letters stay letters: they can be searched and edited
    "svg.fonttype": "none",
    "svg.hashsalt": "kvbench",
}
SETTING = ("model", "protocol", "seed", "task", "generate")  # what a figure or a table is of
SUFFIXES = (".png", ".pdf", ".svg")


def save(figure: Figure, base: Path) -> list[Path]:
    """Writes `base` as PNG, PDF and SVG: the same bytes from the same figure, no dates within."""
    undated = {".png": {}, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}
    files = [base.with_name(base.name + suffix) for suffix in SUFFIXES]
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context(STYLE):
            for file in files:
                figure.savefig(file, dpi=300, metadata=undated[file.suffix])
    except OSError as error:
        raise UsageError(f"could not write {base}: {error.strerror}") from error
    return files


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


def width(text: str, size: float, bold: bool = False) -> float:
    """Inches that a text takes."""
    font = FontProperties(family=STYLE["font.sans-serif"], weight="bold" if bold else "normal")
    return TextPath((0, 0), text, size=size, prop=font, usetex=False).get_extents().x1 / 72 if text.strip() else 0.0


def spread(wanted: Float[np.ndarray, " labels"], gap: float, low: float, high: float) -> Float[np.ndarray, " labels"]:
    """Heights as near as possible to the wanted ones, in their order, at least `gap` apart, within `low` and `high`.

    Least squares: an isotonic regression of the heights less the room that the labels below take.
    """
    order = np.argsort(wanted, kind="stable")
    room = gap * np.arange(len(wanted))
    placed = np.empty(len(wanted))
    placed[order] = isotonic_regression(wanted[order] - room).x.clip(low, max(low, high - room[-1])) + room
    return placed
