"""`measure=solo`: what a cell's cache costs a decoding step beside the full cache, in one process, in turn.

Three forks decode after the same context: the cell's cache on the fast path (attention over the tiers as they are
stored), the full cache as stock attention reads exact rows, and no context at all. A cache's own time is a step over it
less a step over nothing. Whatever slows the machine down slows all three.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from kvbench import provenance
from kvbench.answer import Unit, units
from kvbench.cache.fork import Fork, acts_in_time
from kvbench.cache.hf import Network
from kvbench.cache.packed import CompressedCache
from kvbench.cell import Cell, Settings
from kvbench.compressor import Compressor
from kvbench.decode import feed
from kvbench.errors import UsageError
from kvbench.measure.clock import Stopwatch
from kvbench.measure.progress import Progress
from kvbench.method import Method
from kvbench.model import Model
from kvbench.plan import keep_all
from kvbench.prefill import Seen, read_exactly
from kvbench.store import write_solo

WARM, STEPS = 8, 48  # decoding steps of each cache before those that count, and those
WARM_TOKENS = 256  # read before a prefill is timed
DRAWS = 10_000  # of the bootstrap


def measure_solo(cells: Sequence[Cell], model: Model, settings: Settings, alone: bool = True) -> None:
    """Measures cells, one after the other, on the first context of their task and its first question.

    What can't be measured raises if the cell is `alone`; in a sweep it is told on stderr, and the others go on.
    """
    unit, about = _first_unit(cells[0], model), _about(model)
    with torch.inference_mode(), _pinned(model.network.device) as cpus, Progress("measuring solo", len(cells)) as bar:
        for cell in cells:
            bar.say(cell.label)
            try:
                found = _measure(cell, model, unit)
                write_solo(cell, settings.results, about | {"cpus": cpus} | found)
            except Exception as error:
                if alone:
                    raise
                reason = str(error)
                if not isinstance(error, UsageError):  # a defect, or no memory
                    traceback.print_exception(error)
                    reason = f"{cell.label} at budget={cell.budget}: {type(error).__name__}: {error}"
                print(f"kvbench: {reason}", file=sys.stderr)
            bar.advance()


def _first_unit(cell: Cell, model: Model) -> Unit:
    for context in cell.task.contexts(model.writer, cell.seed):
        for unit in units(context, context.examples[:1], cell.protocol, model):
            if len(unit.ids) + len(unit.turns[0].fed) + WARM + STEPS > model.network.max_positions:
                raise UsageError(f"{WARM + STEPS} steps do not fit behind {unit.id}: choose a shorter context")
            return unit
    raise UsageError("the task has no context to measure on")


def _about(model: Model) -> dict[str, Any]:
    segment = provenance.segment()
    segment["hardware"] |= {"device": model.facts["device"]}
    return {"process": segment, "threads": torch.get_num_threads(), "steps": STEPS, "warm": WARM}


@contextmanager
def _pinned(device: torch.device) -> Iterator[list[int] | None]:
    """Meanwhile all threads of this process stay on as many CPUs as torch has threads; None: where that can't be."""
    if device.type != "cpu" or not hasattr(os, "sched_setaffinity"):
        yield None
        return
    before = os.sched_getaffinity(0)
    cpus = sorted(before)[-torch.get_num_threads() :]  # the last: interrupts go to the first
    _pin(cpus)
    try:
        yield cpus
    finally:
        _pin(before)


def _pin(cpus: Sequence[int] | set[int]) -> None:
    for task in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(task.name), cpus)


@dataclass(frozen=True)
class _Made:
    """A cell's compressed context, what it was made from, and the seconds that took."""

    cache: CompressedCache
    seen: Seen
    prefill: float
    statistics: float
    compress: float


def _measure(cell: Cell, model: Model, unit: Unit) -> dict[str, Any]:
    """The names are those of docs/metrics.md."""
    network, device, method = model.network, model.network.device, cell.method
    made = _make(cell, model, unit)
    full = CompressedCache.pack(keep_all(made.seen), made.seen)
    in_time = acts_in_time(method)
    fed = torch.tensor([unit.turns[0].fed], device=device)

    feeding = Stopwatch(*network.devices)
    with feeding:
        mine = Fork(made.cache, method, tiered=not in_time)
        last = {"cell": _next(network, mine, fed)}
    forks = {"cell": mine, "full": Fork(full, Method()), "empty": Fork(_without_rows(full), Method())}
    last |= {name: _next(network, forks[name], fed) for name in ("full", "empty")}

    times: dict[str, list[float]] = {name: [] for name in forks}
    names = list(forks)
    for i in range(WARM + STEPS):
        for name in names[i % 3 :] + names[: i % 3]:
            watch = Stopwatch(*network.devices)
            with watch:
                last[name] = _next(network, forks[name], last[name])
            if i >= WARM:
                times[name].append(watch.seconds)
    return {
        "path": "decoded" if in_time else "tiered",
        "tokens_context": len(unit.ids),
        "tokens_fed": fed.shape[1],
        **own_times(times["cell"], times["full"], times["empty"]),
        "prefill_s": made.prefill,
        "statistics_s": made.statistics,
        "compress_s": made.compress,
        "ttft_s": made.prefill + made.statistics + made.compress + feeding.seconds,
        "tpot_s": median(times["cell"]),
        "tpot_p95_s": quantiles(times["cell"], n=20, method="inclusive")[-1],
        "tpot_full_s": median(times["full"]),
        "tpot_empty_s": median(times["empty"]),
        "bytes_held": made.cache.nbytes,
        "bytes_full": full.nbytes,
        "bytes_working": mine.working_bytes,
        "bytes_working_full": forks["full"].working_bytes,
    }


def _make(cell: Cell, model: Model, unit: Unit) -> _Made:
    """Reads, and compresses twice, the first time to warm up."""
    network, method = model.network, cell.method
    ids = torch.tensor(unit.ids, device=network.device)
    compressor = Compressor(cell, model)
    read_exactly(network, ids[:WARM_TOKENS])
    needs = frozenset() if method.own_prefill else method.needs
    reading = Stopwatch(*network.devices)
    with reading:
        seen = read_exactly(network, ids, needs, unit.id, model.config.prefill_chunk)
    for _ in range(2):
        compressing = Stopwatch(*network.devices)
        with compressing:
            cache = compressor.compress(compressor.reader(ids, unit.id) if method.own_prefill else seen)
    if method.own_prefill:
        return _Made(cache, seen, compressing.seconds, 0.0, 0.0)
    statistics = sum((seen.seconds[need] for need in method.needs), 0.0)
    return _Made(cache, seen, reading.seconds - statistics, statistics, compressing.seconds)


def _without_rows(cache: CompressedCache) -> CompressedCache:
    """No context, at whose end decoding goes on all the same."""
    return replace(cache, layers=tuple(replace(layer, slabs=(), token_ids=None) for layer in cache.layers))


def _next(network: Network, fork: Fork, ids: Tensor) -> Tensor:
    return feed(network, [fork], ids, last_only=True)[:, -1].argmax(-1, keepdim=True)


def own_times(cell: Sequence[float], full: Sequence[float], empty: Sequence[float]) -> dict[str, Any]:
    """The caches' own times from steps taken in turn: medians of what each step took more than the one over nothing.

    Their ratio has a 95 % interval: bootstrap over the rounds. None where the full cache costs nothing that shows.
    """
    own = torch.tensor([cell, full], dtype=torch.float64) - torch.tensor(empty, dtype=torch.float64)
    draw = torch.randint(own.shape[1], (DRAWS, own.shape[1]), generator=torch.Generator().manual_seed(0))
    middle, drawn = own.quantile(0.5, dim=-1), own[:, draw].quantile(0.5, dim=-1)
    low, high = (drawn[0] / drawn[1]).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    shows = bool((drawn[1] > 0).all())
    return {
        "own_s": float(middle[0]),
        "own_full_s": float(middle[1]),
        "own_ratio": float(middle[0] / middle[1]) if shows else None,
        "own_ratio_low": low if shows else None,
        "own_ratio_high": high if shows else None,
    }
