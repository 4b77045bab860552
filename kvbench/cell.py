"""A cell: one (model, method, budget, task, protocol, seed), and its identity. Imports no torch."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbench import plugins
from kvbench.budget import Budget


@dataclass
class ModelConfig:
    """A model: a file in conf/model/. The options are `model.<field>=`."""

    name: str = "???"  # as tables and folders show it
    path: str = "???"  # a hub id, a local folder, or `embedded:<name>` for what `python -m kvbench.fetch` brings
    revision: str | None = None  # hub commit or tag
    weights: str = "trained"  # or `random`, for bytes and latency: from the shape alone, nothing else is fetched
    dtype: str = "bfloat16"  # of the cache, in which bytes are counted
    compute: str = "auto"  # of the layers; auto: as `dtype`, but float32 on a CPU that has no such instructions
    device: str = "auto"  # auto: CUDA where there is one, else the CPU; spread: its layers over all GPUs (accelerate)
    chat: bool = True  # wrap prompts in the tokenizer's chat template
    template: dict[str, Any] = dataclasses.field(default_factory=dict)  # extra arguments of the chat template
    together: int = 8  # answers of several cells that are decoded in one batch, where that changes no bit of any
    prefill_chunk: int = 65536  # a longer context is read in chunks of this many tokens

    def identity(self) -> dict[str, Any]:
        """What makes two models different cells: not where they run."""
        drawn = {} if self.weights == "trained" else {"weights": self.weights}
        return drawn | {
            "name": self.name,
            "path": self.path,
            "revision": self.revision,
            "dtype": self.dtype,
            "chat": self.chat,
            "template": self.template,
        }


def options(plugin: Any) -> dict[str, Any]:
    """A plugin's options that differ from their defaults, as plain JSON values.

    Defaults are left out so that a method may gain an option without orphaning earlier records.
    """
    found = {}
    for field in dataclasses.fields(plugin):
        value = getattr(plugin, field.name)
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if value != default:
            found[field.name] = plain(value)
    return found


def plain(value: Any) -> Any:
    """`value` as JSON would hold it: enums by name, sequences as lists."""
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


@dataclass(frozen=True)
class Cell:
    """What one row of a results table is about. `generate=False` measures NLL and KL only, and is another cell."""

    model: ModelConfig
    method: Any  # kvbench.method.Method
    budget: Budget
    task: Any  # kvbench.task.Task
    protocol: str = "blind"
    seed: int = 0
    generate: bool = True

    def identity(self) -> dict[str, Any]:
        """Everything a record depends on, but hardware, limit, results folder, tracker and launcher."""
        return {
            "model": self.model.identity(),
            "method": _described(self.method),
            "budget": str(self.bound),
            "task": _described(self.task),
            "protocol": self.protocol,
            "seed": self.seed,
            "generate": self.generate,
        }

    @property
    def bound(self) -> Budget:
        """The budget that holds for the method: 1 if it ignores budgets."""
        return self.budget if self.method.budgeted else Budget.parse("1")

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:12]

    @property
    def label(self) -> str:
        """The method as tables show it: `vector(features=key)`."""
        changed = ",".join(f"{k}={v}" for k, v in options(self.method).items())
        return plugins.name_of(self.method) + (f"({changed})" if changed else "")

    def folder(self, results: Path) -> Path:
        """results/<task>/<model>/<method>-<budget>-<hash>: readable, and no two cells share one."""
        identity = self.identity()
        leaf = f"{identity['method']['name']}-{identity['budget']}-{self.digest}"
        return results / slug(identity["task"]["name"]) / slug(self.model.name) / slug(leaf)


def _described(plugin: Any) -> dict[str, Any]:
    """Name and options; what an option `name` says is one of many (lm-eval's tasks) stands behind the plugin's name."""
    found = options(plugin)
    return found | {"name": ":".join([plugins.name_of(plugin), *filter(None, [found.get("name")])])}


@dataclass(frozen=True)
class Settings:
    """How cells are run: nothing that their records depend on."""

    results: Path
    limit: int | None = None  # examples; None: all the task has
    redo: bool = False  # start finished cells over
    timed: int = 0  # examples of each cell that are timed alone, after all of them have been answered
    tracker_mode: str = "disabled"
    tracker_project: str = "kvbench"
    tracker_group: str | None = None
    measure: str = "quality"  # or `solo`: seconds of the cache alone, no answers


def slug(text: str) -> str:
    """`text` as one safe folder name: it can't leave its parent."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip(".") or "_"
