"""Joules and peaks: a fake GPU counter, and memory that is really taken."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import ids_of

from kvbench import plugins
from kvbench.budget import Budget
from kvbench.cell import Cell
from kvbench.measure.along import along
from kvbench.measure.clock import Stopwatch
from kvbench.measure.energy import Energy
from kvbench.measure.memory import Peak
from kvbench.measure.throughput import throughput
from kvbench.model import Model
from kvbench.report.curves import curves, summary


class NVMLError(Exception):
    pass


def nvml(*readings: int | Exception) -> SimpleNamespace:
    """A counter that gives `readings` in turn, in millijoules."""
    left = list(readings)

    def read(gpu: str) -> int:
        assert gpu == "GPU-1234"
        value = left.pop(0)
        if isinstance(value, Exception):
            raise value
        return value

    return SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=read,
    )


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))
    return torch.device("cuda:1")


def test_joules_are_the_difference_of_the_boards_counter(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml(1_000, 4_500))
    with Energy(gpu) as energy:
        pass
    assert energy.joules == 3.5


def test_several_gpus_add_up(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setitem(sys.modules, "pynvml", nvml(1_000, 2_000, 4_500, 3_000))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10 * device.index)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 100 * device.index)
    gpus = [gpu, torch.device("cuda:2")]
    with Energy(*gpus) as energy, Peak(*gpus) as peak:
        pass
    assert energy.joules == 4.5
    assert (peak.nbytes, peak.grown) == (300, 270)
    waited.clear()
    with Stopwatch(*gpus):
        assert waited == gpus


def test_what_nvml_refuses_is_not_measured(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml(NVMLError("Not Supported"), 4_500))
    with Energy(gpu) as energy:
        pass
    assert energy.joules is None
    assert energy.why == "not measured: NVML says Not Supported"


def test_a_cpu_has_no_joules() -> None:
    with Energy(torch.device("cpu")) as energy:
        pass
    assert energy.joules is None
    assert energy.why == "not measured: no NVIDIA GPU"


def test_a_peak_sees_memory_that_is_gone_again() -> None:
    size = 2**26
    with Peak(torch.device("cpu")) as peak:
        torch.ones(size, dtype=torch.uint8)
    assert peak.nbytes is not None
    assert peak.grown is not None
    assert size * 0.9 < peak.grown < peak.nbytes


@pytest.mark.usefixtures("own_cache")
def test_more_sequences_fit_the_less_each_holds(tiny: Model) -> None:
    """As many as the bytes say, each with room for its answer, and no two share their rows."""
    task = plugins.load("tasks", "lm")()
    row = tiny.network.row_bytes()
    cells = [Cell(tiny.config, plugins.build_method(name), Budget.parse("0.25"), task) for name in ("full", "snapkv")]
    full, small = throughput(tiny, cells, ids_of(tiny.network, 100), 300 * row, new_tokens=20, steps=2, most=3)
    assert (full["bytes_sequence"], small["bytes_sequence"]) == (120 * row, 45 * row)
    assert (full["sequences_fit"], small["sequences_fit"]) == (2, 6)
    assert (full["sequences_decoded"], small["sequences_decoded"]) == (2, 3)
    assert full["tokens_per_s"] == pytest.approx(2 / full["step_s"])


@pytest.mark.usefixtures("own_cache", "corpora")
def test_along_an_answer(tiny: Model) -> None:
    """A row for each token of the full cache's answer, with the bytes of that token; infeasible cells have none."""
    task = plugins.load("tasks", "lm")(context=100, continuation=4, max_new_tokens=12)
    window = plugins.build_method("streamingllm", decode=True)
    methods = [(plugins.build_method("full"), "1"), (window, "0.25"), (plugins.build_method("fastkv"), "1B")]
    cells = [Cell(tiny.config, method, Budget.parse(budget), task) for method, budget in methods]
    table = pd.DataFrame(along(tiny, cells, contexts=2))
    row = tiny.network.row_bytes()
    full, rolling = (part for _, part in table.groupby("method", sort=False))
    assert len(full) == len(rolling) == 2 * full["token"].nunique()
    assert full["kl_full"].abs().max() < 1e-5
    assert (full["bytes_held"].diff()[full["token"] > 0] == row).all()
    assert rolling["bytes_held"].nunique() == 1
    assert rolling["bytes_held"].max() <= 25 * row
    assert summary(table).loc["full", "agree_full"] == 1
    assert len(curves(table).axes) == 3
