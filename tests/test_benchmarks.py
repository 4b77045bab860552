"""The benchmarks' own arithmetic; what they measure is not run here."""

import sys
from math import isnan
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def common(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import common

    yield common
    sys.modules.pop("common")


def test_a_sweep_has_the_full_cache_once(common):
    found = common.cells(["full", "snapkv"], [0.1, 0.5])
    assert found == [("full", 1.0), ("snapkv", 0.1), ("snapkv", 0.5)]
    assert common.sweep(["full", "snapkv"], [0.1, 0.5], "r", limit=2)[:3] == [
        "-m",
        "method=full,snapkv",
        "budget=0.1,0.5",
    ]
    assert "-m" not in common.sweep(["snapkv"], [0.1], "r", limit=2)


def test_a_ratio_is_of_sums_and_its_interval_is_paired(common):
    assert common.ratio([2, 4, 6], [1, 2, 3]) == (2, 2, 2)  # the same in every pair: no spread
    middle, low, high = common.ratio([2, 8, 3, 7], [1, 2, 1, 2])
    assert low < middle < high
    assert middle == 20 / 6
    assert isnan(common.ratio([2], [1])[1])


def test_tables_are_markdown(common):
    assert common.table(["a", "b"], [["x", 1]]) == "| a | b |\n| --- | ---: |\n| x | 1 |"
    assert common.shown((2.0, 1.5, 2.5)) == "2.00 (1.50 to 2.50)"
    assert common.shown((2.0, float("nan"), float("nan"))) == "2.00"
