"""A group of a sweep (cells that share every prefill) in a process of its own, each cell given by its options.

    python -m kvbench.group '["method=full", "limit=4"]' '["method=snapkv", "budget=0.1", "limit=4"]'

Launchers start this on a device, or hand it to SLURM; all that comes back are the cells' records.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvbench.config import Node, convert
from kvbench.run import compose, guarded

Words = Sequence[str]


def run_group(jobs: Sequence[Words]) -> int:
    """Runs the cells; returns the exit code. A cell that can't be run is marked, as in any sweep."""

    def run() -> int:
        configs: list[Node] = []
        for words in jobs:
            compose(list(words), lambda found, tell: configs.extend(found))
        runs = [convert(config) for config in configs]
        from kvbench.loop import run_cells  # imports torch, as the methods did

        run_cells([run.cell for run in runs], runs[0].settings, alone=False)
        return 0

    return guarded(run)


@dataclass(frozen=True)
class Group:
    """`run_group` as submitit wants it: what it pickles, calls, and submits again when the job is told to make room."""

    jobs: Sequence[Words]

    def __call__(self) -> None:
        room = signal.getsignal(signal.SIGUSR2)  # submitit's: requeues and exits, or raises when that is enough

        def make_room(number: int, frame: Any) -> None:
            try:
                assert callable(room)
                room(number, frame)
            except Exception as error:  # as an Exception it would be taken for the cell's own failure
                raise SystemExit(f"kvbench: {error}") from error

        signal.signal(signal.SIGUSR2, make_room)
        if code := run_group(self.jobs):
            sys.exit(code)

    def checkpoint(self) -> Any:
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)  # the records say where to go on


if __name__ == "__main__":
    sys.exit(run_group([json.loads(words) for words in sys.argv[1:]]))
