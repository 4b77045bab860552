"""What figures share: a style for a paper's column, labels apart from each other, files.

Imports no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from scipy.optimize import isotonic_regression

from kvbench.errors import UsageError

COLUMN = 3.3  # inches
GREY, INK = "#999999", "#000000"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", INK)  # colour-blind safe
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
