"""One method at one budget on one model: a context that was read becomes a compressed cache that was weighed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kvbench.artefact import load_or_fit
from kvbench.cache.packed import CompressedCache
from kvbench.cell import Cell
from kvbench.method import Axis
from kvbench.model import Model
from kvbench.plan import Infeasible, Plan, plan_rows
from kvbench.prefill import Seen


class Compressor:
    """A cell's method, with what was fitted for it; its task isn't asked."""

    def __init__(self, cell: Cell, model: Model) -> None:
        self.artefacts = {calibration: load_or_fit(calibration, model) for calibration in cell.method.calibrations}
        self._cell = cell
        self._row_bytes = model.network.row_bytes()

    def compress(self, seen: Seen) -> tuple[Plan, CompressedCache]:
        """Plan and pack. Raises Infeasible."""
        full = self._row_bytes * len(seen.token_ids)
        allowance = self._cell.bound.allow(full, len(seen.token_ids))
        try:
            plan = self._cell.method.plan(replace(seen, artefacts=self.artefacts), allowance)
        except Infeasible as error:
            error.explain(self._cell.label, self._cell.budget, full)
            raise
        cache = CompressedCache.pack(plan, seen)
        method = self._cell.method
        bounded = method.budgeted and method.axis is Axis.HELD and not allowance.nominal
        if bounded and cache.nbytes > allowance.limit:
            raise RuntimeError(f"{self._cell.label} holds {cache.nbytes} bytes, its budget is {allowance.limit}")
        return plan, cache

    def describe(self, plan: Plan, cache: CompressedCache) -> dict[str, Any]:
        """What a record says of a compressed context."""
        tokens = len(cache.token_ids)
        full = self._row_bytes * tokens
        rows = plan_rows(plan)
        return {
            "bytes_held": cache.nbytes,
            "bytes_full": full,
            "bytes_budget": self._cell.bound.allow(full, tokens).limit,
            "bytes_payload": cache.planned.payload,
            "bytes_metadata": cache.planned.metadata,
            "bytes_shared": cache.shared_bytes,
            "tokens_context": tokens,
            "tokens_kept": sum(rows.values()),
            "tiers": rows,
        }
