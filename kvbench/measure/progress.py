"""The one progress bar: what is going on, how far, how long still."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

LOG_SECONDS = 60  # between the lines that a log file gets


class Progress:
    """A moving bar on a terminal's standard error; in a log file a line a minute, none for what takes less."""

    def __init__(self, what: str, total: int | None) -> None:
        self.what, self.total, self.done, self.skipped = what, total, 0, 0
        self.console = Console(stderr=True, soft_wrap=True)
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
        columns += [TextColumn("ETA"), TimeRemainingColumn(), TextColumn("[dim]{task.fields[doing]}")]
        self.bar = Bar(*columns, console=self.console, disable=not self.console.is_terminal)
        self.job = self.bar.add_task(what, total=total, doing="")

    def __enter__(self) -> Progress:
        self.bar.start()
        self.started = self.logged = time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.bar.stop()

    def say(self, doing: str) -> None:
        """What is being done inside the present step."""
        self.bar.update(self.job, doing=doing)

    def skip(self, steps: int) -> None:
        """Steps that an earlier run has done: they are no measure of how fast this one is."""
        self.skipped += steps
        left = None if self.total is None else self.total - self.skipped
        self.bar.update(self.job, total=left, description=f"{self.what}, {self.skipped} done before")

    def advance(self, steps: int = 1) -> None:
        self.done += steps
        self.bar.advance(self.job, steps)
        now = time.monotonic()
        if self.bar.disable and now - self.logged > LOG_SECONDS:
            self.logged = now
            of, left = "", ""
            if self.total:
                of = f" of {self.total}"
                missing = self.total - self.skipped - self.done
                left = f", {_minutes((now - self.started) * missing / self.done)} left"
            line = f"{self.what}: {self.skipped + self.done}{of}, {_minutes(now - self.started)} so far{left}"
            self.console.print(line, markup=False, highlight=False)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 60 else f"{seconds:.0f} s"
