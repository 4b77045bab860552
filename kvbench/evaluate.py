"""The loop: context -> one prefill -> every cell: plan, pack -> every question: fork, answer, score -> one record.

Cells of one call share the model, the task, the protocol and the seed, and so every prefill; a record is the same
whether its cell is alone or in company.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

import torch

from kvbench import tracker
from kvbench.answer import FullAnswer, Unit, answers, ask_full, units
from kvbench.cache.packed import CompressedCache
from kvbench.cell import Cell, Settings
from kvbench.compress import Compressor
from kvbench.errors import UsageError
from kvbench.measure.clock import Stopwatch
from kvbench.measure.progress import progress
from kvbench.method import Method
from kvbench.model import Model, load_model
from kvbench.plan import Infeasible, keep_all
from kvbench.prefill import Reader, Seen, read_exactly
from kvbench.report.summary import print_summary
from kvbench.store import CellStore, is_done
from kvbench.task import Context


def run_cells(cells: Sequence[Cell], settings: Settings, alone: bool = True) -> None:
    """Brings the cells' records up to `settings.limit` examples and prints a summary.

    What can't be run raises UsageError and nothing is written, if the cell is `alone`. In a sweep it is marked
    (`infeasible` with the smallest plan's bytes, or `failed` with the reason), told on stderr, and the others go on.
    """
    results = settings.results
    missing = [cell for cell in cells if settings.redo or not is_done(cell, results, settings.limit)]
    if missing:
        model = load_model(missing[0].model)
        with torch.inference_mode(), ExitStack() as stack:
            runs = [_Run(cell, model, settings, stack, alone) for cell in missing]
            exhausted = _evaluate(runs, model, settings.limit)
            for run in runs:
                if not run.failed:
                    run.open().finish(exhausted)
        mode = settings.tracker_mode
        for run in runs:
            if not run.failed:
                mode = tracker.mirror(run.cell.folder(results), results, mode, settings.tracker_project)
    print_summary([folder for cell in cells if (folder := cell.folder(results)).exists()], new=len(missing))


@dataclass
class _Run:
    """A cell being evaluated. Its store is opened with its first record, so that a refused cell leaves no trace."""

    cell: Cell
    model: Model
    settings: Settings
    stack: ExitStack
    alone: bool
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
                "storage": "decoded",  # rows are kept decoded between steps; bytes are those of the packed store
                "hardware": {k: self.model.facts[k] for k in ("device", "torch_threads")},
            }
            opened = CellStore.open(self.cell, self.settings.results, about, self.settings.limit, self.settings.redo)
            self.store = self.stack.enter_context(opened)
        return self.store

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


def _evaluate(runs: Sequence[_Run], model: Model, limit: int | None) -> bool:
    """Runs every example that some cell lacks. Returns whether the task had no more of them."""
    cell = runs[0].cell
    done = 0
    with progress() as bar:
        job = bar.add_task(f"{len(runs)} cells" if len(runs) > 1 else cell.label, total=limit)
        for context in cell.task.contexts(model.writer, cell.seed):
            if limit is not None and done >= limit:
                return False
            examples = context.examples if limit is None else context.examples[: limit - done]
            for unit in units(context, examples, cell.protocol, model):
                lacking = [run for run in runs if _lacks(run, unit)]
                if lacking:
                    _evaluate_unit(lacking, model, context, unit)
                bar.advance(job, len(unit.turns))
            done += len(examples)
            if len(examples) < len(context.examples):
                return False  # cut within a context, which may be the last one
    return True


def _lacks(run: _Run, unit: Unit) -> bool:
    """Whether a cell still needs a unit. A folder that is there is opened at once, a new one with its first record."""
    settings = run.settings
    if run.store is None and not run.failed and not settings.redo and run.cell.folder(settings.results).exists():
        try:
            run.open()
        except UsageError as error:  # another process's, or begun with other weights or data
            run.fail(error)
    done = run.store.done if run.store else set()
    return not run.failed and any(turn.example.id not in done for turn in unit.turns)


def _evaluate_unit(runs: Sequence[_Run], model: Model, context: Context, unit: Unit) -> None:
    """One compressed context: prefill once, then every cell and every question."""
    network = model.network
    tokens = torch.tensor(unit.ids, device=network.device)
    watch = Stopwatch(network.device)
    with watch:
        needs = {need for run in runs for need in run.method.needs}
        seen = read_exactly(network, tokens, needs, unit.id, model.config.prefill_chunk)
    prefill = watch.seconds - sum(seen.seconds.values())
    asked = ask_full(model, CompressedCache.pack(keep_all(seen), seen), unit)
    for run in runs:
        try:
            _evaluate_cell(run, model, context, unit, seen, prefill, asked)
        except Exception as error:
            run.fail(error)


def _evaluate_cell(
    run: _Run,
    model: Model,
    context: Context,
    unit: Unit,
    seen: Seen,
    prefill: float,
    asked: Mapping[str, FullAnswer],
) -> None:
    """One cell's part of a unit: compress, ask, append the records."""
    if run.method.own_prefill:
        watch = Stopwatch(model.network.device)
        with watch:
            seen = run.method.read(Reader(model.network, seen.token_ids, run.method.needs, unit.id))
        prefill = watch.seconds - sum(seen.seconds.values())
    cache, facts = run.compressor.compress(seen)
    store = run.open()
    for example, answered in answers(model, cache, run.cell, unit, asked, store.done):
        feed_s = answered.pop("feed_s")
        ids = {"id": example.id, "context_id": context.id, "cluster_id": context.cluster_id}
        times = {"prefill_s": prefill, "ttft_s": prefill + facts["compress_s"] + feed_s}
        store.append(ids | answered | facts | times | {"info": example.info})
