"""What CONTRIBUTING.md tells a newcomer is done here to the letter: a file in a folder is a method, or a task."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's own folder with the files that the page shows, each under the name it begins with."""
    made = tmp_path_factory.mktemp("mine")
    blocks = re.findall(
        r"```python\n# ((?:methods|tasks)/\w+\.py)\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S
    )
    assert [name for name, _ in blocks] == ["methods/keynorm.py", "tasks/capitals.py"]
    for name, code in blocks:
        (made / name).parent.mkdir(exist_ok=True)
        (made / name).write_text(code)
    return made


def python(folder: Path, *words: str) -> str:
    environment = os.environ | {"KVBENCH_PLUGINS": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_both_are_listed(folder: Path) -> None:
    listed = python(folder, "-m", "kvbench.list")
    assert "Keep the keys with the smallest norm" in listed
    assert "Name the capital that a list tells" in listed


def test_the_conformance_suite_finds_the_method_by_itself(folder: Path) -> None:
    suite = python(folder, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_methods.py", "-k", "keynorm")
    assert re.search(r"\b1[5-9]\d* passed", suite) or re.search(r"\b[2-9]\d+ passed", suite)


def test_it_runs_as_shown_alone_and_composed(folder: Path, tmp_path: Path) -> None:
    """On the embedded model and the task of the same page."""
    common = ["task=capitals", "budget=0.7", "timed=0", "tracker.mode=disabled", f"results={tmp_path}", "limit=2"]
    shown = python(folder, "-m", "kvbench.run", "method=keynorm", "method.sinks=4", *common)
    assert "keynorm(sinks=4)" in shown
    shown = python(
        folder, "-m", "kvbench.run", "method=compose", "method.scorer=keynorm", "method.tiers=[exact,int4]", *common
    )
    assert "compose(" in shown
