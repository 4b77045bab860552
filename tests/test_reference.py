"""Committed results can be made again: a sample of results/reference/, run anew, gives the same records."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kvbench import fetch
from kvbench.errors import UsageError
from kvbench.report.remake import command
from kvbench.run import main
from kvbench.store import cells, read_cell

REFERENCE = Path(__file__).parent.parent / "results" / "reference"
SAMPLE = [("niah", "snapkv"), ("ruler", "kivi"), ("lm", "vector")]  # of each the first finished cell, in folders' order
EXAMPLES = 1
# Nats that another processor's float32 sums may move; everything else is equal, bytes, texts and scores included.
SUMS, TOLERANCE = {"answer_nll", "kl_full"}, 1e-3


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two threads that have to share a busy machine's cores wait for each other
    yield
    torch.set_num_threads(threads)


def finished(task: str, method: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Header and first records of a finished cell."""
    for folder in cells(REFERENCE):
        header, records = read_cell(folder)
        names = (header["identity"]["task"]["name"], header["identity"]["method"]["name"])
        if header["status"] == "done" and names == (task, method):
            return header, records[:EXAMPLES]
    pytest.skip(f"there is no finished cell of {method} on {task} in results/reference (make reference)")


def need_what_it_was_made_with(header: dict[str, Any]) -> None:
    """Skips without the model, and without the very artefacts: fitted on another processor their last bits differ."""
    try:
        fetch.embedded_model()
    except UsageError as error:
        pytest.skip(str(error))
    folder = fetch.cache_folder() / "artefacts" / header["identity"]["model"]["name"]
    here = {hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in folder.glob("*.safetensors")}
    if missing := set(header["about"]["artefacts"]) - here:
        pytest.skip(f"what {header['label']} has fitted to the model is not on this machine: {missing}")


@pytest.mark.usefixtures("corpora")
@pytest.mark.parametrize(("task", "method"), SAMPLE)
def test_a_cell_made_again_has_the_same_records(
    task: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, expected = finished(task, method)
    need_what_it_was_made_with(before)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # main sets both: undone after the test
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = shlex.split(command(before, EXAMPLES, str(tmp_path)))[3:]  # those after `python -m kvbench.run`
    assert main([*words, "timed=0", "tracker.mode=disabled", "model.device=cpu"]) == 0, capsys.readouterr().err
    (folder,) = cells(tmp_path)
    after, records = read_cell(folder)
    assert after["identity"] == before["identity"]
    for made_with in ("model", "data", "artefacts"):
        assert after["about"][made_with] == before["about"][made_with]
    for record, old in zip(records, expected, strict=True):
        exact = old.keys() - SUMS
        assert {name: record[name] for name in exact} == {name: old[name] for name in exact}
        assert [record[name] for name in SUMS] == pytest.approx([old[name] for name in SUMS], abs=TOLERANCE)
