"""The study of the maps' domain, from records whose differences are known."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pandas as pd
import pytest
from conftest import load_script

from kvbench import experiment
from kvbench.config import convert
from kvbench.errors import UsageError
from kvbench.sweep import composed_words

LOSSES = {
    "full": 0.0,
    "base": 0.5,
    "paper, left out": 0.9,
    "paper, in domain": 0.4,
    "ours, left out": 0.2,
    "ours, in domain": 0.2,
}


@pytest.fixture(scope="module")
def study() -> ModuleType:
    return load_script("domain_study")


def records(n: int = 60) -> pd.DataFrame:
    """Arms above the full cache by `LOSSES`."""
    rng = np.random.default_rng(0)
    hard = 1 + rng.random(n)
    rows = []
    for arm, loss in LOSSES.items():
        nll = hard + loss + 0.02 * rng.standard_normal(n)
        row = {"task": "lm", "protocol": "blind", "scorer": "keydiff", "budget": 0.1, "arm": arm}
        rows += [row | {"id": f"{i}", "cluster_id": f"{i}", "answer_nll": nll[i]} for i in range(n)]
    return pd.DataFrame(rows)


def test_each_pair_has_its_difference(study: ModuleType) -> None:
    found = study.compare(records()).set_index("pair")
    expected = {
        f"{ours} - {theirs}": pytest.approx(LOSSES[ours] - LOSSES[theirs], abs=0.01) for ours, theirs in study.PAIRS
    }
    assert found["mean"].to_dict() == expected
    told = {"ours, in domain - ours, left out": False}
    assert (found["q"] < 0.05).to_dict() == {pair: told.get(pair, True) for pair in expected}
    assert (found["n"] == 60).all()


def test_the_page_marks_what_is_told_from_zero(study: ModuleType) -> None:
    text = study.page(study.compare(records()))
    assert text.count(")\\*") == 5
    assert "| lm | blind | keydiff | 0.1 | 60 |" in text


def test_only_examples_that_all_have_are_compared_and_none_at_all_is_told(study: ModuleType) -> None:
    table = records()
    fewer = table[(table.arm != "base") | (table.id.astype(int) < 40)]
    assert (study.compare(fewer)["n"] == 40).all()
    with pytest.raises(UsageError, match="yet"):
        study.compare(table[table.arm != "base"])


def test_the_file_has_every_arm_in_every_cell(study: ModuleType) -> None:
    cells = [convert(composed_words(words)).cell.identity() for words in experiment.read("vector_domains")]
    found: dict[tuple[str, str, str, str], set[str]] = {}
    for one in cells:
        scorer, arm = study.arm(one["method"])
        if arm != "full":
            found.setdefault((one["task"]["name"], one["protocol"], scorer, one["budget"]), set()).add(arm)
    assert len(found) == 9 + 6 + 3
    assert all(arms == set(study.ARMS) for arms in found.values())
