"""The progress bar, as a log file has it."""

from __future__ import annotations

import pytest

from kvbench.measure import progress


def test_what_an_earlier_run_has_done_does_not_shorten_the_rest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with progress.Progress("cells", 100) as bar:
        bar.skip(50)
        for _ in range(2):
            clock[0] += 61
            bar.advance()
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["cells: 51 of 100, 1 min so far, 50 min left", "cells: 52 of 100, 2 min so far, 49 min left"]
