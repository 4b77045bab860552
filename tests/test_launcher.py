"""Groups in other processes: on several devices (pretended), and what SLURM is told (test_slurm.py has a real one)."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sweeps import prepared, states
from test_config import PLAY, plugin_folder, ran  # noqa: F401 (fixtures)

from kvbench import group, run, side_by_side
from kvbench.run import main
from kvbench.store import cells, read_cell


@pytest.fixture
def words(tmp_path: Path) -> Iterator[list[str]]:
    with prepared(tmp_path) as chosen:
        yield chosen


def test_groups_run_side_by_side_one_on_each_device(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    words = [*words, "budget=0.3", f"results={tmp_path / 'results'}", "task.number=2", "model.device=auto"]
    words[words.index(f"model.path={tmp_path / 'model'}")] = f"model.path={tmp_path / 'model'},{tmp_path / 'nowhere'}"
    assert main(["-m", *words, "method=random,streamingllm", "seed=0"]) == 1
    told = capfd.readouterr().err
    assert "kvbench: 2 of 2 groups ended" in told
    assert "kvbench: the weights of tiny are not to be had" in told
    assert "kvbench: 2 of 4 cells are not done: python -m kvbench.status results=" in told
    assert states(tmp_path / "results") == 2 * ["done"]
    used = {one["info"]["device"] for cell in cells(tmp_path / "results") for one in read_cell(cell)[1]}
    assert used == {"0"}


@pytest.fixture
def sleepers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Instead of Python a program that writes what it was called with, and sleeps: its one argument's seconds."""
    program = tmp_path / "python"
    program.write_text(
        f'#!/bin/sh\necho "$CUDA_VISIBLE_DEVICES $$" >>{tmp_path}/calls\nexec sleep "$(echo $3 | tr -d "[]\\"")"\n'
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    return tmp_path / "calls"


def on(*devices: str) -> list[dict[str, str]]:
    return [{"CUDA_VISIBLE_DEVICES": device} for device in devices]


def test_a_group_starts_as_soon_as_a_device_is_free(sleepers: Path) -> None:
    side_by_side.side_by_side([[["1"]], [["0.1"]], [["0.1"]], [["0.1"]]], on("5", "7"))
    calls = [line.split()[0] for line in sleepers.read_text().splitlines()]
    assert sorted(calls) == ["5", "7", "7", "7"]


def test_what_ends_the_sweep_ends_its_processes(sleepers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sleep(seconds: float) -> None:
        if sleepers.exists() and len(sleepers.read_text().splitlines()) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(side_by_side, "time", type("Clock", (), {"sleep": staticmethod(sleep)}))
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        side_by_side.side_by_side([[["60"]], [["60"]], [["60"]]], on("0", "1"))
    assert time.monotonic() < began + 30
    for line in sleepers.read_text().splitlines():
        with pytest.raises(ProcessLookupError):
            os.kill(int(line.split()[1]), 0)


@pytest.mark.parametrize(
    ("visible", "count", "expected"),
    [(None, 0, []), (None, 2, ["0", "1"]), ("3,5", 2, ["3", "5"]), ("GPU-a,GPU-b", 1, ["GPU-a"]), ("", 0, [])],
)
def test_devices_are_those_that_this_process_sees(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, count: int, expected: list[str]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert side_by_side.cuda_devices() == expected


def test_a_device_that_is_named_is_the_one_for_all(
    ran: list[Any],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert main([*PLAY, "-m", "seed=0,1", "model.device=cuda:1"]) == 0
    assert len(ran) == 2


@pytest.fixture
def undone(ran: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(run, "is_done", lambda *_: False)


@pytest.mark.usefixtures("undone")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "there is no sbatch here"),
        (["redo=true"], "redo=true would start over whenever SLURM requeues a job"),
        (["hydra.launcher.partitoin=x"], "partitoin"),
    ],
)
def test_what_slurm_cannot_do_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    monkeypatch.setenv("PATH", "")
    assert main([*PLAY, "-m", "seed=0,1", "hydra/launcher=slurm", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line


@pytest.mark.usefixtures("undone")
def test_without_submitit_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert main([*PLAY, "-m", "seed=0,1", "hydra/launcher=slurm"]) == 2
    expected = 'kvbench: hydra/launcher=slurm needs submitit: pip install "kvbench[slurm]"\n'
    assert capsys.readouterr().err == expected


@pytest.fixture
def _usr2() -> Iterator[None]:
    before = signal.getsignal(signal.SIGUSR2)
    yield
    signal.signal(signal.SIGUSR2, before)


@pytest.mark.usefixtures("_usr2")
def test_a_job_that_may_not_be_requeued_ends_without_blaming_a_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    def enough(number: int, frame: Any) -> None:
        raise RuntimeError("timed-out too many times")

    def cell(jobs: Any) -> int:
        try:
            os.kill(os.getpid(), signal.SIGUSR2)
            time.sleep(5)
        except Exception:  # how the loop learns that a cell has failed
            return 0
        return 0

    signal.signal(signal.SIGUSR2, enough)
    monkeypatch.setattr(group, "run_group", cell)
    with pytest.raises(SystemExit, match="timed-out too many times"):
        group.Group([["method=full"]])()
