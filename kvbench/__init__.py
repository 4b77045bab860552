"""A benchmark harness for KV-cache compression."""

from pathlib import Path

__version__ = "0.1.0"

# In the wheel methods/, tasks/ and conf/ lie inside this package; in a checkout they lie beside it. There, looking for
# submodules in the checkout's root as well gives them the same names: kvbench.methods, kvbench.tasks.
if (Path(__file__).parent.parent / "pyproject.toml").exists():
    __path__.append(str(Path(__file__).parent.parent))
