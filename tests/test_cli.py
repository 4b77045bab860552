"""What a user types wrong: one line, exit code 2, nothing written; and what help and the list show."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_config import PLAY, plugin_folder, ran  # noqa: F401 (fixtures)

import kvbench
from kvbench import list as choice_list
from kvbench.errors import UsageError
from kvbench.run import main

# Told from the files' names alone: neither a plugin nor torch is imported.
EARLY = {
    "method=nope": "unknown method 'nope'; known: ",
    "task=nope": "unknown task 'nope'; known: ",
    "model=nope": "unknown model 'nope'; known: llama3.1-8b, ",
    "method=": "unknown method ''; known: ",
    "budget=0": "budget=0 is not above zero",
    "budget=-0.1": "budget=-0.1 is not a budget",
    "budget=1.5": "budget=1.5 is more than the full cache",
    "budget=many": "budget=many is not a budget",
    "budget=5parsecs": "budget=5parsecs has an unknown unit",
    "protocol=deaf": "unknown protocol 'deaf'; known: blind, aware",
    "methd=full": "unknown option 'methd'; known: model, method, budget, ",
    "method=full,random": "method=full,random gives several values: add -m",
    "-m method=full,nope": "unknown method 'nope'",
    "-m budget=0.1,0": "budget=0 is not above zero",
    "vector": "can't read vector: options are name=value",
    "results=~/x": "can't read results=~/x",
    "--nope": "unrecognized arguments: --nope",
}

# Told once the plugins' dataclasses are known.
LATE = {
    "method.windw=1": "unknown option 'method.windw'; known: method.window, method.colour, ",
    "+method.windw=1": "unknown option 'method.windw'; known: method.window, method.colour, ",
    "task.contxt=1": "unknown option 'task.contxt'; known: task.context",
    "model.pth=x": "unknown option 'model.pth'; known: model.name, model.path, ",
    "tracker.projct=x": "unknown option 'tracker.projct'; known: tracker.mode, tracker.project",
    "method.colour=green": "method.colour: Invalid value 'green', expected one of [red, blue]",
    "method.window=wide": "method.window: Value 'wide' of type 'str' could not be converted to Integer",
    "method.window=null": "field 'method.window' is not Optional",
    "method.window=-1": "method: window is below 0",
    "-m method.window=-1,-2": "method: window is below 0",
    "tracker.mode=maybe": "tracker.mode: Invalid value 'maybe', expected one of [offline, online, disabled]",
    "model.dtype=int3": "unknown model.dtype 'int3'; known: bfloat16, float16, float32",
    "seed=x": "seed: Value 'x' of type 'str' could not be converted to Integer",
    "-m seed=x,1": "seed: Value 'x' of type 'str' could not be converted to Integer",
    "seed=-1": "seed=-1 is below 0",
    "limit=0": "limit=0 leaves no example",
    "model=mine model.path=???": "Missing mandatory value: model.path",
    "method=painted_wrong": "Key 'windoww' not in 'Painted'",
    "method=bare": "method has no schema",
}


def python(code: str, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(kvbench.__file__).parent.parent)}
    environment.pop("KVBENCH_PLUGINS", None)
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


def test_bad_names_are_told_before_torch_is_imported(tmp_path: Path) -> None:
    code = """
import json, sys, time
began = time.perf_counter()
from kvbench.run import main
codes, times = [], [time.perf_counter() - began]
for line in json.loads(sys.argv[1]):
    began = time.perf_counter()
    codes.append(main(line.split()))
    times.append(time.perf_counter() - began)
print(json.dumps([codes, times[0] + max(times[1:]), [m for m in ("torch", "transformers") if m in sys.modules]]))
"""
    done = python(code, tmp_path, json.dumps(list(EARLY)))
    codes, slowest, imported = json.loads(done.stdout)
    assert set(codes) == {2}
    lines = done.stderr.splitlines()
    assert len(lines) == len(EARLY), done.stderr
    for line, expected in zip(lines, EARLY.values(), strict=True):
        assert line.startswith(f"kvbench: {expected}")
    assert imported == []
    assert slowest < 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("line", "expected"), LATE.items())
def test_bad_options_are_one_line(
    ran: list[Any],  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    line: str,
    expected: str,
) -> None:
    choice = [] if "method=" in line else PLAY[:1]
    assert main([*choice, PLAY[1], *line.split()]) == 2
    captured = capsys.readouterr()
    lines = set(captured.err.splitlines())  # a sweep tells it once per cell
    assert len(lines) == 1
    assert lines.pop().startswith("kvbench: ")
    assert expected in captured.err
    assert captured.out == ""
    assert ran == []
    assert list(tmp_path.joinpath("here").iterdir()) == []


@pytest.fixture
def failing(ran: list[Any], monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], list[Any]]:  # noqa: F811
    """Makes `run_cells` raise for every cell whose window is 3; returns the list of calls."""

    def use(error: BaseException) -> list[Any]:
        def run_cells(cells: list[Any], *settings: Any, alone: bool) -> None:
            ran.append(cells)
            if cells[0].method.window == 3:
                raise error

        monkeypatch.setattr(sys.modules["kvbench.loop"], "run_cells", run_cells)
        return ran

    return use


def test_a_cell_that_fails_does_not_end_a_sweep(
    failing: Callable[[BaseException], list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    calls = failing(UsageError("the corpora are missing"))
    assert main([*PLAY, "-m", "seed=3,4"]) == 2  # two groups: they share no prefill
    assert len(calls) == 2
    assert capsys.readouterr().err == 2 * "kvbench: the corpora are missing\n"


def test_infeasible_alone_is_an_error(
    failing: Callable[[BaseException], list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    from kvbench.plan import Infeasible

    failing(Infeasible(smallest=2048, limit=1000))
    assert main([*PLAY, "method.window=3"]) == 2
    assert capsys.readouterr().err == "kvbench: the smallest plan needs 2,048 bytes, the budget allows 1,000\n"


@pytest.mark.parametrize("mode", [[], ["-m"]])
def test_an_interrupt_says_how_to_go_on(
    failing: Callable[[BaseException], list[Any]], capsys: pytest.CaptureFixture[str], mode: list[str]
) -> None:
    failing(KeyboardInterrupt())
    assert main([*PLAY, *mode, "method.window=3"]) == 130
    assert capsys.readouterr().err == "kvbench: interrupted: the same command continues\n"


def test_a_defect_keeps_its_traceback(failing: Callable[[BaseException], list[Any]]) -> None:
    failing(ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        main([*PLAY, "method.window=3"])


def test_flags_may_stand_anywhere(ran: list[Any], capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    assert main([PLAY[0], "--cfg", "job", PLAY[1]]) == 0
    shown = capsys.readouterr().out
    assert "  colour: red\n" in shown
    assert "budget: 0.1\n" in shown
    assert ran == []


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"{name}=" in shown for name in ("model", "method", "budget", "task", "protocol", "seed", "limit"))
    assert "--cfg job" in shown
    assert choice_list.listing() in shown


def test_the_list_has_the_name_first(plugin_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    assert choice_list.main([]) == 0
    shown = capsys.readouterr().out.splitlines()
    lines = {line.split()[0]: line for line in shown if line}
    assert shown[shown.index(lines["painted"]) + 1] == "    Paints the cache (arXiv:0)."
    assert shown[shown.index(lines["painted_blue"]) + 1] == "    Painted blue"
    assert lines["gallery"].endswith("  Looks at paintings.")
    assert {"full", "snapkv", "niah", "smollm2-135m", "llama3.1-8b", "mine"} <= lines.keys()
    assert choice_list.main(["models"]) == 0
    assert "snapkv" not in capsys.readouterr().out


def test_the_list_imports_nothing_heavy(tmp_path: Path) -> None:
    code = """
import sys
from kvbench.list import main
main([])
print(sorted({"torch", "hydra", "numpy"} & set(sys.modules)), file=sys.stderr)
"""
    assert python(code, tmp_path).stderr.strip() == "[]"
