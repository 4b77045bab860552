"""A benchmark harness for KV-cache compression."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvbench.generation import compress, load
    from kvbench.report.table import read
    from kvbench.sweep import evaluate

__version__ = "0.1.0"
__all__ = ["compress", "evaluate", "load", "read"]

# In the wheel methods/, tasks/ and conf/ lie inside this package; in a checkout they lie beside it. There, looking for
# submodules in the checkout's root as well gives them the same names: kvbench.methods, kvbench.tasks.
if (Path(__file__).parent.parent / "pyproject.toml").exists():
    __path__.append(str(Path(__file__).parent.parent))

_PLACES = {
    "compress": "kvbench.generation",
    "load": "kvbench.generation",
    "evaluate": "kvbench.sweep",
    "read": "kvbench.report.table",
}


def __getattr__(name: str) -> Any:
    """The functions for Python are imported, torch with some of them, when they are first asked for."""
    if name not in _PLACES:
        raise AttributeError(f"module 'kvbench' has no attribute '{name}'")
    return getattr(importlib.import_module(_PLACES[name]), name)
