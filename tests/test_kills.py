"""Nothing is lost: a sweep that is killed at any moment ends, once repeated, with the records of an undisturbed one.

Run as a script, this file is a process that imports torch once and forks for every run.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from sweeps import SWEEP, prepared, states, timeless

from kvbench import status
from kvbench.run import guarded, main, start
from kvbench.store import CellStore, cells, read_cell

KILLS = 20


class Forks:
    """Runs one sweep again and again, each time in a fork of this process: all is imported and composed already."""

    def __init__(self, words: Sequence[str], folder: Path) -> None:
        self.configs: list[Any] = []
        self.folder = folder
        assert main(words, lambda configs, tell: self.configs.extend(configs)) == 0

    def run(self, results: Path) -> int:
        """Returns the process id."""
        child = os.fork()
        if child:
            return child
        output = os.open(f"{results}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        for config in self.configs:
            config.results = str(results)
        os._exit(guarded(self._start))

    def _start(self) -> int:
        errors: list[Exception] = []
        start(self.configs, errors.append)
        return len(errors)


def ended(child: int, within: float) -> int | None:
    """The exit code of a process, negative for a signal; None when it still runs after `within` seconds."""
    until = time.monotonic() + within
    while time.monotonic() < until:
        process, code = os.waitpid(child, os.WNOHANG)
        if process:
            return os.waitstatus_to_exitcode(code)
        time.sleep(0.002)
    return None


def kill_at_random(forks: Forks) -> dict[str, Any]:
    """Kills sweeps until that has happened often enough; a sweep that gets through is followed by a new one."""
    began = time.monotonic()
    assert ended(forks.run(forks.folder / "undisturbed"), 60) == 0
    whole = time.monotonic() - began
    draw, kills, sweeps = random.Random(0), 0, 0
    while True:
        child = forks.run(forks.folder / f"killed-{sweeps}")
        code = ended(child, draw.uniform(0, whole) if kills < KILLS else 60)
        if code is None:
            os.kill(child, signal.SIGKILL)
            code = ended(child, 60)
        if code == -signal.SIGKILL:
            kills += 1
        else:
            assert code == 0  # it had got through, if only just before the signal
            sweeps += 1
            if kills == KILLS:
                return {"kills": kills, "sweeps": sweeps, "seconds": whole}


def terminate(forks: Forks) -> dict[str, Any]:
    """Sends SIGTERM when there is a record."""
    results = forks.folder / "terminated"
    child = forks.run(results)
    until = time.monotonic() + 60
    while not any(file.stat().st_size for file in results.glob("*/*/*/examples.jsonl")):
        assert time.monotonic() < until
        time.sleep(0.01)
    os.kill(child, signal.SIGTERM)
    return {"code": ended(child, 60)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kills")


@pytest.fixture(scope="module")
def words(folder: Path) -> Iterator[list[str]]:
    with prepared(folder) as chosen:
        yield [*SWEEP, *chosen, "task.number=3"]


def script(what: Callable[[Forks], dict[str, Any]], words: list[str], folder: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, what.__name__, str(folder), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_sweep_killed_at_random_moments_loses_nothing(words: list[str], folder: Path) -> None:
    found = script(kill_at_random, words, folder)
    assert found["kills"] == KILLS
    undisturbed = timeless(folder / "undisturbed")
    assert [len(records) for records in undisturbed.values()] == 4 * [6]
    segments = 0
    for sweep in range(found["sweeps"]):
        results = folder / f"killed-{sweep}"
        assert timeless(results) == undisturbed
        assert states(results) == 4 * ["done"]
        segments += sum(len(read_cell(one)[0]["segments"]) for one in cells(results))
    assert segments > 4 * found["sweeps"], "no kill has met a cell that was begun"


def test_sigterm_ends_a_run_as_ctrl_c_does(words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script(terminate, [*words, "task.wait=0.2"], folder) == {"code": 143}
    lines = (folder / "terminated.log").read_text().splitlines()
    assert lines[-1] == "kvbench: interrupted: the same command continues"
    assert not any("Traceback" in line for line in lines)
    results = folder / "terminated"
    assert "running" in states(results)
    assert status.main([f"results={results}"]) == 1
    shown = capsys.readouterr().out
    assert "interrupted" in shown
    assert "running" not in shown
    assert not any(status.is_held(cell) for cell in cells(results))


def test_the_same_sweep_again_runs_what_is_missing(
    words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = folder / "again"
    sweep = [*words, f"results={results}"]
    assert main([*sweep, "seed=0", "method=random"]) == 0
    before = {file: file.read_bytes() for file in results.rglob("*") if file.is_file()}
    opened: list[Path] = []
    really = CellStore.append

    def append(self: CellStore, record: dict[str, Any]) -> None:
        opened.append(self.folder)
        really(self, record)

    monkeypatch.setattr(CellStore, "append", append)
    assert main(sweep) == 0
    assert {file: file.read_bytes() for file in before} == before
    made = {cell for cell in cells(results) if cell / "examples.jsonl" not in before}
    assert len(made) == 3
    assert set(opened) == made
    opened.clear()
    assert main(sweep) == 0
    assert opened == []
    assert "nothing to do" in capsys.readouterr().out


if __name__ == "__main__":
    import torch

    import kvbench.loop  # noqa: F401  with torch and transformers: what a fork then has already

    torch.set_num_threads(1)
    what, folder_, *words_ = sys.argv[1:]
    print(json.dumps({"kill_at_random": kill_at_random, "terminate": terminate}[what](Forks(words_, Path(folder_)))))
