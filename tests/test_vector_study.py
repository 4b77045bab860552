"""The study's answers, from records whose differences are known."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pandas as pd
import pytest
from conftest import load_script

from kvbench.report.study import vector_arm


@pytest.fixture(scope="module")
def study() -> ModuleType:
    return load_script("vector_study")


def records(worse: float, n: int = 60) -> pd.DataFrame:
    """Ours 0.2 nat better than its base at 0.1, and `worse` than it at 0.25; the twin as ours; the paper 0.5 worse."""
    rng = np.random.default_rng(0)
    hard = 1 + rng.random(n)
    rows = []
    for budget, gain in ((0.1, -0.2), (0.25, worse)):
        arms = {"full": 0.0, "base": 0.5, "ours": 0.5 + gain, "twin": 0.5 + gain, "paper": 1.0}
        for arm, loss in arms.items():
            noise = 0.02 * rng.standard_normal(n) * (arm not in ("full", "twin"))
            for i in range(n):
                row = {"task": "lm", "protocol": "blind", "scorer": "kvzip", "arm": arm, "budget": budget, "draw": 0}
                row |= {"id": f"{i}", "cluster_id": f"{i}", "answer_nll": hard[i] + loss + noise[i]}
                row |= {"bytes_held": 10, "bytes_full": 100, "bytes_budget": 10, "bytes_shared": 5}
                if arm != "full" or budget == 0.1:
                    rows.append(row)
    return pd.DataFrame(rows)


@pytest.mark.parametrize(("worse", "holds"), [(0.0, True), (0.015, True), (0.04, False)])
def test_superiority_and_margins(study: ModuleType, worse: float, holds: bool) -> None:
    """The margin is 5 % of a gap of half a nat: 0.025."""
    found = study.compare(records(worse)).set_index("budget")
    assert found["ours - base"][0.1] == pytest.approx(-0.2, abs=0.01)
    assert found["ours - base, Holm p"][0.1] < 0.05
    assert found["ours non-inferior"][0.1]
    assert found["ours, margin"][0.25] == pytest.approx(0.025, abs=1e-3)
    assert found["ours non-inferior"][0.25] == holds
    assert found["ours - base, Holm p"][0.25] > 0.05
    assert not found["paper non-inferior"].any()
    assert found["paper - base, Holm p"].min() > 0.9
    assert "| lm | kvzip | 0.1 | 60 |" in study.page(study.compare(records(worse)), pd.DataFrame())


@pytest.mark.parametrize(
    ("method", "arm"),
    [
        ({"name": "kvzip"}, ("kvzip", "base")),
        ({"name": "full"}, ("", "full")),
        ({"name": "compose", "tiers": ["int4"]}, ("snapkv", "twin")),
        ({"name": "vector", "base": "keydiff", "router": "paper"}, ("keydiff", "paper")),
        ({"name": "vector", "key_bits": 4}, ("snapkv", "ours")),
    ],
)
def test_arms(method: dict[str, str], arm: tuple[str, str]) -> None:
    assert vector_arm(method) == arm
