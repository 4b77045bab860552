"""How far cells are.

  python -m kvbench.status                                        every cell below results/
  python -m kvbench.status results=elsewhere                      every cell in another folder
  python -m kvbench.status -m method=full,snapkv budget=0.1,0.25  what a sweep asks for: the words of its command

Per cell: its state, the examples that are recorded and asked for, its folder, and why it has ended or what to do.

  done         nothing is left to do
  running      a process is at it
  interrupted  begun, and nobody is at it: the same command continues
  missing      not begun, or done with less than is asked for: the same command adds it
  failed       ended with an error; the same command tries again
  infeasible   the budget is below the method's smallest plan: nothing is left to do, either

Exit code: 0 nothing is left to do, 1 something is, 2 bad input. `hydra/launcher` and its options make no difference.
"""

from __future__ import annotations

import fcntl
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvbench import run
from kvbench.config import Node, Run, convert
from kvbench.errors import UsageError
from kvbench.store import HEADER, cells, is_done, read_cell


@dataclass(frozen=True)
class Status:
    """One line of the table."""

    state: str
    examples: int
    limit: int | None  # examples asked for; None: all the task has
    folder: Path  # below the results folder
    reason: str = ""


def asked(one: Run) -> Status:
    """The state of a cell that a command asks for."""
    results, limit = one.settings.results, one.settings.limit
    folder = one.cell.folder(results)
    if one.settings.measure == "solo":
        there = is_done(one.cell, one.settings)
        return Status("done" if there else "missing", int(there), 1, folder.relative_to(results))
    if not (folder / HEADER).exists():
        return Status("missing", 0, limit, folder.relative_to(results))
    found = recorded(folder, results, limit)
    if found.state == "done" and not is_done(one.cell, one.settings):
        return Status("missing", found.examples, limit, found.folder, "done with less than is asked for")
    return found


def recorded(folder: Path, results: Path, limit: int | None) -> Status:
    """The state of a cell by its own folder."""
    header, records = read_cell(folder)
    state = header["status"]
    if state == "running" and not is_held(folder):
        state = "interrupted"
    if state == "done" and header["exhausted"]:
        limit = len(records)  # the task has no more of them
    return Status(state, len(records), limit, folder.relative_to(results), header.get("reason", ""))


def is_held(folder: Path) -> bool:
    """Whether a process is writing to a cell."""
    try:
        lock = os.open(folder / ".lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def in_folder(results: Path) -> list[Status]:
    """All cells of a results folder, against the examples that their last run was to make."""
    found = list(cells(results))
    if not found:
        raise UsageError(f"there is no cell in {results}")
    return [recorded(folder, results, read_cell(folder)[0]["segments"][-1]["limit"]) for folder in found]


def show(found: Sequence[Status]) -> None:
    """One line per cell, the state first, and the sums."""
    width = max(len(str(status.folder)) for status in found)
    for status in found:
        examples = f"{status.examples}/{'all' if status.limit is None else status.limit}"
        print(f"{status.state:<11}  {examples:>9}  {status.folder!s:<{width}}  {status.reason}".rstrip())
    counts = Counter(status.state for status in found)
    print(f"{len(found)} cells: {', '.join(f'{number} {state}' for state, number in counts.most_common())}")


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    words = [word for word in words if not re.match(r"[+~]*hydra[./]launcher\b", word)]
    found: dict[Path, Status] = {}  # the full cache is one cell whatever its budget

    def look(configs: Iterable[Node], tell: run.Tell) -> None:
        for config in configs:
            try:
                one = convert(config)
                found[one.cell.folder(one.settings.results)] = asked(one)
            except run.BAD_INPUT as error:
                tell(error)

    def folder() -> int:
        (results,) = run.check(words, sweep=False).get("results", ["results"])
        found.update({status.folder: status for status in in_folder(Path(str(results)).expanduser())})
        return 0

    listing = all(word.startswith("results=") for word in words)
    code = run.guarded(folder) if listing else run.main(words, look)
    if found:
        show(list(found.values()))
    return code or int(any(status.state not in ("done", "infeasible") for status in found.values()))


if __name__ == "__main__":
    sys.exit(main())
