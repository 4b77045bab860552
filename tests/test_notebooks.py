"""The notebooks run, and are committed as they ran."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from kvbench import fetch
from kvbench.errors import UsageError

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.fixture
def ready(own_cache: Path, corpora: None) -> None:
    """Skips where the model, or VECTOR's maps for it, have not been made."""
    try:
        fetch.embedded_model()
    except UsageError as error:
        pytest.skip(str(error))
    if not any(own_cache.glob("artefacts/smollm2-135m-q4_1/ValueMaps-*")):
        pytest.skip("VECTOR's maps are missing: run `make setup`")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path, ready: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With less text and fewer examples than shown."""
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setenv("KVBENCH_NOTEBOOK_TINY", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    root = str(path.parent.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])))
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(tmp_path / "notebooks")}}
    NotebookClient(notebook, timeout=280, kernel_name="python3", resources=resources).execute()
    assert list((tmp_path / "results").rglob("examples.jsonl"))


def cells(path: Path) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_was_run_from_top_to_bottom(path: Path) -> None:
    assert [cell["execution_count"] for cell in cells(path)] == list(range(1, len(cells(path)) + 1))
    shown = json.dumps([cell["outputs"] for cell in cells(path)])
    assert '"output_type": "error"' not in shown
    assert '"output_type": "execute_result"' in shown
    assert not re.search(r"/(home|root|tmp|work|Users)/", shown), "a path of somebody's machine"
    assert len(path.read_bytes()) < 150_000
