"""`python -m kvbench.status`: what it says of cells in each state, and how it ends."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_config import PLAY, plugin_folder  # noqa: F401 (fixture)

import kvbench
from kvbench import run, status
from kvbench.cell import Cell
from kvbench.store import CellStore

SWEEP = [*PLAY, "-m", "budget=0.1,0.2,0.3,0.4,0.5,0.6"]


@pytest.fixture
def asked(plugin_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Cell]:  # noqa: F811
    """The cells of `SWEEP`. The working folder is empty."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # main sets both: undone after the test
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    found: list[Cell] = []
    assert run.main(SWEEP, lambda configs, tell: found.extend(run.convert(config).cell for config in configs)) == 0
    return found


def leave(cell: Cell, examples: int, end: str = "", limit: int | None = 32) -> CellStore:
    """Leaves records as a run does that ends in `end`, or is killed."""
    store = CellStore.open(cell, Path("results"), {}, limit)
    for number in range(examples):
        store.append({"id": str(number)})
    if end == "done":
        store.finish(exhausted=False, timed=3)
    elif end:
        store.fail("out of memory" if end == "failed" else "the smallest plan needs 9 bytes", end)
    return store


@pytest.fixture
def left(asked: list[Cell]) -> Iterator[list[Cell]]:
    """One cell in each state, the first still being written."""
    running = leave(asked[0], 1)
    for cell, (examples, end) in zip(asked[1:5], ENDS, strict=True):
        with leave(cell, examples, end):
            pass
    with running:
        yield asked


ENDS = [(32, "done"), (2, ""), (3, "failed"), (0, "infeasible")]
STATES = ["running 1/32", "done 32/32", "interrupted 2/32", "failed 3/32", "infeasible 0/32", "missing 0/32"]


def shown(capsys: pytest.CaptureFixture[str]) -> list[tuple[str, str, str]]:
    """Per line: state and examples, folder, reason."""
    *lines, _ = capsys.readouterr().out.splitlines()
    words = [line.split(maxsplit=3) for line in lines]
    return [(f"{state} {examples}", folder, "".join(reason)) for state, examples, folder, *reason in words]


def test_what_a_sweep_asks_for(left: list[Cell], capsys: pytest.CaptureFixture[str]) -> None:
    assert status.main([*SWEEP, "hydra/launcher=slurm", "hydra.launcher.partition=gpu"]) == 1
    lines = shown(capsys)
    assert [state for state, _, _ in lines] == STATES
    assert [Path("results") / folder for _, folder, _ in lines] == [cell.folder(Path("results")) for cell in left]
    assert [reason for _, _, reason in lines[3:5]] == ["out of memory", "the smallest plan needs 9 bytes"]


def test_what_is_in_a_folder(left: list[Cell], capsys: pytest.CaptureFixture[str]) -> None:
    assert status.main([]) == 1
    states = [state for state, _, _ in shown(capsys)]
    assert sorted(states) == sorted(STATES[:-1])
    Path("results").rename("elsewhere")
    assert status.main(["results=elsewhere"]) == 1
    assert [state for state, _, _ in shown(capsys)] == states
    assert status.main([]) == 2
    assert capsys.readouterr().err == "kvbench: there is no cell in results\n"


def test_done_is_what_was_asked_for(left: list[Cell], capsys: pytest.CaptureFixture[str]) -> None:
    one = [*PLAY, "budget=0.2"]
    assert status.main(one) == 0
    assert status.main([*one, "limit=8"]) == 0
    capsys.readouterr()
    assert status.main([*one, "limit=64"]) == 1
    ((state, _, reason),) = shown(capsys)
    assert (state, reason) == ("missing 32/64", "done with less than is asked for")


def test_infeasible_is_nothing_left_to_do(left: list[Cell], capsys: pytest.CaptureFixture[str]) -> None:
    assert status.main([*PLAY, "-m", "budget=0.2,0.5"]) == 0
    assert [state for state, _, _ in shown(capsys)] == ["done 32/32", "infeasible 0/32"]


def test_one_cell_is_one_line(asked: list[Cell], capsys: pytest.CaptureFixture[str]) -> None:
    assert status.main(["-m", "method=full", PLAY[1], "budget=0.1,0.2"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "1 cells: 1 missing"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["method=nope"], "unknown method 'nope'"),
        (["-m", "budget=0"], "budget=0 is not above zero"),
        (["results=a,b"], "results=a,b gives several values"),
        (["results=nowhere"], "there is no cell in nowhere"),
    ],
)
def test_bad_input_is_one_line(
    asked: list[Cell], capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    assert status.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"kvbench: {expected}")


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert status.main(["--help"]) == 0
    help_text = capsys.readouterr().out
    assert all(f"\n  {state.split()[0]} " in help_text for state in STATES)


def test_a_folder_is_listed_without_torch(left: list[Cell], tmp_path: Path) -> None:
    code = "import sys; from kvbench import status; status.main([]); print('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(Path(kvbench.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    *_, counts, imported = done.stdout.splitlines()
    assert counts.startswith("5 cells: ")
    assert "1 running" in counts  # the lock is this process's
    assert imported == "False"
