"""The mix beside its rivals, from records whose differences are known."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
from conftest import load_script

from kvbench import experiment
from kvbench.config import convert
from kvbench.errors import UsageError
from kvbench.report.study import task_name
from kvbench.report.table import method_label
from kvbench.sweep import composed_words


@pytest.fixture(scope="module")
def study() -> ModuleType:
    return load_script("tiered_study")


def records(gains: dict[float, float], n: int = 60) -> pd.DataFrame:
    """A rival half a nat above the full cache at each budget, and a mix that is so much better than it."""
    rng = np.random.default_rng(0)
    hard = 1 + rng.random(n)
    rows = []
    for budget, gain in {1.0: 0.0, **gains}.items():
        arms = {"full": 0.0} if budget == 1 else {"rival": 0.5, "mix": 0.5 - gain}
        for arm, loss in arms.items():
            nll = hard + loss + 0.02 * rng.standard_normal(n)
            row = {"task": "lm", "protocol": "blind", "budget": budget, "arm": arm, "method": f"the {arm}"}
            row |= {"bytes_held": 10, "bytes_budget": 10}
            rows += [row | {"id": f"{i}", "cluster_id": f"{i}", "answer_nll": nll[i]} for i in range(n)]
    return pd.DataFrame(rows)


def test_better_alike_and_worse(study: ModuleType) -> None:
    """The margin is 5 % of a gap of half a nat: 0.025."""
    found = study.compare(records({0.1: 0.2, 0.25: -0.01, 0.5: -0.1})).set_index("budget")
    assert found["mean"].to_dict() == pytest.approx({0.1: -0.2, 0.25: 0.01, 0.5: 0.1}, abs=0.01)
    assert found["margin"].to_numpy() == pytest.approx(0.025, abs=2e-3)
    assert found["better"].tolist() == [True, False, False]
    assert found["non-inferior"].tolist() == [True, True, False]
    assert (found["n"] == 60).all()
    assert set(found["which rival"]) == {"the rival"}
    text = study.page(found.reset_index())
    assert "Of 3 cells: better in 1 (Holm), non-inferior in 2" in text
    assert "| lm | blind | 0.1 | 60 |" in text


def test_only_examples_that_both_have_are_compared(study: ModuleType) -> None:
    table = records({0.1: 0.2})
    found = study.compare(table[(table.arm != "mix") | (table.id.astype(int) < 40)])
    assert found.n.tolist() == [40]


def test_a_cell_that_lacks_a_side_is_left_out_and_none_at_all_is_told(study: ModuleType) -> None:
    table = records({0.1: 0.2, 0.25: 0.2})
    found = study.compare(table[(table.arm != "rival") | (table.budget != 0.25)])
    assert found.budget.tolist() == [0.1]
    for side in ("full", "mix"):
        with pytest.raises(UsageError, match="of all of full, rival, mix yet"):
            study.compare(table[table.arm != side])


def test_what_is_over_its_budget_is_counted(study: ModuleType) -> None:
    table = records({0.1: 0.2})
    table.loc[table.arm == "mix", "bytes_held"] = 11
    assert study.compare(table)["over"].tolist() == [60]


Key = tuple[str, str, float]


def arms(study: ModuleType, name: str) -> dict[str, dict[Key, str]]:
    """The methods of a study's file, by arm and cell."""
    found: dict[str, dict[Key, str]] = {"full": {}, "mix": {}, "rival": {}}
    for words in experiment.read(name):
        cell = convert(composed_words(words)).cell
        identity = cell.identity()
        key = (task_name(identity), identity["protocol"], float(identity["budget"]))
        same = found[study.ARMS.get(identity["method"]["name"], "rival")]
        assert key not in same
        same[key] = method_label({"identity": identity, "label": cell.label})
    assert {key[:2] for key in found["full"]} == {key[:2] for key in found["rival"]}
    assert found["mix"].keys() == found["rival"].keys()
    return found


@pytest.fixture(scope="module")
def chosen() -> dict[Key, str]:
    rivals = pd.read_csv(Path(__file__).parents[1] / "results" / "tiered_tuning" / "rivals.csv")
    return {(row.task, row.protocol, row.budget): row.rival for row in rivals.itertuples()}


def test_each_cell_has_the_rival_that_tuning_data_chose(study: ModuleType, chosen: dict[Key, str]) -> None:
    assert arms(study, "tiered_vs_rivals")["rival"] == chosen


def test_what_was_not_non_inferior_is_asked_again_with_the_same_rivals(
    study: ModuleType, chosen: dict[Key, str]
) -> None:
    found = arms(study, "tiered_open")
    answers = pd.read_csv(Path(__file__).parents[1] / "results" / "tiered_vs_rivals" / "study.csv")
    open_cells = answers[~answers["non-inferior"]]
    assert found["rival"] == {key: chosen[key] for key in open_cells.set_index(["task", "protocol", "budget"]).index}
    snapkv = {key for key, label in found["mix"].items() if "base=kvzip" not in label}
    assert snapkv == {("lm", "blind", 0.02)}
