"""One method at one budget on one model: a context that was read becomes a compressed cache that was weighed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kvbench.artefact import load_or_fit
from kvbench.budget import Allowance
from kvbench.cache.packed import CompressedCache
from kvbench.cell import Cell
from kvbench.measure.clock import Stopwatch
from kvbench.method import Axis
from kvbench.model import Model
from kvbench.plan import Infeasible, plan_rows
from kvbench.prefill import Seen


class Compressor:
    """A cell's method, with what was fitted for it; its task isn't asked."""

    def __init__(self, cell: Cell, model: Model) -> None:
        self.artefacts = {calibration: load_or_fit(calibration, model) for calibration in cell.method.calibrations}
        self._cell, self._network = cell, model.network
        self._row_bytes = model.network.row_bytes()

    def compress(self, seen: Seen) -> tuple[CompressedCache, dict[str, Any]]:
        """The compressed context, and what a record says of it. Raises Infeasible."""
        method, full = self._cell.method, self._row_bytes * len(seen.token_ids)
        allowance = self._cell.bound.allow(full, len(seen.token_ids))
        watch = Stopwatch(self._network.device)
        try:
            with watch:
                plan = method.plan(replace(seen, artefacts=self.artefacts), allowance)
                cache = CompressedCache.pack(plan, seen)
        except Infeasible as error:
            error.explain(self._cell.label, self._cell.budget, full)
            raise
        self._check(cache, allowance)
        rows = plan_rows(plan)
        return cache, {
            "bytes_held": cache.nbytes,
            "bytes_full": full,
            "bytes_budget": allowance.limit,
            "bytes_payload": cache.planned.payload,
            "bytes_metadata": cache.planned.metadata,
            "bytes_shared": cache.shared_bytes,
            "tokens_context": len(seen.token_ids),
            "tokens_kept": sum(rows.values()),
            "tiers": rows,
            "compress_s": watch.seconds + sum(seen.seconds[need] for need in method.needs),
        }

    def _check(self, cache: CompressedCache, allowance: Allowance) -> None:
        method = self._cell.method
        bounded = method.budgeted and method.axis is Axis.HELD and not allowance.nominal
        if bounded and cache.nbytes > allowance.limit:
            raise RuntimeError(f"{self._cell.label} holds {cache.nbytes} bytes, its budget is {allowance.limit}")
