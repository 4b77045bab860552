"""Seconds and peak memory of cells, each measured alone: a short pass after all answers are there.

A prefill is the same work for every cell that asks for the same statistics, so it is read, and timed, once for them; an
own prefill is its cell's alone. Nothing of another cell is alive while a cell compresses and decodes. The first example
goes twice, the first time to warm up. Decoding is of a fixed length and in a batch of one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from kvbench.answer import Unit, units
from kvbench.cache.fork import Fork
from kvbench.cache.hf import Network
from kvbench.cell import Settings
from kvbench.cell_run import CellRun
from kvbench.decode import feed
from kvbench.measure.clock import Stopwatch
from kvbench.measure.energy import Energy
from kvbench.measure.memory import Peak
from kvbench.measure.progress import Progress
from kvbench.model import Model
from kvbench.prefill import Seen, read_exactly

STEPS = 16  # tokens decoded for a measurement


def time_alone(runs: Sequence[CellRun], model: Model, settings: Settings) -> None:
    """Times the first `settings.timed` examples of each cell (first questions only), where it lacks them."""
    cell = runs[0].cell
    found = (
        unit
        for context in cell.task.contexts(model.writer, cell.seed)
        for unit in units(context, [x for x in context.examples if x.follows is None], cell.protocol, model)
    )
    most = settings.timed if settings.limit is None else min(settings.timed, settings.limit)
    if not any(run.untimed(most) for run in runs):
        return
    with Progress("timing, each cell alone", most * len(runs)) as bar:
        for number, unit in enumerate(islice(found, most)):
            groups: dict[Any, list[CellRun]] = {}
            for run in runs:
                if not run.failed and unit.turns[0].example.id not in run.open().timed:
                    reads = run.cell.digest if run.method.own_prefill else run.method.needs
                    groups.setdefault(reads, []).append(run)
            for group in groups.values():
                for _ in range(2 if number == 0 else 1):
                    read = _read(group[0], model, unit)
                for run in group:
                    bar.say(run.cell.label)
                    try:
                        for _ in range(2 if number == 0 else 1):
                            record = _measure(run, model, unit, read)
                        run.open().append_timing(record)
                    except Exception as error:
                        run.fail(error)
                    bar.advance()


@dataclass(frozen=True)
class _Read:
    """A context that was read exactly, and what that took."""

    seen: Seen
    seconds: float  # statistics left out
    peak: int | None
    joules: float | None


def _read(run: CellRun, model: Model, unit: Unit) -> _Read | None:
    """None where compressing will read too."""
    if run.method.own_prefill:
        return None
    network = model.network
    ids = torch.tensor(unit.ids, device=network.device)
    watch, peak, energy = Stopwatch(*network.devices), Peak(*network.devices), Energy(*network.devices)
    with peak, energy, watch:
        seen = read_exactly(network, ids, run.method.needs, unit.id, model.config.prefill_chunk)
    return _Read(seen, watch.seconds - sum(seen.seconds.values()), peak.nbytes, energy.joules)


def _measure(run: CellRun, model: Model, unit: Unit, read: _Read | None) -> dict[str, Any]:
    """A timing record: the names are those of docs/metrics.md."""
    network, turn = model.network, unit.turns[0]
    ids, fed = (torch.tensor(x, device=network.device) for x in (unit.ids, [turn.fed]))
    packing, peak, energy = Peak(*network.devices), Peak(*network.devices), Energy(*network.devices)
    compressing, feeding = Stopwatch(*network.devices), Stopwatch(*network.devices)
    steps: list[float] = []
    with energy:
        with packing, compressing:
            cache = run.compressor.compress(read.seen if read else run.compressor.reader(ids, unit.id))
        with peak:
            with feeding:
                fork = Fork(cache, run.method)
                last = feed(network, [fork], fed, last_only=True)[:, -1].argmax(-1, keepdim=True)
            for _ in range(STEPS):
                step = Stopwatch(*network.devices)
                with step:
                    last = feed(network, [fork], last, last_only=True)[:, -1].argmax(-1, keepdim=True)
                steps.append(step.seconds)
    statistics = sum(read.seen.seconds[need] for need in run.method.needs) if read else 0.0
    prefill, compress = (read.seconds, compressing.seconds) if read else (compressing.seconds, 0.0)
    peaks = [x for x in (read.peak if read else None, packing.nbytes, peak.nbytes) if x is not None]
    joules = [x for x in (read.joules if read else 0.0, energy.joules) if x is not None]
    first_token = prefill + statistics + compress + feeding.seconds
    return {
        "id": turn.example.id,
        "prefill_s": prefill,
        "statistics_s": statistics,
        "compress_s": compress,
        "ttft_s": first_token,
        "tpot_s": median(steps),
        "tpot_p95_s": quantiles(steps, n=20, method="inclusive")[-1],
        "total_s": first_token + sum(steps),
        "bytes_peak": max(peaks, default=None),
        "bytes_compress_peak": packing.grown,
        "joules": sum(joules) if len(joules) == 2 else None,
        **_joules_per_token(network, fork, last),
    }


def _joules_per_token(network: Network, fork: Fork, last: Tensor) -> dict[str, Any]:
    """Of decoding on for a second, which the GPU's counter needs; nothing is decoded where there is none."""
    energy = Energy(*network.devices)
    with energy:
        pass
    if energy.joules is None:
        return {"joules_token": None, "joules_note": energy.why}
    start, tokens = time.perf_counter(), 0
    with energy:
        while time.perf_counter() - start < 1:
            last = feed(network, [fork], last, last_only=True)[:, -1].argmax(-1, keepdim=True)
            tokens += 1
    assert energy.joules is not None
    return {
        "joules_token": energy.joules / tokens,
        "joules_note": f"NVML, the whole board, {tokens} tokens, batch of 1",
    }
