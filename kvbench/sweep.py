"""The command line from Python: the same options, and the records as a table. Imports no torch by itself."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
import pandas as pd
from hydra import initialize_config_dir

from kvbench.config import Node, Run, register
from kvbench.errors import UsageError
from kvbench.list import conf_folder, user_conf_folder
from kvbench.report.table import examples, solos
from kvbench.run import BAD_INPUT, Tell, check, compose, one_line, start
from kvbench.store import SOLO


def evaluate(**options: Any) -> pd.DataFrame:
    """Runs cells as `python -m kvbench.run` does; returns their records, a row per example, as `kvbench.read` does.

    The options are those of the command line, dotted ones in a dictionary; a list is a sweep over its values (a value
    that is a list itself is written as a tuple):

        kvbench.evaluate(method=["full", "snapkv"], budget=[0.1, 0.25], task="niah", limit=4, **{"task.context": 512})

    Records are kept in `results`, and what is there already is not run again; with measure="solo" the rows are what was
    measured of each cell. A cell that can't be run raises
    UsageError; in a sweep it is told on stderr, and the others go on.
    """
    swept = any(isinstance(value, list) for value in options.values())
    runs: list[Run] = []
    errors: list[Exception] = []

    def begin(configs: Sequence[Node], tell: Tell, **launcher: Any) -> None:
        def hear(error: Exception) -> None:
            errors.append(error)
            if swept:
                tell(error)

        runs.extend(start(configs, hear, **launcher))

    offline = os.environ.get("HF_HUB_OFFLINE")
    import huggingface_hub.constants  # noqa: F401  reads that once, now: who calls may want the hub later

    try:
        compose(["-m"] * swept + words(options), None, begin)
    except BAD_INPUT as error:
        raise UsageError(one_line(error)) from error
    finally:
        if offline is None:
            os.environ.pop("HF_HUB_OFFLINE", None)
    limits = {run.cell.folder(run.settings.results): run.settings.limit for run in runs}
    if any(run.settings.measure == "solo" for run in runs):
        table = solos(folder for folder in limits if (folder / SOLO).exists())
    else:
        table = examples({folder: limit for folder, limit in limits.items() if folder.exists()})
    if errors and (table.empty or not swept):
        raise UsageError(one_line(errors[0])) from errors[0]
    return table


def composed(options: dict[str, Any]) -> Node:
    """The configuration that some options of the command line make, nothing swept. Raises UsageError."""
    return composed_words(words(options))


def composed_words(overrides: list[str]) -> Node:
    """The same of options as the command line has them."""
    try:
        check(overrides, sweep=False)
        register()
        if folder := user_conf_folder():
            path = f"hydra.searchpath=[kvbench://plugins,{_written(f'file://{folder.absolute()}')}]"
            overrides = [*overrides, path]
        with initialize_config_dir(str(conf_folder().absolute()), version_base="1.3"):
            return hydra.compose("config", overrides)
    except BAD_INPUT as error:
        raise UsageError(one_line(error)) from error


def words(options: dict[str, Any]) -> list[str]:
    """Options as the command line has them; a list is a sweep over its values."""
    found = []
    for name, value in options.items():
        if value == []:
            raise UsageError(f"{name}=[] leaves nothing to run")
        found.append(f"{name}=" + ",".join(map(_written, value if isinstance(value, list) else [value])))
    return found


def _written(value: Any) -> str:
    if isinstance(value, str | Path):
        # Hydra takes backslashes for what they are, but before a quote.
        return '"' + re.sub(r'(\\*)("|\Z)', lambda found: found[1] * 2 + found[2].replace('"', '\\"'), str(value)) + '"'
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_written, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{_written(one)}" for name, one in value.items()) + "}"
    return "null" if value is None else str(value)
