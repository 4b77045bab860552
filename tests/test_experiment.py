"""Studies: files of conf/experiment/ as cells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from sweeps import prepared, states

from kvbench import experiment, side_by_side
from kvbench.config import convert
from kvbench.errors import UsageError
from kvbench.list import choices
from kvbench.run import main
from kvbench.sweep import composed_words


def test_a_list_is_each_of_its_values_and_what_is_deeper_wins() -> None:
    node = {
        "a": [1, 2],
        "b": 0,
        "cells": [{"m": "x"}, {"m": ["y", "z"], "b": 5, "t": [["p", "q"]]}],
    }
    found = list(experiment.options_of(node))
    assert found[0] == {"a": 1, "b": 0, "m": "x"}
    assert [one["m"] for one in found] == ["x", "y", "z", "x", "y", "z"]
    assert [one["a"] for one in found] == [1, 1, 1, 2, 2, 2]
    assert found[1] == {"a": 1, "b": 5, "m": "y", "t": ("p", "q")}
    assert list(experiment.options_of({"a": 1, "cells": [{}, {"cells": []}]})) == [{"a": 1}]


@pytest.mark.parametrize("name", experiment.experiments())
def test_every_study_composes_to_cells_of_its_own(name: str) -> None:
    every = experiment.read(name)
    some = every[:: -max(1, len(every) // 12)]  # from the last one on
    cells = [convert(composed_words(words)).cell.digest for words in some]
    assert len(set(cells)) == len(cells) >= min(12, len(every))


def test_the_reference_results_have_every_method() -> None:
    words = {word for cell in experiment.read("reference") for word in cell}
    assert {f'method="{name}"' for name in choices("methods")} <= words


def test_an_unknown_study_is_refused_with_the_known() -> None:
    with pytest.raises(UsageError, match="vector_vs_base"):
        experiment.read("nonsense")


def test_a_study_is_a_group_of_its_name() -> None:
    assert {convert(composed_words(words)).settings.tracker_group for words in experiment.read("reference")[:1]} == {
        "reference"
    }


@pytest.fixture
def words(tmp_path: Path) -> Iterator[list[str]]:
    with prepared(tmp_path) as chosen:
        yield chosen


@pytest.mark.parametrize(
    ("jobs", "devices", "expected"),
    [
        (None, [], [None]),
        (2, [], [None, None]),
        (None, ["3", "5"], ["3", "5"]),
        (1, ["3", "5"], ["3"]),
        (3, ["3", "5"], ["3", "5", "3"]),
    ],
)
def test_workers_share_out_the_devices(
    monkeypatch: pytest.MonkeyPatch, jobs: int | None, devices: list[str], expected: list[str | None]
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    found = experiment.workers(jobs, devices)
    assert [worker.get("CUDA_VISIBLE_DEVICES") for worker in found] == expected
    assert {worker["OMP_NUM_THREADS"] for worker in found} == {str(4 // len(expected))}


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A study of six cells, in two groups."""
    file = tmp_path / "small.yaml"
    file.write_text("seed: [0, 1]\ncells:\n  - {method: random, budget: [0.3, 0.5]}\n  - {method: full}\n")
    monkeypatch.setattr(experiment, "experiments", lambda: {"small": file})
    return "small"


@pytest.mark.parametrize(("device", "expected"), [("auto", ["0", "1"]), ("cpu", [])])
def test_a_study_takes_every_gpu_unless_told_which(
    words: list[str], small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, expected: list[str]
) -> None:
    monkeypatch.setattr(side_by_side, "cuda_devices", lambda: ["0", "1"])
    started: list[str] = []

    def begun(groups: Sequence[Any], workers: Sequence[dict[str, str]]) -> None:
        started.extend(worker["CUDA_VISIBLE_DEVICES"] for worker in workers)

    monkeypatch.setattr(experiment, "side_by_side", begun)
    code = experiment.run(small, [*words, f"results={tmp_path / 'results'}", "limit=2", f"model.device={device}"])
    assert started == expected
    assert code == (1 if expected else 0)  # of two processes nobody has run anything


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_is_infeasible_is_a_result(
    words: list[str], small: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], jobs: int
) -> None:
    (tmp_path / "small.yaml").write_text("seed: [0, 1]\ncells:\n  - {method: random, budget: [0.00001, 0.5]}\n")
    options = [*words, f"results={tmp_path / 'results'}", "limit=2"]
    for again in (False, True):
        assert experiment.run(small, options, jobs) == 0
        assert states(tmp_path / "results") == 2 * ["done"] + 2 * ["infeasible"]
        told = capfd.readouterr().err
        assert "kvbench: 2 of 4 cells are infeasible: python -m kvbench.status results=" in told
        assert ("is below the smallest plan of random" in told) is not again  # it is not tried again
    assert experiment.run(small, [*options, "redo=true"], jobs) == 0
    assert "is below the smallest plan of random" in capfd.readouterr().err
    alone = ["method=random", "budget=0.00001", "seed=0", *options]
    assert main(alone) == 2  # asked for alone it can't be met, as before
    assert "is below the smallest plan of random" in capfd.readouterr().err


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_study_runs_and_goes_on_where_it_stopped(
    words: list[str], small: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], jobs: int
) -> None:
    options = [*words, f"results={tmp_path / 'results'}", "limit=2"]
    assert experiment.run(small, options, jobs) == 0
    assert states(tmp_path / "results") == 6 * ["done"]
    capfd.readouterr()
    assert experiment.run(small, options, jobs) == 0
    assert "nothing to do" in capfd.readouterr().out
