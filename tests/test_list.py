"""What there is to choose from is shown as it is declared, without importing it."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvbench import list as choice_list
from kvbench import plugins
from kvbench.method import Method

METHODS = list(plugins.files("methods"))


@pytest.mark.parametrize("name", METHODS)
def test_traits_read_from_the_file_are_those_of_the_class(name: str) -> None:
    cls = plugins.load("methods", name)
    assert issubclass(cls, Method)
    assert {"family", "trust"} <= set(vars(cls)), "declares its family and its trust"
    family, trust, axis, aware, fitted, holds = choice_list.traits(plugins.files("methods")[name])
    assert (family, trust, holds) == (cls.family.name, cls.trust.name, cls.holds)
    assert axis == cls.axis.name.lower()
    assert (aware == "seen") == cls.query_aware
    assert (fitted == "per model") == ("calibrations" in vars(cls))


def test_the_page_of_methods_is_current() -> None:
    page = Path(__file__).parent.parent / "docs" / "methods.md"
    assert page.read_text() == choice_list.page(), "make it again: python -m kvbench.list --page > docs/methods.md"


def test_every_method_is_listed_with_its_traits(capsys: pytest.CaptureFixture[str]) -> None:
    assert choice_list.main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[2:] == ["family", "trust", "budget", "bounds", "last", "queries", "fitted", "holds"]
    assert [line.split()[0] for line in lines[1::2]] == sorted({*METHODS, *choice_list.presets("methods")})
    vector = next(i for i, line in enumerate(lines) if line.startswith("vector "))
    assert lines[vector].split()[:6] == ["vector", "router", "reconstructed", "held", "seen", "per"]
    assert "arXiv 2605.23258" in lines[vector + 1]
