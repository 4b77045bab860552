"""From the command line to cells: schemas, presets, identities."""

from __future__ import annotations

import importlib
import os
import sys
import types
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from kvbench import run
from kvbench.cell import Cell, Settings
from kvbench.list import KINDS, choices, conf_folder, describe, presets
from kvbench.plugins import files
from kvbench.report.table import method_label
from kvbench.run import main

METHOD = '''
from __future__ import annotations
import enum
from dataclasses import dataclass, field
from typing import Any
from kvbench.method import Method

class Colour(enum.Enum):
    red = 1
    blue = 2

@dataclass(frozen=True)
class Painted(Method):
    """Paints the cache (arXiv:0)."""
    window: int = 3
    colour: Colour = Colour.red
    sizes: tuple[int, ...] = (1, 2)
    more: dict[str, Any] = field(default_factory=dict)
    ratio: float | None = None

    def __post_init__(self):
        if self.window < 0:
            raise ValueError("window is below 0")
'''

TASK = '''
from dataclasses import dataclass
from kvbench.task import Task

@dataclass(frozen=True)
class Gallery(Task):
    """Looks at paintings."""
    context: int = 16
    def contexts(self, writer, seed):
        return iter(())
    def score(self, example, answer):
        return 0.0
'''

PRESET = """# Painted blue
defaults: [painted]
window: 9
colour: blue
sizes: [4]
"""

FILES = {
    "methods/painted.py": METHOD,
    "tasks/gallery.py": TASK,
    "conf/method/painted_blue.yaml": PRESET,
    "conf/method/painted_wrong.yaml": "# Has a wrong name\ndefaults: [painted]\nwindoww: 9\n",
    "conf/method/bare.yaml": "# Forgets the schema\nwindow: 9\n",
    "conf/model/mine.yaml": "# My model\nname: mine\npath: me/mine\n",
}
PLAY = ["method=painted", "task=gallery"]


@pytest.fixture
def plugin_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's folder of plugins and presets; gone after the test, for the tests that look at every plugin."""
    for name, text in FILES.items():
        file = tmp_path / "plugins" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.setenv("KVBENCH_PLUGINS", str(tmp_path / "plugins"))
    packages = [importlib.import_module(f"kvbench.{kind}") for kind in ("methods", "tasks")]
    paths = [list(package.__path__) for package in packages]
    yield tmp_path / "plugins"
    for package, path in zip(packages, paths, strict=True):
        package.__path__[:] = path
    for name in ("kvbench.methods.painted", "kvbench.tasks.gallery"):
        sys.modules.pop(name, None)


@pytest.fixture
def ran(plugin_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments of each call of `run_cells`, which does nothing here. The working folder is empty."""
    calls: list[tuple[Any, ...]] = []
    fake = types.ModuleType("kvbench.loop")
    monkeypatch.setattr(fake, "run_cells", lambda *arguments, alone: calls.append(arguments), raising=False)
    monkeypatch.setitem(sys.modules, "kvbench.loop", fake)
    monkeypatch.setattr(run, "is_done", lambda *_: True)  # or a sweep says that its cells are not
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # main sets both: undone after the test
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return calls


@pytest.fixture
def cell(ran: list[tuple[Any, ...]]) -> Callable[..., Cell]:
    """The one cell that a command line stands for."""

    def one(*overrides: str) -> Cell:
        ran.clear()
        assert main(overrides) == 0
        ((cells, *_),) = ran
        (found,) = cells
        return found

    return one


def test_defaults_and_settings(ran: list[tuple[Any, ...]]) -> None:
    assert main(PLAY) == 0
    assert main([*PLAY, "results=elsewhere", "limit=null", "redo=true", "tracker.mode=disabled"]) == 0
    (([first], settings), (_, others)) = ran
    assert (str(first.budget), first.protocol, first.seed, first.generate) == ("0.1", "blind", 0, True)
    assert first.model.path == "embedded:smollm2-135m-q4_1"
    assert settings == Settings(Path("results"), 32, redo=False, timed=3, tracker_mode="offline")
    assert others == Settings(Path("elsewhere"), None, redo=True, timed=3)


def test_options_reach_the_plugins_typed(cell: Callable[..., Cell]) -> None:
    found = cell(*PLAY, "method.colour=blue", "method.sizes=[4,5]", "method.more={a: 1}", "method.more.b=x")
    assert found.method.colour.name == "blue"
    assert found.method.sizes == (4, 5)
    assert found.method.more == {"a": 1, "b": "x"}
    assert type(found.method.more) is dict
    assert cell(*PLAY, "method.ratio=1", "task.context=2048").task.context == 2048
    hash(cell(*PLAY, "method.sizes=[4]").method.sizes)


def test_a_preset_is_the_same_cell_as_its_options_spelled_out(cell: Callable[..., Cell]) -> None:
    preset = cell("method=painted_blue", "task=gallery")
    spelled = cell(*PLAY, "method.window=9", "method.colour=blue", "method.sizes=[4]")
    assert preset.digest == spelled.digest
    assert preset.identity()["method"]["name"] == "painted"
    assert cell("method=painted_blue", "task=gallery", "method.window=3").digest != preset.digest
    recipe = [f"method.{option}" for option in ("router=paper", "maps=layer", "features=key", "intercept=false")]
    assert cell("method=vector_paper", PLAY[1]).digest == cell("method=vector", PLAY[1], *recipe).digest


def test_tables_call_what_is_a_preset_by_its_name(cell: Callable[..., Cell]) -> None:
    """A preset that restates a default would not be found again."""

    def label(*words: str) -> str:
        one = cell("task=gallery", *words)
        return method_label({"identity": one.identity(), "label": one.label})

    for name in presets("methods").keys() - {"painted_wrong", "bare"}:
        assert label(f"method={name}") == name
    assert label("method=painted", "method.window=9", "method.colour=blue", "method.sizes=[4]") == "painted_blue"
    assert label("method=painted_blue", "method.window=8") == "painted(window=8,colour=blue,sizes=[4])"
    assert label("method=painted_blue", "method.window=3") == "painted(colour=blue,sizes=[4])"
    assert label("method=painted") == "painted"


def test_identity_ignores_how_a_budget_is_written_and_where_things_go(cell: Callable[..., Cell]) -> None:
    digests = {
        cell(*PLAY, *more).digest
        for more in (["budget=0.1"], ["budget=0.10"], ["budget=1e-1"], ["limit=3"], ["results=x"], ["model.device=cpu"])
    }
    assert len(digests) == 1
    assert cell(*PLAY, "budget=64MiB").budget.amount == Fraction(64 * 2**20)
    assert cell(*PLAY, "budget='0.9r'").budget.nominal


def test_a_sweep_runs_every_combination(ran: list[tuple[Any, ...]], tmp_path: Path) -> None:
    assert main(["-m", "method=painted,painted_blue", "task=gallery", "budget=0.1,64MiB"]) == 0
    cells = [cell for cells, *_ in ran for cell in cells]
    assert [(cell.method.window, str(cell.budget)) for cell in cells] == [
        (3, "0.1"), (3, "67108864B"), (9, "0.1"), (9, "67108864B"),
    ]  # fmt: skip
    assert list(tmp_path.joinpath("here").iterdir()) == []


def test_a_users_own_model(cell: Callable[..., Cell]) -> None:
    assert cell(*PLAY, "model=mine").model.path == "me/mine"
    assert cell(*PLAY, "model.path=a/b", "model.name=b").model.path == "a/b"


@pytest.mark.parametrize(
    ("overrides", "offline"),
    [
        (["model=smollm2-135m"], True),
        (["model=smollm2-135m", "model.path=."], True),
        (["model=qwen3-8b"], False),
        (["model=smollm2-135m", "model.path=a/b"], False),
        (["-m", "model=smollm2-135m,qwen3-8b"], False),
    ],
)
def test_local_models_keep_the_hub_out(
    ran: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch, overrides: list[str], offline: bool
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert main([*PLAY, *overrides]) == 0
    assert ("HF_HUB_OFFLINE" in os.environ) is offline


@pytest.mark.parametrize(
    ("overrides", "offline"),
    [
        (["task=niah"], True),
        (["task=niah_multikey"], True),
        (["task=library"], False),
        (["task=library_short"], False),
        (["-m", "task=niah,library"], False),
        (["task=library", "task.data=books.jsonl"], True),
        (["task=library", "'task.data=\"hub:me/books@1\"'"], False),
    ],
)
def test_a_task_that_reads_the_hub_is_let_there(
    plugin_folder: Path,
    ran: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    offline: bool,
) -> None:
    task = TASK.replace("Gallery", "Library").replace("context: int = 16", 'hub = True\n    data: str = "hub:a/b@1"')
    (plugin_folder / "tasks" / "library.py").write_text(task)
    (plugin_folder / "conf" / "task").mkdir()
    (plugin_folder / "conf" / "task" / "library_short.yaml").write_text("# Short\ndefaults: [library]\n")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    try:
        assert main([PLAY[0], *(word.strip("'") for word in overrides)]) == 0
    finally:
        sys.modules.pop("kvbench.tasks.library", None)
    assert ("HF_HUB_OFFLINE" in os.environ) is offline


def test_what_the_repository_offers_composes(cell: Callable[..., Cell]) -> None:
    for group in ("method", "task", "model"):
        for name in choices(f"{group}s"):
            if name not in ("bare", "painted_wrong"):
                assert cell(*PLAY, f"{group}={name}").digest


def test_every_choice_has_a_name_of_its_own_and_a_line() -> None:
    for kind in KINDS:
        presets = conf_folder().joinpath(kind.removesuffix("s")).glob("*.yaml")
        if kind != "models":
            assert not {file.stem for file in presets} & set(files(kind)), "a preset would hide the plugin"
        for name, file in choices(kind).items():
            assert describe(file), f"{name} has no line for `python -m kvbench.list`"


def test_options_of_a_swept_method_reach_every_one_of_it(ran: list[tuple[Any, ...]]) -> None:
    """Also an option that the default method lacks; a value with commas is one value."""
    line = ["-m", "method=painted,painted_blue", "task=gallery", "method.window=3", "budget=0.5"]
    assert main(line) == 0
    ((cells, *_),) = ran
    assert [cell.method.window for cell in cells] == [3, 3]
    assert len({cell.digest for cell in cells}) == 2
    ran.clear()
    assert main(["-m", "method=compose,compose", "task=gallery,gallery", "method.tiers=[exact,int4]"]) == 0
    ((cells, *_),) = ran
    assert [list(cell.method.tiers) for cell in cells] == [["exact", "int4"]]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["seed=1,2", "limit=5", "results=/tmp/x", "timed=0"], "method=painted task=gallery seed=1,2"),
        (["seed=1", "method.more={a:'x, \"y\"'}"], "method=painted task=gallery seed=1 method.more={a:'x, \"y\"'}"),
        (["seed=1", "tracker.group=mine"], "mine"),
    ],
)
def test_a_sweep_is_a_group_of_its_own_words(ran: list[tuple[Any, ...]], words: list[str], expected: str) -> None:
    assert main(["-m", "method=painted", "task=gallery", *words]) == 0
    assert {settings.tracker_group for _, settings in ran} == {expected}


def test_one_cell_is_no_sweep(ran: list[tuple[Any, ...]]) -> None:
    assert main(["method=painted", "task=gallery"]) == 0
    assert ran[0][1].tracker_group is None
