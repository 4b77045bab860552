"""From the command line's configuration to cells: nothing below `run.py` sees a DictConfig."""

from __future__ import annotations

import dataclasses
import enum
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kvbench import plugins
from kvbench.budget import Budget
from kvbench.cell import Cell, ModelConfig, Settings
from kvbench.errors import UsageError

Node = Any  # a DictConfig; as an annotation it makes beartype warn of omegaconf's bases
DTYPES = ("bfloat16", "float16", "float32")


class Protocol(enum.Enum):
    """Is the question seen when the cache is compressed?"""

    blind = "no"
    aware = "yes"


class Measure(enum.Enum):
    """What is measured of a cell."""

    quality = "its answers, and their distance to the full cache's"
    solo = "what its cache costs a decoding step, beside the full cache"


class TrackerMode(enum.Enum):
    """What happens to the W&B mirror of the records."""

    offline = "kept under the results folder"
    online = "sent"
    disabled = "not made"


@dataclass
class TrackerConfig:
    mode: TrackerMode = TrackerMode.offline
    project: str = "kvbench"
    group: str | None = None  # null: a sweep's own words, a study's name, or the results folder's


@dataclass
class RunConfig:
    """The whole configuration of a run. `method` and `task` are the plugin's own dataclass."""

    model: ModelConfig = field(default_factory=ModelConfig)
    method: Any = MISSING
    budget: Any = 0.1  # anything Budget.parse reads
    task: Any = MISSING
    protocol: Protocol = Protocol.blind
    seed: int = 0  # draws the examples
    generate: bool = True  # False: NLL and KL only, no free answer
    limit: int | None = 32  # examples; null: all there are
    results: str = "results"
    redo: bool = False  # start finished cells over
    timed: int = 3  # examples of each cell that are timed alone at the end; 0: none
    measure: Measure = Measure.quality
    tracker: TrackerConfig = field(default_factory=TrackerConfig)


@dataclass(frozen=True)
class Run:
    """What one job does."""

    cell: Cell
    settings: Settings


class PluginSource(ConfigSource):
    """Where Hydra finds `method/<name>` and `task/<name>`: a plugin is imported when its name is chosen, not before."""

    _kinds: typing.ClassVar[dict[str, str]] = {"method": "methods", "task": "tasks"}

    @staticmethod
    def scheme() -> str:
        return "kvbench"

    def _locate(self, config_path: str) -> tuple[str, str] | None:
        group, _, name = config_path.removesuffix(".yaml").partition("/")
        kind = self._kinds.get(group, "")
        return (kind, name) if kind and name in plugins.files(kind) else None

    def load_config(self, config_path: str) -> ConfigResult:
        located = self._locate(config_path)
        assert located, config_path  # Hydra asks is_config first
        node = schema(plugins.load(*located))
        return ConfigResult(provider=self.provider, path=self.full_path(), config=node, header={"package": None})

    def available(self) -> bool:
        return True

    def is_group(self, config_path: str) -> bool:
        return config_path.strip("/") in ("", *self._kinds)

    def is_config(self, config_path: str) -> bool:
        return self._locate(config_path.rstrip("/")) is not None

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        if not config_path.strip("/"):
            return [] if results_filter is ObjectType.CONFIG else list(self._kinds)
        kind = self._kinds.get(config_path.strip("/"))
        return list(plugins.files(kind)) if kind and results_filter is not ObjectType.GROUP else []


def schema(cls: type) -> Node:
    """A dataclass as Hydra's overrides want it: not frozen, its dictionaries open to new keys."""
    node = OmegaConf.structured(cls)
    OmegaConf.set_readonly(node, False)
    _open_dictionaries(node)
    return node


def _open_dictionaries(node: Node) -> None:
    for name in map(str, node):
        child = None if OmegaConf.is_missing(node, name) else node[name]
        if isinstance(child, DictConfig) and OmegaConf.get_type(child) is dict:
            OmegaConf.set_struct(child, False)
        elif isinstance(child, DictConfig):
            _open_dictionaries(child)


def register() -> None:
    """Makes `run_schema` and the plugins known to Hydra."""
    ConfigStore.instance().store(name="run_schema", node=schema(RunConfig))
    Plugins.instance().register(PluginSource)


def build(what: str, node: Node) -> Any:
    """The dataclass instance that a node of the configuration stands for."""
    cls = OmegaConf.get_type(node) if OmegaConf.is_config(node) else type(node)
    if not dataclasses.is_dataclass(cls):
        raise UsageError(f"{what} has no schema: its preset must name the {what} in `defaults:`")
    hints = typing.get_type_hints(cls)
    options = [f.name for f in dataclasses.fields(cls) if f.init]
    values = {}
    for name in map(str, node):
        plugins.known("option", f"{what}.{name}", [f"{what}.{option}" for option in options])
        value = node[name]
        if OmegaConf.is_config(value):
            value = OmegaConf.to_object(value)
        # The configuration knows lists only; a frozen dataclass wants what can be hashed.
        if isinstance(value, list) and typing.get_origin(hints[name]) is tuple:
            value = tuple(value)
        values[name] = value
    try:
        return cls(**values)
    except ValueError as error:  # a plugin's __post_init__ that refuses its options
        raise UsageError(f"{what}: {error}") from error


def build_plugin(kind: str, name: str, options: dict[str, Any]) -> Any:
    """An instance of a plugin; wrong names and types are refused as on the command line."""
    what = kind.removesuffix("s")
    cls = plugins.load(kind, name)
    for option in options:
        plugins.known("option", f"{name}.{option}", [f"{name}.{f.name}" for f in dataclasses.fields(cls)])
    node = schema(cls)
    try:
        node.merge_with(options)
    except OmegaConfBaseException as error:
        raise UsageError(f"{what} {name}: {str(error).splitlines()[0]}") from error
    return build(f"{what} {name}", node)


def cell_of(model: str, method: str, budget: str, task: Any) -> Cell:
    """A cell as scripts are told of it: `method` is name:option=value:option=value, `model` a path as in conf/model."""
    name, *given = method.split(":")
    options = dict(option.partition("=")[::2] for option in given)
    return Cell(
        ModelConfig(model.rpartition(":")[2], model), build_plugin("methods", name, options), Budget.parse(budget), task
    )


def convert(config: Node) -> Run:
    """A composed configuration as plain frozen objects, checked."""
    model = build("model", config.model)
    plugins.known("model.dtype", model.dtype, DTYPES)
    plugins.known("model.compute", model.compute, ("auto", *DTYPES))
    plugins.known("model.weights", model.weights, ("trained", "random"))
    if config.seed < 0:
        raise UsageError(f"seed={config.seed} is below 0")
    if config.limit is not None and config.limit < 1:
        raise UsageError(f"limit={config.limit} leaves no example: give a number from 1, or null for all")
    cell = Cell(
        model=model,
        method=build("method", config.method),
        budget=Budget.parse(config.budget),
        task=build("task", config.task),
        protocol=config.protocol.name,
        seed=config.seed,
        generate=config.generate,
    )
    settings = Settings(
        results=Path(config.results).expanduser(),
        limit=config.limit,
        redo=config.redo,
        timed=config.timed,
        tracker_mode=build("tracker", config.tracker).mode.name,
        tracker_project=config.tracker.project,
        tracker_group=config.tracker.group,
        measure=config.measure.name,
    )
    return Run(cell, settings)
