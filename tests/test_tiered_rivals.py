"""The choice of rivals, from a table whose best ones are known."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
from conftest import load_script


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("tiered_rivals")


def test_the_best_rival_of_each_cell_is_chosen_and_never_the_mix(script: ModuleType) -> None:
    rows = [("a", "rival", 0.1, 2.0), ("b", "rival", 0.1, 1.5), ("ours", "mix", 0.1, 1.0), ("worse", "mix", 0.1, 1.2)]
    rows += [("a", "rival", 0.5, 1.1), ("b", "rival", 0.5, 1.2), ("ours", "mix", 0.5, 1.3), ("full", "full", 1.0, 0.9)]
    table = pd.DataFrame(rows, columns=["method", "kind", "budget", "answer_nll"])
    table = table.assign(task="lm", protocol="blind", n=6).sort_values([*script.CELL, "answer_nll"])
    found = script.rivals(table).set_index("budget")
    assert found.rival.to_dict() == {0.1: "b", 0.5: "a"}
    assert found.answer_nll.to_dict() == {0.1: 1.5, 0.5: 1.1}
    assert set(found.full) == {0.9}


def test_the_committed_choice_follows_from_the_committed_records(script: ModuleType) -> None:
    folder = Path(__file__).parents[1] / "results" / "tiered_tuning"
    made = script.rivals(script.read(folder)).round(4).reset_index(drop=True)
    pd.testing.assert_frame_equal(made, pd.read_csv(folder / "rivals.csv"))
