"""Frontier and dominated area against brute force; what figures show, and that they are the same files each time."""

from __future__ import annotations

import math
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_data import write_results

from kvbench.errors import UsageError
from kvbench.report import anatomy, frontier, pareto
from kvbench.report.aggregate import aggregate
from kvbench.report.names import short
from kvbench.report.style import GREY, spread
from kvbench.report.tidy import chosen

POINTS = st.lists(
    st.tuples(st.sampled_from([0.01, 0.02, 0.1, 0.101, 0.5, 1.0, 2.0]), st.integers(-3, 9).map(lambda i: i / 8)),
    min_size=1,
    max_size=12,
)


def split(points: list[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    cost, quality = np.array(points, dtype=float).T
    return cost, quality


@given(POINTS)
def test_the_frontier_is_what_nothing_beats(points: list[tuple[float, float]]) -> None:
    wanted = [
        not any(c <= cost and q >= quality and (c, q) != (cost, quality) for c, q in points) for cost, quality in points
    ]
    assert frontier.frontier(*split(points)).tolist() == wanted


def test_a_thousandth_cheaper_and_worse_is_not_on_the_frontier() -> None:
    cost, quality = np.array([0.0999, 0.1]), np.array([0.2, 0.9])
    assert frontier.frontier(cost, quality).tolist() == [True, True]
    assert frontier.frontier(cost, quality, alike=0.01).tolist() == [False, True]


@given(POINTS, st.sampled_from([0.05, 1.0, 3.0]), st.integers(-4, 8).map(lambda i: i / 8))
def test_the_area_is_that_of_small_squares(points: list[tuple[float, float]], cost: float, quality: float) -> None:
    """A grid of log-costs, on which all costs and the reference lie between two lines; qualities are eighths."""
    low, cells = math.log10(0.005), 20_000
    width = (math.log10(cost) - low) / cells
    middles = 10 ** (low + (np.arange(cells) + 0.5) * width)
    squares = 0.0
    for level in range(-32, 16):  # rows of height 1/8
        middle = level / 8 + 1 / 16
        covered = np.zeros(cells, dtype=bool)
        for c, q in points:
            covered |= (middles >= c) & (q > middle)
        squares += covered.sum() * width / 8 if middle > quality else 0.0
    assert frontier.area(*split(points), (cost, quality)) == pytest.approx(squares, abs=50 * width)


@given(POINTS, POINTS)
def test_more_points_never_dominate_less(points: list[tuple[float, float]], others: list[tuple[float, float]]) -> None:
    some = frontier.area(*split(points), (1.0, 0.0))
    assert frontier.area(*split(points + others), (1.0, 0.0)) >= some - 1e-12


def test_the_area_by_hand() -> None:
    """A decade at 0.5 and one at 0.75; what costs more than the reference counts for nothing."""
    cost, quality = np.array([0.01, 0.1, 0.1, 5.0]), np.array([0.5, 0.75, 0.2, 1.0])
    assert frontier.area(cost, quality, (1.0, 0.0)) == pytest.approx(1.25)
    assert frontier.area(cost, quality, (1.0, 0.5)) == pytest.approx(0.25)


@given(st.lists(st.floats(-0.5, 1.5), min_size=1, max_size=30))
def test_labels_keep_their_order_and_do_not_overlap(wanted: list[float]) -> None:
    gap = 0.9 / len(wanted)
    placed = spread(np.array(wanted), gap, 0.0, 1.0)
    order = np.argsort(wanted, kind="stable")
    assert (np.diff(placed[order]) >= gap - 1e-9).all()
    assert placed.min() >= -1e-9
    assert placed.max() <= 1 + 1e-9


def test_labels_that_fit_stay_where_they_are() -> None:
    assert spread(np.array([0.1, 0.9, 0.5]), 0.1, 0.0, 1.0) == pytest.approx([0.1, 0.9, 0.5])


def test_short_names_stay_apart() -> None:
    long, longer = "vector(router=paper,features=key,maps=layer)", "vector(router=paper,features=key,maps=head)"
    assert short(["snapkv", long]) == {"snapkv": "snapkv", long: "vector(router=paper,…)"}
    assert short([long, longer]) == {long: "vector(maps=layer,…)", longer: "vector(maps=head,…)"}


@pytest.mark.parametrize("option", ["texts=['essays', 'squad']", "base_options={'window': 8, 'sinks': 4}"])
def test_long_names_that_differ_late_stay_short_and_apart(option: str) -> None:
    many = [f"vector(base=kvzip,{option},power={i},texts={'x' * 200}{i})" for i in range(3)]
    found = short([*many, f"vector(base=kvzip,{option})", "snapkv"], most=20)
    assert len(set(found.values())) == 5
    assert max(map(len, found.values())) <= 2 * 20 + 2
    assert all(f"power={i}" in found[label] for i, label in enumerate(many))


def cell(method: str, budget: str, mean: float, share: float, task: str = "niah", **other: object) -> dict[str, object]:
    """A row of the tidy table, as far as figures read it."""
    half = {"low": mean - 0.1, "high": mean + 0.1, "n": 40, "clusters": 40, "metric": "score", "better": "higher"}
    what = {"method": method, "method_name": method, "budget": budget, "task": task, "task_name": task}
    run = {"model": "tiny", "protocol": "blind", "seed": 0, "generate": True, "status": "done", "marks": ""}
    return half | what | run | {"mean": mean, "share": share, "folder": f"{task}/{method}-{budget}"} | other


TABLE = pd.DataFrame(
    [
        cell("full", "1", 0.95, 1.0),
        cell("good", "0.1", 0.7, 0.1),
        cell("good", "0.5", 0.9, 0.5),
        cell("poor", "0.1", 0.3, 0.1),
        cell("poor", "0.5", 0.6, 0.5),
        cell("poor", "0.05", math.nan, math.nan, status="infeasible"),
        cell("good", "0.5", 0.7, 0.5, task="lm"),
        cell("poor", "0.5", 0.2, 0.5, task="lm"),
        cell("only", "0.5", 0.2, 0.5, task="lm"),
    ]
)


def test_a_panel_says_what_it_shows_and_what_not() -> None:
    lm, niah, mean = frontier.panels(TABLE)
    assert niah.points["on_frontier"].tolist() == [True, True, False, False]
    assert niah.full == (0.95, 0.95 - 0.1, 0.95 + 0.1)
    assert niah.reference == (1.0, 0.0)
    assert niah.left_out == "1 infeasible"
    assert lm.full is None
    assert mean.points[["method", "budget", "mean"]].to_numpy().tolist() == [["good", "0.5", 0.8], ["poor", "0.5", 0.4]]
    # Two tasks, each half a tenth wide either way: the root of two squares over two.
    assert (mean.points["high"] - mean.points["mean"]).tolist() == pytest.approx([0.1 / math.sqrt(2)] * 2)
    assert mean.points["others"].tolist() == [4, 4]
    text = frontier.summary([lm, niah, mean])
    assert "on the frontier: good 0.1, good 0.5" in text
    assert "2 cells that all tasks have; 4 that some lack are left out" in text


def test_areas_of_methods_and_of_all_with_intervals() -> None:
    table = frontier.areas(frontier.panels(TABLE)).query("task == 'niah'").set_index("method")
    decades = math.log10(5), math.log10(2)
    assert table.loc["good", "area"] == pytest.approx(0.7 * decades[0] + 0.9 * decades[1])
    assert table.loc["poor", "area"] == pytest.approx(0.3 * decades[0] + 0.6 * decades[1])
    assert table.loc["frontier", "area"] == table.loc["good", "area"]
    assert (table["low"] < table["area"]).all()
    assert (table["area"] < table["high"]).all()
    # More points share the same certainty, so that each has less.
    assert table.loc["frontier", "low"] < table.loc["good", "low"]


def test_lower_can_be_better() -> None:
    table = TABLE.assign(metric="kl_full", better="lower")
    _, niah, _ = frontier.panels(table, "kl_full")
    assert niah.points.loc[niah.points["on_frontier"], "method"].unique().tolist() == ["poor"]
    assert niah.reference == (1.0, -0.9)  # the worst that is shown
    low, high = niah.shown(niah.points)
    assert (low < niah.points["mean"]).all()
    assert (high > niah.points["mean"]).all()
    assert (niah.limits(niah.points)[1] <= 0).all()  # KL is not below 0


def test_a_cell_of_one_document_may_lie_anywhere() -> None:
    lone = cell("lone", "0.1", 0.5, 0.1, low=math.nan, high=math.nan, clusters=1)
    table = pd.concat([TABLE, pd.DataFrame([lone])], ignore_index=True)
    found = frontier.areas(frontier.panels(table)).query("task == 'niah' and method == 'lone'").iloc[0]
    assert (found["low"], found["area"], found["high"]) == pytest.approx((0.0, 0.5, 1.0))


def test_a_reference_of_ones_own() -> None:
    found = frontier.areas(frontier.panels(TABLE, reference=(0.5, 0.5))).query("task == 'niah'").set_index("method")
    assert found.loc["good", "area"] == pytest.approx(0.2 * math.log10(5))
    assert found.loc["poor", "area"] == 0
    assert set(found["reference_x"]) == set(found["reference_y"]) == {0.5}


def test_what_is_unknown_or_ambiguous_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown metric 'scor'; known: score, answer_nll"):
        frontier.panels(TABLE, "scor")
    with pytest.raises(UsageError, match="no finished cell has score and ttft_s"):
        frontier.panels(TABLE.assign(ttft_s=math.nan), x="ttft_s")
    with pytest.raises(UsageError, match=r"unknown method in these results 'goo'; known: full, good, only, poor"):
        chosen(TABLE, methods=["goo"])
    with pytest.raises(
        UsageError, match=r"two cells are good at 0.1 in niah, blind, tiny: niah/good-0.1 and elsewhere"
    ):
        frontier.panels(pd.concat([TABLE, pd.DataFrame([cell("good", "0.1", 0.5, 0.1, folder="elsewhere")])]))
    assert set(chosen(TABLE, ["niah"], ["good"])["method"]) == {"full", "good"}


def test_methods_look_alike_in_all_figures_and_never_in_one() -> None:
    rows = [cell(f"m{i}", "0.1", 0.5 + i / 100, 0.1 + i / 50, task=f"t{i // 4}") for i in range(12)]
    rows += [cell(f"m{i}", "0.1", 0.5 + i / 100, 0.1 + i / 50, task="t3") for i in (0, 5, 9)]
    found = [panel for panel in frontier.panels(pd.DataFrame(rows)) if panel.points["task"].iloc[0].startswith("t")]
    look = pareto.looks(found)
    for panel in found:
        mine = [look[name] for name in pareto.highlighted(panel)]
        assert len({one.colour for one in mine}) == len(mine)


def texts(svg: Path) -> list[str]:
    return [node.text or "" for node in ET.parse(svg).iter("{http://www.w3.org/2000/svg}text")]


def ids(svg: Path) -> set[str]:
    return {node.attrib["id"] for node in ET.parse(svg).iter() if "id" in node.attrib}


def test_figures_of_a_results_folder(tmp_path: Path) -> None:
    write_results(tmp_path / "results", protocols=("blind",))
    found = frontier.panels(aggregate(tmp_path / "results"), "answer_nll", "bytes_held")
    files = pareto.write(found, tmp_path / "one" / "p")
    names = ["lm-blind", "niah-blind", "ruler-blind", "mean-blind"]
    wanted = [f"p-{name}.{kind}" for name in names for kind in ("png", "pdf", "svg")] + ["p-points.csv", "p-area.csv"]
    assert [file.name for file in files] == wanted
    svg = tmp_path / "one" / "p-niah-blind.svg"
    assert {"niah, blind, smollm2-135m-q4_1, n = 40", "bytes held, MiB", "keydiff", "full cache"} <= set(texts(svg))
    assert {"frontier", "frontier-band", "full", "method-keydiff", "method-vector_base_keydiff_"} <= ids(svg)
    height, width, _ = matplotlib.image.imread(tmp_path / "one" / "p-niah-blind.png").shape
    assert width == 990  # 3.3 inches
    assert height > 500
    again = pareto.write(
        frontier.panels(aggregate(tmp_path / "results"), "answer_nll", "bytes_held"), tmp_path / "two" / "p"
    )
    assert [file.read_bytes() for file in files] == [file.read_bytes() for file in again]
    points = pd.read_csv(tmp_path / "one" / "p-points.csv")
    assert points.query("task == 'niah'").groupby("method").size().eq(3).all()


def test_many_methods_are_grey_and_named(tmp_path: Path) -> None:
    rows = [cell(f"m{i:02}", budget, 0.3 + i / 100, float(budget)) for i in range(40) for budget in ("0.1", "0.5")]
    panel = frontier.panels(pd.DataFrame(rows))[0]
    assert len(pareto.highlighted(panel)) == len(pareto.HUES)
    pareto.write([panel], tmp_path / "p")
    shown = texts(tmp_path / "p-niah-blind.svg")
    assert [f"m{i:02}" in shown for i in range(40)] == [True] * 40
    colours = {node.attrib.get("style", "") for node in ET.parse(tmp_path / "p-niah-blind.svg").iter()}
    assert any(GREY in style for style in colours)


def test_where_the_bytes_went(tmp_path: Path) -> None:
    write_results(tmp_path / "results", n=8, tasks=("niah",), protocols=("blind",), unfinished=False)
    files = anatomy.write(aggregate(tmp_path / "results"), tmp_path / "results", "0.1", tmp_path / "b")
    table = pd.read_csv(tmp_path / "b.csv").set_index("method")
    assert [file.name for file in files] == ["b-niah-blind.png", "b-niah-blind.pdf", "b-niah-blind.svg", "b.csv"]
    assert table.loc["snapkv", "exact rows"] == pytest.approx(0.099, abs=1e-5)
    assert table.loc["vector(base=keydiff)", "exact rows"] == pytest.approx(0.0495, abs=1e-5)
    assert table.loc["vector(base=keydiff)", "other tiers"] == pytest.approx(0.0495, abs=1e-4)
    assert "from_key" in texts(tmp_path / "b-niah-blind.svg")
    with pytest.raises(UsageError, match=r"no finished cell at budget 0.2; there are: 0.05, 0.1, 0.5, 1"):
        anatomy.write(aggregate(tmp_path / "results"), tmp_path / "results", "0.2", tmp_path / "b")


def test_where_the_bytes_went_has_room_for_long_names() -> None:
    """Every text lies within the figure, and neither side's ticks or title run into the other's."""
    about = {"task": "niah", "protocol": "blind", "model": "m", "budget": "0.1", "exact rows": 0.05, "metadata": 0.0}
    rows = [
        about | {"method": name, "tiers": tiers, "other tiers": 0.05, "tokens exact": 0.05, "tokens int4": share}
        for name, tiers, share in (("a" * 45, "approximate, int4, int8", 0.4), ("snapkv", "", 0.0))
    ]
    figure = anatomy.draw(pd.DataFrame(rows))
    figure.draw_without_rendering()
    left, right = (axis.get_tightbbox() for axis in figure.axes)
    for drawn in (left, right, *(text.get_window_extent() for text in figure.texts)):
        assert figure.bbox.x0 <= drawn.x0
        assert drawn.x1 <= figure.bbox.x1
    assert left.x1 < right.x0


def test_the_script(tmp_path: Path) -> None:
    write_results(tmp_path / "results", n=8, tasks=("niah",), protocols=("blind",), budgets=("0.1",))
    script = [sys.executable, "scripts/pareto.py", str(tmp_path / "results")]
    run = subprocess.run([*script, "--out", str(tmp_path / "p")], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "area dominated up to share 1, score 0" in run.stdout
    assert "not drawn: 1 failed, 1 infeasible" in run.stdout
    assert str(tmp_path / "p-niah-blind.pdf") in run.stdout
    run = subprocess.run([*script, "--x", "weight"], capture_output=True, text=True)
    assert (run.returncode, run.stderr[:33]) == (2, "pareto: unknown x 'weight'; known")


def test_figures_and_tables_need_no_torch() -> None:
    code = "import sys; from kvbench.report import anatomy, latex, pareto; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
