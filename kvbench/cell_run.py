"""A cell while it is being evaluated: its compressor, its store, and what becomes of it when something fails."""

from __future__ import annotations

import sys
import traceback
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

from kvbench.answer import Unit
from kvbench.cell import Cell, Settings
from kvbench.compressor import Compressor
from kvbench.errors import UsageError
from kvbench.method import Method
from kvbench.model import Model
from kvbench.plan import Infeasible
from kvbench.store import CellStore


@dataclass
class CellRun:
    """Its store is opened with its first record, so that a refused cell leaves no trace."""

    cell: Cell
    model: Model
    settings: Settings
    stack: ExitStack
    alone: bool  # no other cell is asked for: an error is the user's to see
    store: CellStore | None = None
    failed: bool = False
    compressor: Compressor = field(init=False)

    def __post_init__(self) -> None:
        self.compressor = Compressor(self.cell, self.model)

    @property
    def method(self) -> Method:
        return self.cell.method

    def open(self) -> CellStore:
        if self.store is None:
            about = {
                "model": {k: v for k, v in self.model.facts.items() if k not in ("device", "torch_threads")},
                "data": self.cell.task.data_hash(),
                "artefacts": sorted(artefact.digest for artefact in self.compressor.artefacts.values()),
                "decoding": f"{self.model.rows} rows",  # the height of the batches in which answers were decoded
                "storage": "decoded",  # rows are kept decoded between steps; bytes are those of the packed store
                "hardware": {k: self.model.facts[k] for k in ("device", "torch_threads")},
            }
            settings = self.settings
            opened = CellStore.open(self.cell, settings.results, about, settings.limit, settings.redo)
            self.store = self.stack.enter_context(opened)
        return self.store

    def lacks(self, unit: Unit) -> bool:
        """Whether the cell still needs a unit. A folder that is there is opened at once."""
        there = not self.settings.redo and self.cell.folder(self.settings.results).exists()
        if there and self.store is None and not self.failed:
            try:
                self.open()
            except UsageError as error:  # another process's, or begun with other weights or data
                self.fail(error)
        done = self.store.done if self.store else set()
        return not self.failed and any(turn.example.id not in done for turn in unit.turns)

    def untimed(self, examples: int) -> bool:
        return not self.failed and len(self.open().timed) < examples

    def fail(self, error: Exception) -> None:
        """Takes the cell out of the run and says why, here and in its header; alone, the error is the user's to see."""
        if self.alone:
            raise error
        self.failed = True
        reason = str(error)
        if not isinstance(error, UsageError):  # a defect, or no memory
            traceback.print_exception(error)
            reason = f"{self.cell.label} at budget={self.cell.budget}: {type(error).__name__}: {error}"
        print(f"kvbench: {reason}", file=sys.stderr)
        with suppress(UsageError):  # a folder that can't be written to, or is another process's, stays as it is
            self.open().fail(reason, "infeasible" if isinstance(error, Infeasible) else "failed")
