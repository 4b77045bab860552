"""How many sequences fit into a memory budget, and how fast they decode together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from kvbench.cache.fork import Fork
from kvbench.cache.packed import CompressedCache
from kvbench.cell import Cell
from kvbench.compressor import Compressor
from kvbench.decode import feed
from kvbench.measure.clock import Stopwatch
from kvbench.measure.memory import Peak
from kvbench.model import Model
from kvbench.prefill import read_exactly


@torch.inference_mode()
def throughput(
    model: Model,
    cells: Sequence[Cell],
    ids: Int[Tensor, " tokens"],
    memory: int,
    new_tokens: int,
    steps: int = 20,
    most: int | None = None,
) -> Iterator[dict[str, Any]]:
    """A row for each cell: as many caches of one context as `memory` bytes hold with their answers, decoded at once.

    `memory` is for caches and what their method shares per model; weights and activations come on top. `most` bounds
    the sequences that are really decoded; seconds are those of what ran.
    """
    network = model.network
    for cell in cells:
        compressor = Compressor(cell, model)
        first = _compressed(model, cell, compressor, ids)
        held = first.nbytes + (0 if cell.method.steps else network.row_bytes() * new_tokens)
        fit = max((memory - first.shared_bytes) // held, 0)
        caches = [first] + [_compressed(model, cell, compressor, ids) for _ in range(min(fit, most or fit) - 1)]
        forks = [Fork(cache, cell.method) for cache in caches]
        seconds = []
        with Peak(*network.devices) as peak:
            last = ids[-1:].repeat(len(forks), 1)
            for _ in range(steps + 1):
                step = Stopwatch(*network.devices)
                with step:
                    last = feed(network, forks, last, last_only=True)[:, -1].argmax(-1, keepdim=True)
                seconds.append(step.seconds)
        yield {
            "method": cell.label,
            "budget": str(cell.budget),
            "bytes_sequence": held,
            "sequences_fit": fit,
            "sequences_decoded": len(forks),
            "tokens_per_s": len(forks) / median(seconds[1:]) if fit else 0.0,
            "step_s": median(seconds[1:]),
            "bytes_peak": peak.nbytes,
        }


def _compressed(model: Model, cell: Cell, compressor: Compressor, ids: Int[Tensor, " tokens"]) -> CompressedCache:
    if cell.method.own_prefill:
        return compressor.compress(compressor.reader(ids, "throughput"))
    chunk = model.config.prefill_chunk
    return compressor.compress(read_exactly(model.network, ids, cell.method.needs, "throughput", chunk))
