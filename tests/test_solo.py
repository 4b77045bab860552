"""`measure=solo`: what solo.json says, when it is made, and what a bad request leaves."""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sweeps import prepared
from test_config import PLAY, plugin_folder, ran  # noqa: F401 (fixtures)
from test_loop import FACTS, Toy, cell

import kvbench
from kvbench import loop, status
from kvbench.cell import Cell, Settings
from kvbench.errors import UsageError
from kvbench.measure import solo
from kvbench.model import Model, load_model
from kvbench.plan import Infeasible
from kvbench.report.table import solos
from kvbench.run import main
from kvbench.store import is_done, read_solo

NAMES = """format label digest identity measured process threads cpus steps warm path tokens_context tokens_fed own_s
own_full_s own_ratio own_ratio_low own_ratio_high prefill_s statistics_s compress_s ttft_s tpot_s tpot_p95_s tpot_full_s
tpot_empty_s bytes_held bytes_full bytes_working bytes_working_full"""
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _tiny_is_the_model(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "load_model", lambda config: replace(tiny, facts=FACTS))
    monkeypatch.setattr(solo, "STEPS", 30)


def measure(cells: list[Cell], results: Path, **options: Any) -> list[dict[str, Any]]:
    settings = Settings(results, measure="solo", **options)
    loop.run_cells(cells, settings, alone=len(cells) == 1)
    return [read_solo(one.folder(results)) for one in cells if is_done(one, settings)]


def test_what_solo_json_says(tiny: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    in_time = cell("h2o", "0.5", method_options={"decode": True})
    cells = [cell(), cell("adakv"), cell("full"), cell("fastkv", "0.7"), in_time]
    found = measure(cells, tmp_path)
    defined = set(re.findall(r"`(\w+)`", (ROOT / "docs" / "metrics.md").read_text()))
    for one, record in zip(cells, found, strict=True):
        assert set(record) == set(NAMES.split()) <= defined
        assert (record["digest"], record["identity"]) == (one.digest, json.loads(json.dumps(one.identity())))
        assert record["path"] == ("decoded" if one is in_time else "tiered")
        assert record["process"]["hardware"]["device"] == "cpu"
        assert record["steps"] == 30
        assert record["bytes_full"] == tiny.network.row_bytes() * record["tokens_context"]
        assert record["bytes_held"] <= record["bytes_full"]
        assert record["tokens_fed"] > 0
        assert min(record[name] for name in ("tpot_s", "tpot_full_s", "tpot_empty_s")) > 0
        assert record["tpot_p95_s"] >= record["tpot_s"]
        parts = record["prefill_s"] + record["statistics_s"] + record["compress_s"]
        assert record["ttft_s"] > parts > 0
        if record["own_ratio"] is not None:
            assert record["own_ratio_low"] <= record["own_ratio"] <= record["own_ratio_high"]
        assert [file.name for file in one.folder(tmp_path).iterdir()] == ["solo.json"]
    working = [record["bytes_working"] for record in found]
    assert working[1] > working[0] > 0  # uneven heads: where their rows are
    assert found[0]["bytes_working_full"] > found[0]["bytes_full"] > working[0]
    assert (found[0]["statistics_s"] > 0, found[2]["statistics_s"]) == (True, 0)
    assert (found[3]["statistics_s"], found[3]["compress_s"]) == (0, 0)  # all of it is reading
    told = capsys.readouterr().out
    assert "have no fast path" in told
    assert all(word in told for word in ("snapkv", "decoded", "solo.json in: "))
    table = solos(one.folder(tmp_path) for one in cells)
    assert list(table.method)[:2] == ["snapkv(window=8)", "adakv"]
    assert {"own_ratio", "path", "cell"} < set(table.columns)


def test_it_is_measured_once_and_records_are_another_matter(tmp_path: Path) -> None:
    one = cell(task=Toy(number=1))
    file = one.folder(tmp_path) / "solo.json"
    measure([one], tmp_path)
    before = file.read_bytes()
    measure([one], tmp_path)
    assert file.read_bytes() == before
    loop.run_cells([one], Settings(tmp_path))
    loop.run_cells([one], Settings(tmp_path, redo=True))
    assert file.read_bytes() == before
    records = (one.folder(tmp_path) / "examples.jsonl").read_bytes()
    measure([one], tmp_path, redo=True)
    assert file.read_bytes() != before
    assert (one.folder(tmp_path) / "examples.jsonl").read_bytes() == records


def test_what_can_not_be_measured_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hopeless, good = cell(budget="1B"), cell()
    with pytest.raises(Infeasible):
        measure([hopeless], tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert len(measure([hopeless, good], tmp_path)) == 1
    assert "budget=1B" in capsys.readouterr().err
    with pytest.raises(UsageError, match="choose a shorter context"):
        measure([cell(task=Toy(length=8140))], tmp_path)


def test_a_file_that_is_torn_is_told(tmp_path: Path) -> None:
    measure([cell()], tmp_path)
    (cell().folder(tmp_path) / "solo.json").write_text("{")
    with pytest.raises(UsageError, match="redo=true"):
        read_solo(cell().folder(tmp_path))


def test_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line, how far it is, and the same from Python; cells that can't be measured are told."""
    monkeypatch.setattr(loop, "load_model", load_model)
    with prepared(tmp_path) as chosen:
        words = [*chosen, "method=random", "measure=solo", f"results={tmp_path / 'results'}"]
        assert status.main([*words, "budget=0.3"]) == 1
        assert "1 missing" in capsys.readouterr().out
        assert main(["-m", *words, "budget=0.3,0.00001"]) == 1
        told = capsys.readouterr()
        assert "budget=1e-05 (0 bytes here) is below the smallest plan of random" in told.err
        assert "1 of 2 cells are not done" in told.err
        assert "Own time of caches: letters" in told.out
        assert status.main([*words, "budget=0.3"]) == 0
        assert "1 done" in capsys.readouterr().out
        options: dict[str, Any] = dict(word.split("=", 1) for word in words)
        table = kvbench.evaluate(**options, budget=[0.3, 0.5])
        assert table["budget"].to_list() == ["0.3", "0.5"]
        assert (table["own_s"] < table["tpot_s"]).all()
        assert "nothing to do" not in capsys.readouterr().out
        kvbench.evaluate(**options, budget=0.3)
        assert "nothing to do" in capsys.readouterr().out


def test_own_times_are_medians_of_differences() -> None:
    empty = [1.0, 5.0, 1.0, 9.0, 1.0]  # what slows a round down slows all of it
    full = [x + own for x, own in zip(empty, (4, 4, 3, 5, 4), strict=True)]
    mine = [x + own for x, own in zip(empty, (1, 1, 1, 1, 2), strict=True)]
    found = solo.own_times(mine, full, empty)
    assert (found["own_s"], found["own_full_s"], found["own_ratio"]) == (1, 4, 0.25)
    assert 0.2 <= found["own_ratio_low"] <= 0.25 <= found["own_ratio_high"] <= 0.5
    exact = solo.own_times([2.0] * 30, [3.0] * 30, [1.0] * 30)
    assert (exact["own_ratio_low"], exact["own_ratio"], exact["own_ratio_high"]) == (0.5, 0.5, 0.5)
    assert solo.own_times([2.0, 2.0], [1.0, 1.0], [1.0, 1.0])["own_ratio"] is None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says where threads run")
def test_threads_are_pinned_meanwhile() -> None:
    before = os.sched_getaffinity(0)
    with solo._pinned(torch.device("cpu")) as cpus:
        assert cpus is not None
        assert os.sched_getaffinity(0) == set(cpus)
        assert len(cpus) == min(torch.get_num_threads(), len(before))
    assert os.sched_getaffinity(0) == before


def test_the_command_line(
    ran: list[tuple[Any, ...]],  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*PLAY, "measure=solo"]) == 0
    assert main(PLAY) == 0
    assert [settings.measure for _, settings in ran] == ["solo", "quality"]
    assert ran[0][0][0].digest == ran[1][0][0].digest
    assert main([*PLAY, "measure=fast"]) == 2
    assert "unknown measure 'fast'; known: quality, solo" in capsys.readouterr().err
