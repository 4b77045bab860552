"""What a budget means, before any model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbench.budget import Budget
from kvbench.errors import UsageError


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("0.10", "0.1"),
        ("1e-1", "0.1"),
        (0.25, "0.25"),
        ("1", "1"),
        ("1.0", "1"),
        ("64MiB", "67108864B"),
        ("0.5MiB", "524288B"),
        ("0.9r", "0.9r"),
        ("0.90 r", "0.9r"),
        ("128tok", "128tok"),
    ],
)
def test_equal_budgets_print_alike(text: str | float, normal: str) -> None:
    assert str(Budget.parse(text)) == normal
    assert str(Budget.parse(normal)) == normal


@pytest.mark.parametrize("text", ["", "0", "-0.1", "1.5", "0MiB", "0tok", "1r", "1.2r", "10%", "0.1x", "abc", "nan"])
def test_what_is_no_budget_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(UsageError, match=r"budget=") as refused:
        Budget.parse(text)
    assert "\n" not in str(refused.value)


def test_shares_are_exact() -> None:
    assert Budget.parse("0.1").allow(10**15, 10).limit == 10**14  # 0.1 as a float is a little more
    assert Budget.parse("0.9r").allow(1000 * 512, 1000).limit == 100 * 512  # int(1000 * (1 - 0.9)) is 99
    assert Budget.parse("128tok").allow(1000 * 512, 1000).limit == 128 * 512
    assert Budget.parse("5000tok").allow(1000 * 512, 1000).limit == 1000 * 512


@given(st.integers(1, 1000), st.integers(1, 10**6), st.integers(0, 10**6))
def test_nominal_budgets_charge_payload_alone(tokens: int, payload: int, metadata: int) -> None:
    full = tokens * 512
    assert Budget.parse("0.5").allow(full, tokens).charged(payload, metadata) == payload + metadata
    assert Budget.parse("0.5r").allow(full, tokens).charged(payload, metadata) == payload
