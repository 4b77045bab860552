"""Run a study: all cells that a file in conf/experiment/ lists.

  python -m kvbench.experiment vector_vs_base                       all of it; the same command continues a stopped run
  python -m kvbench.experiment vector_vs_base --jobs 2              groups of cells side by side, in two processes
  python -m kvbench.experiment vector_vs_base limit=2 results=/tmp/try     with options of kvbench.run over the file's
  python -m kvbench.experiment vector_vs_base --list                what it would run, a line per cell

A file is options, as `python -m kvbench.run` knows them, and `cells:` of the same form below them; what is deeper wins.
A list means each of its values (a value that is a list stands in a list of its own). Cells that differ only in method
and budget share every prefill. With `model.device=auto` each process has a GPU of its own where there are several; more
processes than GPUs share them. Exit code: as kvbench.run's.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from kvbench.list import conf_folder, describe
from kvbench.measure.progress import Progress
from kvbench.plugins import known
from kvbench.run import Told, check, guarded, start
from kvbench.side_by_side import Group, free_devices, side_by_side
from kvbench.sweep import composed_words, words


def experiments() -> dict[str, Path]:
    """Name -> file."""
    return {file.stem: file for file in sorted(conf_folder().joinpath("experiment").glob("*.yaml"))}


def options_of(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The options of every cell below a node of such a file."""
    lists = {name: value if isinstance(value, list) else [value] for name, value in node.items() if name != "cells"}
    for values in itertools.product(*lists.values()):
        here = {name: tuple(x) if isinstance(x, list) else x for name, x in zip(lists, values, strict=True)}
        if "cells" not in node:
            yield here
        for cell in node.get("cells", []):
            for inner in options_of(cell):
                yield here | inner


def read(name: str, overrides: Sequence[str] = ()) -> list[list[str]]:
    """The words of every cell of a study, as the command line takes them; `overrides` come last."""
    node: Any = OmegaConf.to_container(OmegaConf.load(experiments()[known("experiment", name, experiments())]))
    check(list(overrides), sweep=False)
    return [[*words({"tracker.group": name} | options), *overrides] for options in options_of(node)]


def workers(jobs: int | None, devices: Sequence[str]) -> list[dict[str, str]]:
    """What each of `jobs` processes side by side (None: one on each GPU) finds in its environment."""
    jobs = jobs or len(devices) or 1
    found = [{"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))} for _ in range(jobs)]
    for worker, device in zip(found, itertools.cycle(devices)):  # not strict: a cycle has no end
        worker["CUDA_VISIBLE_DEVICES"] = device
    return found


def run(name: str, overrides: Sequence[str], jobs: int | None = None) -> int:
    """Runs what is missing of a study; returns the exit code."""
    tell = Told()
    cells = read(name, overrides)
    configs = []
    with Progress(f"composing {len(cells)} cells", len(cells)) as bar:
        for cell in cells:
            configs.append(composed_words(cell))
            bar.advance()
    several = workers(jobs, free_devices(configs))

    def elsewhere(groups: Sequence[Group], results: Path) -> None:
        side_by_side(groups, several)

    start(configs, tell, cells, elsewhere if len(several) > 1 else None)
    return tell.code


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS
    )
    parser.add_argument(
        "name", choices=experiments(), help="; ".join(f"{k}: {describe(v)}" for k, v in experiments().items())
    )
    parser.add_argument("options", nargs="*", help="of kvbench.run: name=value")
    parser.add_argument("--jobs", type=int, help="processes side by side (default: one on each GPU; without any, one)")
    parser.add_argument("--list", action="store_true", help="print the cells, run nothing")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.list:
        return guarded(lambda: print(*map(" ".join, read(arguments.name, arguments.options)), sep="\n") or 0)
    return guarded(lambda: run(arguments.name, arguments.options, arguments.jobs))


if __name__ == "__main__":
    sys.exit(main())
