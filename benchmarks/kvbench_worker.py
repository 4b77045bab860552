"""kvbench's side: runs command lines of `python -m kvbench.run` in one process and times each context of each.

    python benchmarks/kvbench_worker.py job.json rows.jsonl

The job is a list of command lines, each a list of words. A row has `contexts`, the seconds from a context being handed
out to the next one being asked for (everything done for it, of all cells; loading and drawing the context left out),
`cpu`, the same of the processor's time, and `wall_s`, the seconds of the whole command.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvbench import plugins
from kvbench.run import main as run


def watch(task: type, notes: list[tuple[float, float]]) -> None:
    """From now on `task.contexts` notes what each context takes: seconds of the clock, and of the processor."""
    contexts: Any = task.contexts  # type: ignore[attr-defined]

    def watched(self: Any, writer: Any, seed: int) -> Iterator[Any]:
        for context in contexts(self, writer, seed):
            start = time.perf_counter(), time.process_time()
            try:
                yield context
            finally:  # also if no further context is asked for
                notes.append((time.perf_counter() - start[0], time.process_time() - start[1]))

    task.contexts = watched  # type: ignore[attr-defined]


def main(job_file: str, rows_file: str) -> None:
    notes: list[tuple[float, float]] = []
    watch(plugins.load("tasks", "niah"), notes)
    with open(rows_file, "w") as rows:
        for line in json.loads(Path(job_file).read_text()):
            notes.clear()
            start = time.perf_counter()
            if code := run(line):
                sys.exit(code)
            wall = time.perf_counter() - start
            limit = next(int(word.removeprefix("limit=")) for word in line if word.startswith("limit="))
            # A run asks for one context more than its limit, and does nothing with it.
            seconds, cpu = zip(*notes[:limit], strict=True)
            print(json.dumps({"contexts": seconds, "cpu": cpu, "wall_s": wall}), file=rows, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
