"""Measure one KV-cache compression method, or a sweep of them.

  python -m kvbench.run method=snapkv budget=0.1 task=niah task.context=2048
  python -m kvbench.run -m method=full,snapkv,vector budget=0.05,0.1,0.25    every combination, each context read once
  python -m kvbench.run method=vector --cfg job                              every option, with its value; runs nothing

Options are given as name=value:

  model=     which model; model.path= any hub id or local folder (then also model.name=), model.dtype=, model.device=
  method=    which method; its own options are method.<option>=
  budget=    0.1     share of the full cache's bytes, everything counted      64MiB   as many bytes
             0.9r    nominal: this share of the tokens is removed              128tok  nominal: tokens kept per KV head
  task=      which task; its own options are task.<option>=
  protocol=  blind: the question isn't seen when compressing; aware: it is
  seed=      draws the examples
  limit=     how many examples (null: all); a larger limit continues a finished run
  measure=   quality; or solo: what the cache alone costs a decoding step beside the full cache, without answers
  generate=  false: only the NLL and KL of the reference answers, no free answer
  results=   folder for the records: <results>/<task>/<model>/<method>-<budget>-<hash>/{header.json,examples.jsonl}
  redo=      true: start finished cells over
  tracker.mode=  W&B mirror of the records: offline (default), online, disabled
  hydra/launcher=slurm  with -m: groups of cells are jobs of a SLURM cluster (docs/slurm.md)

A stopped run continues when the same command is given again; python -m kvbench.status shows how far cells are.
With several GPUs and model.device=auto a sweep uses all of them, one process each.
Exit code: 0 done, 1 cells of a sweep are not done, 2 the request can't be met, 130 stopped by Ctrl-C, 143 by SIGTERM.
A budget below the method's smallest plan can't be met: 2; one cell of a sweep is then marked infeasible, a result: 0.
$KVBENCH_PLUGINS: a folder with methods/, tasks/ and conf/ of your own.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import hydra
from hydra._internal.utils import get_args_parser  # hydra.main's own: Hydra has no public way to its flags
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString, ValueType
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from kvbench import plugins
from kvbench.budget import Budget
from kvbench.cell import Cell, Settings
from kvbench.config import Measure, Node, Protocol, Run, RunConfig, convert, register
from kvbench.errors import UsageError
from kvbench.list import choices, conf_folder, listing, user_conf_folder
from kvbench.plugins import known
from kvbench.report.solo import print_solo
from kvbench.report.summary import print_summary
from kvbench.store import is_done, is_infeasible

BAD_INPUT = (UsageError, HydraException, OmegaConfBaseException)
Tell = Callable[[Exception], None]
Action = Callable[[Sequence[Node], Tell], None]


class NotDone(Exception):
    """A sweep has ended and some of its cells have not all their records."""


class NotFeasible(Exception):
    """Cells of a sweep have budgets below their methods' smallest plans, and are marked so: nothing is wrong."""


class Told:
    """Tells what is wrong on stderr, and keeps the exit code that follows from it."""

    codes: ClassVar[dict[type[Exception], int]] = {NotFeasible: 0, NotDone: 1}

    def __init__(self) -> None:
        self.code = 0

    def __call__(self, error: Exception) -> None:
        print(f"kvbench: {one_line(error)}", file=sys.stderr)
        self.code = max(self.code, self.codes.get(type(error), 2))


class Terminated(KeyboardInterrupt):
    """SIGTERM."""


def main(argv: Sequence[str] | None = None, action: Action | None = None) -> int:
    """Runs the command line `argv`; returns the exit code. Bad input is one line on stderr and 2.

    `action` takes the jobs' composed configurations, and whom to tell of bad ones; without it the jobs' cells are run.
    """
    return guarded(lambda: compose(list(sys.argv[1:] if argv is None else argv), action))


def guarded(run: Callable[[], int]) -> int:
    """The exit code of `run`, or of what ended it: bad input, Ctrl-C, SIGTERM."""
    try:
        with _sigterm_interrupts():
            return run()
    except BAD_INPUT as error:
        print(f"kvbench: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"kvbench: interrupted: {str(stop) or 'the same command continues'}", file=sys.stderr)
        return 143 if isinstance(stop, Terminated) else 130


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Meanwhile SIGTERM ends a run as Ctrl-C does, unless somebody else handles it, as submitit does in its jobs."""
    mine = threading.current_thread() is threading.main_thread()
    if not mine or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def stop(number: int, frame: Any) -> NoReturn:
        raise Terminated

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def compose(argv: list[str], action: Action | None, begin: Callable[..., object] | None = None) -> int:
    """`main` that raises what is wrong with all of the command line. `begin` stands in for `start`."""
    parser = get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign]
    arguments = parser.parse_intermixed_args(argv)
    if arguments.help:
        print(f"{__doc__}\n{listing()}")
        return 0
    flags = [word for word in argv if word not in arguments.overrides]
    if (folder := user_conf_folder()) and not arguments.config_dir:
        flags += ["--config-dir", str(folder.absolute())]

    # Names and budgets are checked before Hydra imports the plugins, and torch with them.
    chosen = check(arguments.overrides, sweep=arguments.multirun)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise what is wrong, for `main` to tell; Hydra's own report is many lines
    if not arguments.config_name and runs_local_models(chosen) and reads_local_data(chosen):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported, which reads it once

    overrides = list(arguments.overrides)
    if arguments.multirun and "tracker.group" not in chosen and not arguments.config_name:
        from kvbench.sweep import words  # which imports this module

        overrides += words({"tracker.group": _named(overrides)})
    tell = Told()

    def job(*configs: Node, **launcher: Any) -> None:  # a launcher gives all of a sweep, and how to run it
        if action:
            action(configs, tell)
        else:
            (begin or start)(configs, tell, **launcher)

    register()
    run = hydra.main(config_path=str(conf_folder().absolute()), config_name="config", version_base="1.3")(job)
    before = sys.argv
    # Hydra insists on a folder for a sweep's multirun.yaml, which tells nothing that the records' headers don't.
    with tempfile.TemporaryDirectory() as scratch:
        sys.argv = ["kvbench", f"hydra.sweep.dir='{scratch}'", *_of_swept_choices(overrides), *flags]
        try:
            run()
        finally:
            sys.argv = before
    return tell.code


def start(
    configs: Sequence[Node],
    tell: Tell,
    words: Sequence[Sequence[str]] = (),
    elsewhere: Callable[..., None] | None = None,
) -> list[Run]:
    """Turns composed configurations into cells, and runs them in groups that share every prefill; returns them.

    What is wrong with one of them is told, and the others go on. `elsewhere` runs groups in other processes, given
    the `words` of each of their cells.
    """
    runs: dict[int, Run] = {}
    for index, config in enumerate(configs):
        try:
            runs[index] = convert(config)
        except BAD_INPUT as error:
            tell(error)
    groups = shared_prefills(runs)
    if elsewhere:
        waiting = [group for group in groups if any(runs[i].settings.redo or _is_left(runs[i]) for i in group)]
        if waiting:
            elsewhere([[words[i] for i in group] for group in waiting], runs[waiting[0][0]].settings.results)
        for group in groups:
            folders = [runs[i].cell.folder(runs[i].settings.results) for i in group if _is(is_done, runs[i])]
            if folders:
                summary = print_solo if runs[group[0]].settings.measure == "solo" else print_summary
                summary(folders, len(waiting))
    else:
        from kvbench.loop import run_cells  # imports torch, as the methods did

        for group in groups:
            try:
                run_cells([runs[i].cell for i in group], runs[group[0]].settings, alone=len(configs) == 1)
            except BAD_INPUT as error:
                tell(error)
    asked = [runs[i] for group in groups for i in group]
    left = [run for run in asked if _is_left(run)]
    infeasible = [run for run in asked if _is(is_infeasible, run)]
    for found, what, kind in ((infeasible, "infeasible", NotFeasible), (left, "not done", NotDone)):
        if found and (elsewhere or len(configs) > 1):
            look = f"python -m kvbench.status results={found[0].settings.results}"
            tell(kind(f"{len(found)} of {len(asked)} cells are {what}: {look}"))
    return list(runs.values())


def _is_left(run: Run) -> bool:
    return not _is(is_done, run) and not _is(is_infeasible, run)


def _is(state: Callable[[Cell, Settings], bool], run: Run) -> bool:
    try:
        return state(run.cell, run.settings)
    except UsageError:  # a header of another version: told by who runs the cell
        return False


def shared_prefills(runs: Mapping[int, Run]) -> list[list[int]]:
    """The keys of runs that differ only in method and budget, together; the same cell once."""
    groups: dict[str, dict[str, int]] = {}
    for index, run in runs.items():
        same = {k: v for k, v in run.cell.identity().items() if k not in ("method", "budget")}
        key = json.dumps([same, run.cell.model.device, str(run.settings)], sort_keys=True)
        groups.setdefault(key, {}).setdefault(run.cell.digest, index)
    return [list(group.values()) for group in groups.values()]


def check(overrides: list[str], sweep: bool) -> dict[str, list[Any]]:
    """The values given to each option. Raises UsageError for what is wrong without a look into the plugins."""
    chosen: dict[str, list[Any]] = {}
    for override in _parse(overrides):
        key = override.key_or_group
        if override.is_hydra_override():
            continue
        known("option", key.split(".")[0].split("/")[0], [field.name for field in fields(RunConfig)])
        if override.is_sweep_override() and not sweep:
            raise UsageError(f"{override.input_line} gives several values: add -m to run each, or [..] if it is a list")
        chosen[key] = _values(override)
    for group in ("method", "task", "model"):
        for name in chosen.get(group, []):
            known(group, str(name), choices(f"{group}s"))
    for budget in chosen.get("budget", []):
        Budget.parse(budget)
    for name, kind in (("protocol", Protocol), ("measure", Measure)):
        for value in chosen.get(name, []):
            known(name, str(value), kind.__members__)
    return chosen


def _parse(overrides: list[str]) -> list[Override]:
    try:
        return OverridesParser.create().parse_overrides(overrides)
    except OverrideParseException as error:
        raise UsageError(
            f"can't read {error.override}: options are name=value, special characters in double quotes (name='\"a~b\"')"
        ) from error


def _of_swept_choices(overrides: list[str]) -> list[str]:
    """`method.decode=true` as a sweep of one value where `method=` is swept.

    Hydra composes once without what is swept, and would look for the option in the default method.
    """
    parsed = _parse(overrides)
    swept = {override.key_or_group for override in parsed if override.is_sweep_override()}
    found = []
    for line, override in zip(overrides, parsed, strict=True):
        group, dot, _ = override.key_or_group.partition(".")
        one = dot and group in swept and not override.is_sweep_override() and not override.is_delete()
        found.append(f"{override.key_or_group}=choice({line.partition('=')[2]})" if one else line)
    return found


def _named(overrides: list[str]) -> str | None:
    """A sweep by its own words, the same whenever it is continued: those that say what its cells are."""
    settings = ("results", "limit", "redo", "timed", "tracker")
    asked = [one for one in _parse(overrides) if not one.is_hydra_override()]
    text = " ".join(str(one.input_line) for one in asked if one.key_or_group.partition(".")[0] not in settings)
    return text.replace("$", "") or None  # `${...}` would be filled in


def _values(override: Override) -> list[Any]:
    """What an option is set to: several values in a sweep; none where only Hydra can tell (deletions, globs)."""
    if override.is_delete() or override.value_type in (ValueType.GLOB_CHOICE_SWEEP, ValueType.INTERVAL_SWEEP):
        return []
    values = override.sweep_iterator() if override.is_sweep_override() else [override.value()]
    return [value.text if isinstance(value, QuotedString) else value for value in values]


def runs_local_models(chosen: dict[str, list[Any]]) -> bool:
    """Are all models of this run on this machine, so that nothing needs the network?"""
    paths = chosen.get("model.path")
    if paths is None:
        settings: Any = OmegaConf.load(conf_folder() / "config.yaml")
        names = chosen.get("model") or [entry["model"] for entry in settings.defaults if "model" in entry]
        files: Any = {name: OmegaConf.load(file) for name, file in choices("models").items() if name in names}
        paths = [file.get("path") for file in files.values()]
    return all(str(path).startswith("embedded:") or Path(str(path)).exists() for path in paths)


def reads_local_data(chosen: dict[str, list[Any]]) -> bool:
    """Are the data of all tasks of this run on this machine, by nature or because `task.data` says so?"""
    data = [str(value) for value in chosen.get("task.data", [])]
    if data and not any(value.startswith("hub:") for value in data):
        return True
    names = filter(None, map(_plugin_of, chosen.get("task", [])))
    tasks: list[Any] = [plugins.load("tasks", name) for name in names]
    return not any(task.hub for task in tasks)


def _plugin_of(task: Any) -> str:
    """The task that a name stands for, itself or a preset of it; empty if a preset's file does not say."""
    file = choices("tasks")[str(task)]
    if file.suffix == ".py":
        return str(task)
    settings: Any = OmegaConf.load(file)
    bases = [base for base in settings.get("defaults", []) if base in plugins.files("tasks")]
    return bases[0] if bases else ""


def one_line(error: Exception) -> str:
    """What is wrong, and where, in one line."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(cause, ConfigKeyError | ConfigAttributeError) and is_dataclass(cause.object_type):
        key = str(cause.full_key)
        parent = key.rpartition(".")[0]
        names = [f"{parent}.{field.name}".lstrip(".") for field in fields(cause.object_type)]
        return f"unknown option '{key}'; known: {', '.join(names)}"
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    if isinstance(cause, OmegaConfBaseException):
        key = cause.full_key or ""
        return lines[0] if key in lines[0] else f"{key}: {lines[0]}"
    return " ".join(lines)


def _refuse(message: str) -> NoReturn:
    raise UsageError(f"{message}; see python -m kvbench.run --help")


if __name__ == "__main__":
    sys.exit(main())
