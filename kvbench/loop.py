"""The loop: context -> one prefill -> every cell: plan, pack -> every question: fork, answer, score -> one record.

Cells of one call share the model, the task, the protocol and the seed, and so every prefill; a record is the same
whether its cell is alone or in company. Seconds are measured afterwards, each cell alone (`kvbench.timing`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvbench import tracker
from kvbench.answer import Asked, FullAnswer, Unit, answers, ask_full, units
from kvbench.cache.packed import CompressedCache
from kvbench.cell import Cell, Settings
from kvbench.cell_run import CellRun
from kvbench.measure.progress import Progress
from kvbench.measure.solo import measure_solo
from kvbench.model import Model, load_model
from kvbench.plan import keep_all
from kvbench.prefill import Seen, read_exactly
from kvbench.report.solo import print_solo
from kvbench.report.summary import print_summary
from kvbench.store import is_done, is_infeasible
from kvbench.task import Context
from kvbench.timing import time_alone


def run_cells(cells: Sequence[Cell], settings: Settings, alone: bool = True) -> None:
    """Brings the cells' records up to `settings.limit` examples, or measures them solo, and prints a summary.

    What can't be run raises UsageError and nothing is written, if the cell is `alone`. In a sweep it is marked
    (`infeasible` with the smallest plan's bytes, or `failed` with the reason), told on stderr, and the others go on;
    what is marked infeasible is not tried again.
    """
    missing = [cell for cell in cells if settings.redo or not is_done(cell, settings)]
    if not (alone or settings.redo):
        missing = [cell for cell in missing if not is_infeasible(cell, settings)]
    if settings.measure == "solo":
        if missing:
            measure_solo(missing, load_model(missing[0].model), settings, alone)
        return print_solo([cell.folder(settings.results) for cell in cells if is_done(cell, settings)], len(missing))
    if missing:
        model = load_model(missing[0].model)
        task = missing[0].task  # the cells' tasks are equal: one of them draws the contexts and scores for all
        with torch.inference_mode(), ExitStack() as stack:
            runs = [CellRun(replace(cell, task=task), model, settings, stack, alone) for cell in missing]
            exhausted = _evaluate(runs, model, settings.limit)
            time_alone(runs, model, settings)
            for run in runs:
                if not run.failed:
                    run.open().finish(exhausted, settings.timed)
        mode, project, group = settings.tracker_mode, settings.tracker_project, settings.tracker_group
        for run in runs:
            if not run.failed:
                mode = tracker.mirror(run.cell.folder(settings.results), settings.results, mode, project, group)
    folders = [cell.folder(settings.results) for cell in cells]
    print_summary([folder for folder in folders if folder.exists()], new=len(missing))


def _evaluate(runs: Sequence[CellRun], model: Model, limit: int | None) -> bool:
    """Runs every example that some cell lacks. Returns whether the task had no more of them."""
    cell = runs[0].cell
    done = 0
    with Progress(f"{len(runs)} cells" if len(runs) > 1 else cell.label, limit) as bar:
        for context in cell.task.contexts(model.writer, cell.seed):
            if limit is not None and done >= limit:
                return False
            examples = context.examples if limit is None else context.examples[: limit - done]
            for unit in units(context, examples, cell.protocol, model):
                lacking = [run for run in runs if run.lacks(unit)]
                if lacking:
                    _evaluate_unit(lacking, model, context, unit, bar)
                    bar.advance(len(unit.turns))
                else:
                    bar.skip(len(unit.turns))
            done += len(examples)
            if len(examples) < len(context.examples):
                return False  # cut within a context, which may be the last one
    return True


def _evaluate_unit(runs: Sequence[CellRun], model: Model, context: Context, unit: Unit, bar: Progress) -> None:
    """One compressed context: prefill once, then every cell and every question."""
    network = model.network
    bar.say("reading")
    needs = {need for run in runs for need in run.method.needs}
    tokens = torch.tensor(unit.ids, device=network.device)
    seen = read_exactly(network, tokens, needs, unit.id, model.config.prefill_chunk)
    full = ask_full(model, CompressedCache.pack(keep_all(seen), seen), unit)
    room = _room(network.devices)
    company: list[_Compressed] = []
    for run in sorted(runs, key=lambda run: run.method.one_by_one):  # those that advance together, side by side
        bar.say(run.cell.label)
        try:
            company.append(_compress(run, seen))
        except Exception as error:
            run.fail(error)
        # Beside each packed cache there is its decoded copy and, up to twice its size in the layers' dtype, that of the
        # fork that answers and, where tokens go one by one, that of one that looks at a continuation.
        held = sum(one.facts["tokens_kept"] * network.row_bytes() for one in company)
        if len(company) == model.rows or 6 * held > room:
            _answer(company, model, context, unit, full)
            company = []
    _answer(company, model, context, unit, full)


@dataclass(frozen=True)
class _Compressed:
    """A cell's compressed context, on its way to the questions."""

    run: CellRun
    asked: Asked
    facts: dict[str, Any]  # of the record


def _compress(run: CellRun, seen: Seen) -> _Compressed:
    own = run.method.own_prefill
    context = run.compressor.reader(seen.token_ids, seen.context_id) if own else seen
    cache = run.compressor.compress(context)
    return _Compressed(run, Asked(run.cell, cache, run.open().done), run.compressor.describe(context, cache))


def _answer(
    company: Sequence[_Compressed], model: Model, context: Context, unit: Unit, full: Mapping[str, FullAnswer]
) -> None:
    """Asks the cells' caches together, and appends the records. What fails together is tried one by one."""
    try:
        for i, example, answered in answers(model, [one.asked for one in company], unit, full):
            one = company[i]
            ids = {"id": example.id, "context_id": context.id, "cluster_id": context.cluster_id}
            one.run.open().append(ids | answered | one.facts | {"info": example.info})
    except Exception as error:
        if len(company) == 1:
            company[0].run.fail(error)
        else:
            for one in company:
                _answer([one], model, context, unit, full)


def _room(devices: Sequence[torch.device]) -> int:
    """Bytes that compressed contexts waiting for the same question may take: half of what is free."""
    if all(device.type == "cuda" for device in devices):
        return len(devices) * min(torch.cuda.mem_get_info(device)[0] for device in devices) // 2
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
