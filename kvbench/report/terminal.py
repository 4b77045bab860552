"""Where tables are printed. Imports no torch."""

from __future__ import annotations

from rich.console import Console


def terminal(width: int) -> Console:
    """As wide as the terminal is; files and pipes have `width` columns."""
    console = Console()
    if not console.is_terminal:
        console.width = width
    return console
