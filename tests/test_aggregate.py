"""The tidy table says of each cell what its records say, compares what was asked the same, and marks the rest."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from report_data import COMMIT, HOSTILE, LOSSES, REASON, Drawn, write_cell, write_results

from kvbench.errors import UsageError
from kvbench.report.aggregate import aggregate
from kvbench.report.statistics import Clusters, benjamini_hochberg, holm, interval
from kvbench.report.tidy import COLUMNS, write
from kvbench.store import EXAMPLES, HEADER, read_cell

ONE = {"tasks": ("niah",), "protocols": ("blind",), "budgets": ("0.1",), "unfinished": False}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    write_results(folder)
    return folder


@pytest.fixture(scope="module")
def table(results: Path) -> pd.DataFrame:
    return aggregate(results, baseline="snapkv")


def row(table: pd.DataFrame, metric: str = "score", **wanted: Any) -> Any:
    """The one row that is so."""
    found = table[table["metric"] == metric]
    for name, value in wanted.items():
        found = found[found[name] == value]
    assert len(found) == 1, wanted
    return found.iloc[0]


def records(results: Path, one: Any) -> pd.DataFrame:
    return pd.DataFrame(read_cell(results / one.folder)[1]).set_index("id")


def test_a_row_says_what_the_records_say(results: Path, table: pd.DataFrame) -> None:
    assert list(table.columns) == list(COLUMNS)
    assert len(table) == 98 * 4 - 32  # lm has no score
    where = {"task_name": "ruler", "protocol": "aware"}
    one = row(table, method="vector(base=keydiff)", budget="0.1", **where)
    mine = records(results, one)
    full = records(results, row(table, method="full", **where))
    base = records(results, row(table, method="snapkv", budget="0.1", **where))
    assert one["mean"] == pytest.approx(mine["score"].mean())
    assert one["median"] == mine["score"].median()
    assert (one.n, one.clusters, one.interval, one.n_full, one.n_baseline) == (40, 40, "bootstrap", 40, 40)
    less = mine["score"] - base["score"]
    assert (one.win, one.tie, one.loss) == ((less > 0).sum(), (less == 0).sum(), (less < 0).sum())
    binary = mine["score"].isin((0, 1)) & full["score"].isin((0, 1))
    assert one.flips == pytest.approx((mine["score"] != full["score"])[binary].mean())
    shape = Clusters(mine["cluster_id"].to_numpy(), [info["set"] for info in mine["info"]])
    for name, theirs in (("vs_full", full), ("vs_baseline", base)):
        less = (mine["score"] - theirs["score"]).to_numpy()
        expected = interval(less, shape, np.random.default_rng(0), bounds=(-1.0, 1.0))
        ours = one[[name, f"{name}_low", f"{name}_high"]].astype(float)
        np.testing.assert_allclose(ours, (expected.mean, expected.low, expected.high), atol=1e-12)
    assert one.bytes_held == mine["bytes_held"].mean()
    assert one.share == pytest.approx(mine["bytes_held"].mean() / mine["bytes_full"].mean())
    assert one.tiers == pytest.approx({"exact": 99.5445, "from_key": 99.5445})
    assert one.prefill_s == 2.5
    assert (one.family, one.trust, one.needs_calibration, one.query_aware) == ("router", "reconstructed", True, True)
    assert (one.commit, one.dirty, one.version, one.marks) == (COMMIT, False, "0.1.0", "")
    assert (one.status, one.reason) == ("done", "")


def test_known_effects_are_found(table: pd.DataFrame) -> None:
    for method, loss in LOSSES.items():
        for task in ("ruler", "lm"):
            one = row(table, "answer_nll", method=method, budget="0.1", task_name=task, protocol="blind")
            assert one.vs_full == pytest.approx(loss + 0.01, abs=0.004)  # the noise of its own is 0.01 on average
            assert one.vs_full_low < loss + 0.0105 < one.vs_full_high + 0.002
            assert one.better == "lower"
            assert (one.p_adjusted < 0.05) if method != "snapkv" else np.isnan(one.p)
            assert one.win == (40 if loss < 0.18 else 0)
    assert not table["smallest_difference"].dropna().le(0).any()


def test_fewer_than_thirty_documents_are_marked(table: pd.DataFrame) -> None:
    few = table[(table["task_name"] == "niah") & (table["status"] == "done")]
    assert set(few["interval"]) <= {"t", "exact"}
    assert few["marks"].str.contains("few clusters").all()
    assert (few["clusters"] == 8).all()
    assert set(few["test"]) == {"t", ""}


def test_unfinished_cells_are_there_without_numbers(tmp_path: Path) -> None:
    write_results(tmp_path, **(ONE | {"unfinished": True}))
    drawn = Drawn("niah", 40, 8, 0)
    write_cell(tmp_path, drawn, "keydiff", "0.2", 0.1, keep=25, header={"status": "running"})
    table = aggregate(tmp_path)
    for status in ("failed", "infeasible"):
        ended = table[table["status"] == status]
        assert list(ended["metric"]) == ["agree_full", "answer_nll", "kl_full", "score"]
        assert ended[["mean", "low", "vs_full", "p", "bytes_held"]].isna().all(axis=None)
        assert set(ended["reason"]) == {REASON}
        assert (ended["n"] == 0).all()
    one = row(table, status="running")
    assert (one.n, one.n_full, one.n_baseline) == (25, 25, 25)
    assert set(one.marks.split("; ")) == {"not done", "examples differ from full cache's", "few clusters"}


def test_only_common_examples_are_compared(tmp_path: Path) -> None:
    write_results(tmp_path, methods={"snapkv": 0.2}, **ONE)
    drawn = Drawn("niah", 40, 8, 0)
    folder = write_cell(tmp_path, drawn, "keydiff", "0.1", 0.1, keep=30)
    lines = (folder / EXAMPLES).read_text().splitlines(keepends=True)
    blank = json.dumps(json.loads(lines[4]) | {"answer_nll": None})
    (folder / EXAMPLES).write_text("".join([*lines[:4], blank + "\n", *lines[5:]]))
    table = aggregate(tmp_path, "snapkv")
    one, base = row(table, "answer_nll", method="keydiff"), row(table, "answer_nll", method="snapkv")
    ours, theirs = records(tmp_path, one)["answer_nll"], records(tmp_path, base)["answer_nll"]
    assert (one.n, one.n_baseline) == (29, 29)
    assert one["mean"] == pytest.approx(ours.mean())
    assert one.vs_baseline == pytest.approx((ours - theirs).mean())
    assert "examples differ from baseline's" in one.marks
    assert "examples differ" not in base.marks


def test_a_cell_in_company_has_the_intervals_that_it_has_alone(
    tmp_path: Path, results: Path, table: pd.DataFrame
) -> None:
    wanted = table[(table["task_name"] == "ruler") & table["method"].isin(("full", "snapkv", "keydiff"))]
    for folder in set(wanted["folder"]):
        shutil.copytree(results / folder, tmp_path / folder)
    alone = aggregate(tmp_path, "snapkv")
    same = [name for name in COLUMNS if name not in ("p_adjusted",)]
    pd.testing.assert_frame_equal(alone[same], wanted[same].reset_index(drop=True), rtol=1e-9)


def test_doubtful_provenance_is_marked(tmp_path: Path) -> None:
    write_results(tmp_path, methods={"snapkv": 0.2}, **ONE)
    drawn = Drawn("niah", 40, 8, 0)
    write_cell(tmp_path, drawn, "keydiff", "0.1", 0.1, segment={"commit": "f" * 40, "dirty": True})
    write_cell(tmp_path, drawn, "knorm", "0.1", 0.1, segment={"commit": None, "dirty": None})
    folder = write_cell(tmp_path, drawn, "tova", "0.1", 0.1)
    header = json.loads((folder / HEADER).read_text())
    first = header["segments"][0]
    later = first | {
        "commit": "e" * 40,
        "first_example": "niah-0-00020",
        "versions": first["versions"] | {"torch": "3"},
    }
    idle = first | {"commit": "d" * 40, "first_example": None}  # made no record
    (folder / HEADER).write_text(json.dumps(header | {"segments": [first, later, idle], "examples": 41}))
    table = aggregate(tmp_path, "snapkv")
    marks = {one.method: set(one.marks.split("; ")) for one in table[table["metric"] == "score"].itertuples()}
    assert marks["snapkv"] == {"few clusters"}
    another = {"few clusters", "commit differs from full cache's", "commit differs from baseline's"}
    assert marks["keydiff"] == another | {"dirty commit"}
    assert marks["knorm"] == another | {"commit unknown"}
    assert marks["tova"] == another | {"mixed commits", "mixed versions", "1 records missing"}
    assert row(table, method="tova").commit == f"{COMMIT}, {'e' * 40}"
    assert row(table, method="keydiff").dirty


def test_other_data_are_never_compared(tmp_path: Path) -> None:
    write_results(tmp_path, methods={"snapkv": 0.2}, **ONE)
    about = {"model": {"weights": "a672150fb4f99d7c"}, "data": "newer", "artefacts": ["ab"]}
    write_cell(tmp_path, Drawn("niah", 40, 8, 0), "keydiff", "0.1", 0.1, header={"about": about})
    table = aggregate(tmp_path, "snapkv")
    one = row(table, method="keydiff")
    assert {"no full cache", "no baseline", "data or weights differ from other cells'"} <= set(one.marks.split("; "))
    assert np.isnan(one.vs_full)
    assert one.needs_calibration  # it read an artefact
    assert not np.isnan(row(table, method="snapkv").vs_full)


def test_a_baseline_with_budgets_is_compared_at_equal_ones(tmp_path: Path) -> None:
    write_results(tmp_path, methods={"snapkv": 0.2}, **ONE)
    write_cell(tmp_path, Drawn("niah", 40, 8, 0), "keydiff", "0.25", 0.1)
    one = row(aggregate(tmp_path, "snapkv"), method="keydiff")
    assert np.isnan(one.vs_baseline)
    assert one.n_baseline == 0
    assert "no baseline" in one.marks
    assert not np.isnan(one.vs_full)
    assert row(aggregate(tmp_path, "full"), method="keydiff").n_baseline == 40


def test_cells_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no cells in"):
        aggregate(tmp_path)
    write_results(tmp_path, methods={"snapkv": 0.2}, **ONE)
    with pytest.raises(UsageError, match=r"^unknown baseline 'snap'; known: full, snapkv$"):
        aggregate(tmp_path, "snap")
    folder = write_cell(tmp_path, Drawn("niah", 40, 5, 0), "keydiff", "0.1", 0.1)
    with pytest.raises(UsageError, match=r"example niah-0-0000. is of essays-., in other cells of essays-.; they were"):
        aggregate(tmp_path)
    shutil.rmtree(folder)
    (twin,) = tmp_path.glob("niah/*/snapkv*")
    shutil.copytree(twin, twin.with_name("copy"))
    with pytest.raises(UsageError, match=r"one cell is in 2 folders, niah/.*copy and niah/.*snapkv-0.1-.*: keep one"):
        aggregate(tmp_path)


def test_declared_families_are_holms_and_the_rest_benjamini_hochbergs(results: Path) -> None:
    table = aggregate(results, "snapkv", {"main": "vector* 0.1 * score", "nll": "*answer_nll"})
    main = table[table["declared"] == "main"]
    assert len(main) == 4
    assert set(main["method"]) == {"vector(base=keydiff)"}
    for name, how, adjusted in (("main", "holm", holm), ("nll", "holm", holm), ("", "bh", benjamini_hochberg)):
        family = table[(table["declared"] == name) & table["p"].notna()]
        assert set(family["adjust"]) == {how}
        for _, tests in family.groupby("metric" if how == "bh" else "adjust"):
            np.testing.assert_allclose(tests["p_adjusted"], adjusted(tests["p"].to_numpy()))
    assert (table["p_adjusted"].isna() == table["p"].isna()).all()


def test_families_that_cannot_be_are_refused(results: Path) -> None:
    with pytest.raises(UsageError, match=r"^'keydiff 0.05 .*' is in the families a and b: it can be in one$"):
        aggregate(results, families={"a": "keydiff*", "b": "* score"})
    with pytest.raises(UsageError, match="no comparison is in family a: 'nothing' is no pattern of any 'method budget"):
        aggregate(results, families={"a": "nothing"})
    with pytest.raises(
        UsageError, match=r"^999 resamples give no p-value below 0.001, and 90 tests ask for 0.00056: u"
    ):
        aggregate(results, resamples=999)


def test_scores_beyond_one_are_not_cut(tmp_path: Path) -> None:
    write_results(tmp_path, methods={"snapkv": 0.2}, **ONE)
    for path in tmp_path.glob(f"*/*/*/{EXAMPLES}"):
        made = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(one | {"score": 20 + 10 * one["score"]}) + "\n" for one in made))
    one = row(aggregate(tmp_path), method="snapkv")
    assert 20 < one.low < one["mean"] < one.high < 30
    assert -10 < one.vs_full_low < one.vs_full < 0
    assert np.isnan(one.flips)


def test_files_are_the_table(table: pd.DataFrame, tmp_path: Path) -> None:
    parquet, csv = write(table, tmp_path / "new" / "table.v1")
    assert parquet.name == "table.v1.parquet"
    found = pd.read_parquet(parquet)
    assert json.loads(found["tiers"][0]) == table["tiers"][0]
    rest = [name for name in COLUMNS if name != "tiers"]
    pd.testing.assert_frame_equal(found[rest], table[rest])
    text = pd.read_csv(csv, keep_default_na=False)
    assert list(text["method"]) == list(table["method"])
    assert set(text["reason"]) == {"", REASON}
    with pytest.raises(UsageError, match="could not write"):
        write(table, csv / "table")


def test_the_script_prints_a_short_table_and_where_the_files_are(tmp_path: Path) -> None:
    write_results(tmp_path / "results", **(ONE | {"tasks": ("niah", "lm"), "unfinished": True}))
    script = [sys.executable, str(Path(__file__).parent.parent / "scripts/aggregate.py"), str(tmp_path / "results")]
    out = tmp_path / "table"

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*script, *arguments, "--out", str(out)], capture_output=True, text=True, check=False)

    done = run("--baseline", "snapkv", "--family", "main=vector* score")
    assert done.returncode == 0, done.stderr
    assert "14 cells; 50 rows in the files." in done.stdout
    assert "few clusters" in done.stdout
    assert "holm" in done.stdout
    assert done.stdout.rstrip().endswith(f"{out}.parquet {out}.csv")
    assert "<script>" not in done.stdout  # answers stay in the records
    assert HOSTILE not in out.with_suffix(".csv").read_text()
    wrong = run("--baseline", "nobody")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("aggregate: unknown baseline 'nobody'; known: ")
    assert wrong.stderr.count("\n") == 1


def test_a_hundred_cells_of_a_hundred_examples_take_seconds(tmp_path: Path) -> None:
    write_results(tmp_path, 100, clusters=40)
    start = time.process_time()
    aggregate(tmp_path, "snapkv")
    assert time.process_time() - start < 6  # some 0.6 s; a thousand cells some 5 s


def test_no_torch_is_loaded() -> None:
    code = "import kvbench.report.aggregate, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
