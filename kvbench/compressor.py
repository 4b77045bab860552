"""One method at one budget on one model: a context that was read becomes a compressed cache that was weighed."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

from jaxtyping import Int
from torch import Tensor

from kvbench.artefact import load_or_fit
from kvbench.budget import Allowance
from kvbench.cache.packed import CompressedCache
from kvbench.cell import Cell
from kvbench.method import Axis
from kvbench.model import Model
from kvbench.plan import Infeasible
from kvbench.prefill import Reader, Seen, read_exactly


class Compressor:
    """A cell's method, with what was fitted for it; its task isn't asked."""

    def __init__(self, cell: Cell, model: Model) -> None:
        self.artefacts = {calibration: load_or_fit(calibration, model) for calibration in cell.method.calibrations}
        self._cell, self._model = cell, model

    def reader(self, ids: Int[Tensor, " tokens"], context_id: str) -> Reader:
        """What a method with an own prefill starts from, where others start from what `read_exactly` saw."""
        needs = self._cell.method.needs
        return Reader(self._model.network, ids, needs, context_id, self.artefacts, self._model)

    def read(self, ids: Int[Tensor, " tokens"]) -> Seen | Reader:
        """A context of no task's, ready to be compressed; what a method draws depends on its tokens."""
        name, network = hashlib.sha256(str(ids.tolist()).encode()).hexdigest()[:16], self._model.network
        if self._cell.method.own_prefill:
            return self.reader(ids, name)
        return read_exactly(network, ids, self._cell.method.needs, name, self._model.config.prefill_chunk)

    def compress(self, context: Seen | Reader) -> CompressedCache:
        """Plan and pack what was read; or read and pack in the method's own way. Raises Infeasible."""
        method = self._cell.method
        full, allowance = self._full(context), self._allowance(context)
        try:
            if isinstance(context, Reader):
                cache = method.prefill(context, allowance)
                context.close()
            else:
                seen = replace(context, artefacts=self.artefacts)
                cache = CompressedCache.pack(method.plan(seen, allowance), seen)
        except Infeasible as error:
            error.explain(self._cell.label, self._cell.budget, full)
            raise
        bounded = method.budgeted and method.axis in (Axis.HELD, Axis.DEVICE) and not allowance.nominal
        if bounded and cache.nbytes > allowance.limit:
            raise RuntimeError(f"{self._cell.label} holds {cache.nbytes} bytes, its budget is {allowance.limit}")
        return cache

    def describe(self, context: Seen | Reader, cache: CompressedCache) -> dict[str, Any]:
        """What a record says of a compressed context; sizes are of the whole context, whatever of it was read."""
        rows, costs = tier_rows(cache), context.costs
        passed = 0.0 if isinstance(context, Reader) else sum(context.passed[need] for need in self._cell.method.needs)
        return {
            "bytes_held": cache.nbytes,
            "bytes_full": self._full(context),
            "bytes_budget": self._allowance(context).limit,
            "bytes_payload": cache.planned.payload,
            "bytes_metadata": cache.planned.metadata,
            "bytes_shared": cache.shared_bytes,
            "bytes_offloaded": cache.offloaded,
            "bytes_prefill": costs.bytes_prefill,
            "tokens_context": len(context.token_ids),
            "tokens_prefill": costs.tokens_prefill + passed,
            "tokens_draft": costs.tokens_draft,
            "tokens_kept": sum(rows.values()),
            "tiers": rows,
        }

    def _full(self, context: Seen | Reader) -> int:
        return self._model.network.row_bytes() * len(context.token_ids)

    def _allowance(self, context: Seen | Reader) -> Allowance:
        return self._cell.bound.allow(self._full(context), len(context.token_ids))


def tier_rows(cache: CompressedCache) -> dict[str, float]:
    """Mean rows per layer and KV head in each tier."""
    rows: dict[str, int] = {}
    for layer in cache.layers:
        for slab in filter(None, (*layer.slabs, layer.host)):
            rows[slab.tier.name] = rows.get(slab.tier.name, 0) + slab.layout.rows
    heads = sum(layer.empty.shape[0] for layer in cache.layers)
    return {name: count / heads for name, count in rows.items()}
