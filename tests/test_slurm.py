"""Sweeps on a real SLURM of one node, which the tests start and end."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra.core.plugins import Plugins
from sweeps import SWEEP, prepared, states, timeless

from kvbench import status
from kvbench.run import main
from kvbench.store import cells, read_cell

SCRIPT = Path(__file__).parent.parent / "scripts" / "local_slurm.sh"
SLURM = ["hydra/launcher=slurm", "hydra.launcher.gpus_per_node=null", "hydra.launcher.cpus_per_task=1"]


def two_free_ports() -> int:
    """The first of two."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cluster of this module's own, and the environment that leads to it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_SLURM_ROOT", str(tmp_path_factory.mktemp("slurm")))
        patch.setenv("LOCAL_SLURM_PORT", str(two_free_ports()))
        started = subprocess.run([SCRIPT, "start"], capture_output=True, text=True, timeout=120)
        if started.returncode == 3:
            pytest.skip(started.stderr.strip())
        try:
            assert started.returncode == 0, started.stderr
            patch.setenv("SLURM_CONF", started.stdout.partition("SLURM_CONF=")[2].strip())
            yield
        finally:
            subprocess.run([SCRIPT, "stop"], check=True, timeout=60)


@pytest.fixture
def words(tmp_path: Path) -> Iterator[list[str]]:
    with prepared(tmp_path) as chosen:
        yield [*SWEEP, *chosen]


def squeue(job: str) -> list[str]:
    command = ["squeue", "--noheader", "--array", f"--jobs={job}", "--format=%T"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


@pytest.mark.usefixtures("cluster")
def test_a_sweep_one_of_whose_jobs_is_told_to_make_room(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results"
    asked = [*words, f"results={results}", "task.number=5", "task.wait=0.6"]
    command = [sys.executable, "-m", "kvbench.run", *asked, *SLURM, "hydra.launcher.signal_delay_s=30"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stderr
        told = launcher.stderr.readline()
        job = re.findall(r"2 groups: SLURM job (\d+)", told)[0]
        begun = time.monotonic()
        while not (started := [file for file in results.glob("*/*/*/examples.jsonl") if file.stat().st_size]):
            assert time.monotonic() < begun + 150
            time.sleep(0.05)
        assert status.main([f"results={results}"]) == 1
        (line,) = [line for line in capsys.readouterr().out.splitlines() if started[0].parent.name in line]
        assert line.startswith("running")
        group = read_cell(started[0].parent)[0]["identity"]["seed"]
        subprocess.run(["scancel", "--signal=USR2", f"{job}_{group}"], check=True)
        out, err = launcher.communicate(timeout=150)
    assert launcher.returncode == 0, err
    assert "kvbench: 2 of 2 groups ended" in err
    assert out.count("letters, tiny, blind") == 2
    assert "Requeued job" in "".join(file.read_text() for file in (results / "slurm").glob(f"{job}_{group}_0_log.*"))
    assert states(results) == 4 * ["done"]
    segments = {0: 0, 1: 0}
    for cell in cells(results):
        header = read_cell(cell)[0]
        segments[header["identity"]["seed"]] += len(header["segments"])
    assert segments[group] > 2
    assert segments[1 - group] == 2
    assert status.main([*asked, *SLURM]) == 0
    assert main([*words, f"results={tmp_path / 'here'}", "task.number=5", "task.wait=0.6"]) == 0
    assert timeless(results) == timeless(tmp_path / "here")
    assert main([*asked, *SLURM]) == 0  # nothing to do: no job is submitted
    assert "SLURM" not in capsys.readouterr().err


@pytest.mark.usefixtures("cluster")
def test_ctrl_c_leaves_the_jobs_on_the_cluster(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Plugins.instance()  # imports the launchers

    def interrupted(job: str, total: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["hydra_plugins.kvbench.launcher"], "_wait", interrupted)
    held = "+hydra.launcher.additional.hold=true"
    assert main([*words, f"results={tmp_path / 'results'}", *SLURM, held]) == 130
    told, last = capsys.readouterr().err.splitlines()
    job = re.findall(r"SLURM job (\d+)", told)[0]
    assert f"SLURM job {job} goes on without this process" in last
    assert squeue(job) == 2 * ["PENDING"]
    subprocess.run(["scancel", job], check=True)


@pytest.mark.usefixtures("cluster")
def test_what_sbatch_refuses_is_told(words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*words, f"results={tmp_path / 'results'}", *SLURM, "hydra.launcher.partition=nowhere"]) == 2
    *why, last = capfd.readouterr().err.splitlines()
    assert last == "kvbench: sbatch has refused the jobs: see above"
    assert any("nowhere" in line for line in why)
