"""The heat map shows the means of the records, cell by cell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvbench.errors import UsageError
from kvbench.report.heatmap import heatmap, needles
from kvbench.store import FORMAT


def write(results: Path, label: str, context: int, scores: dict[float, float]) -> None:
    folder = results / "niah" / "tiny" / f"{label}-{context}"
    folder.mkdir(parents=True)
    identity = {"method": {"name": label}, "budget": "0.1", "protocol": "blind"}
    (folder / "header.json").write_text(json.dumps({"format": FORMAT, "label": label, "identity": identity}))
    records = [
        {"id": str(i), "score": score, "info": {"context": context, "depths": [depth]}}
        for i, (depth, score) in enumerate(scores.items())
    ]
    (folder / "examples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_panels_have_the_means(tmp_path: Path) -> None:
    write(tmp_path, "snapkv", 1024, {0.0: 1.0, 0.1: 0.0, 0.95: 1.0})
    write(tmp_path, "snapkv", 2048, {1.0: 0.0})
    write(tmp_path, "full", 1024, {0.5: 1.0})
    table = needles(tmp_path)
    assert len(table) == 5
    figure = heatmap(table)
    panels = {axis.get_title(): axis for axis in figure.axes if axis.get_title()}
    assert list(panels) == ["full, 0.1, blind", "snapkv, 0.1, blind"]
    texts = {text.get_position(): text.get_text() for text in panels["snapkv, 0.1, blind"].texts}
    assert texts == {(0, 0): "0.50\n(n=2)", (0, 4): "1.00\n(n=1)", (1, 4): "0.00\n(n=1)"}


def test_other_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no records of task=niah"):
        needles(tmp_path)
