"""How a method fares along a long answer: token by token, what its cache uses and how far it is from the full cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import torch

from kvbench.answer import Unit, ask_full, units
from kvbench.cache.fork import Fork
from kvbench.cache.packed import CompressedCache
from kvbench.cell import Cell
from kvbench.compressor import Compressor
from kvbench.decode import follow
from kvbench.model import Model
from kvbench.plan import Infeasible, keep_all
from kvbench.prefill import read_exactly


@torch.inference_mode()
def along(model: Model, cells: Sequence[Cell], contexts: int) -> Iterator[dict[str, object]]:
    """A row for each token of the full cache's greedy answer to the first question of each context, and each cell.

    Teacher-forced. The cells' tasks, protocols and seeds are equal; one whose budget is infeasible has no rows.
    """
    first = cells[0]
    for context in islice(first.task.contexts(model.writer, first.seed), contexts):
        unit = units(context, context.examples[:1], first.protocol, model)[0]
        ids = torch.tensor(unit.ids, device=model.network.device)
        needs = {need for cell in cells for need in cell.method.needs}
        seen = read_exactly(model.network, ids, needs, unit.id, model.config.prefill_chunk)
        [full] = ask_full(model, CompressedCache.pack(keep_all(seen), seen), unit).values()
        for cell in cells:
            compressor = Compressor(cell, model)
            own = cell.method.own_prefill
            try:
                cache = compressor.compress(compressor.reader(ids, unit.id) if own else seen)
            except Infeasible:
                continue
            yield from _rows(model, cell, unit, cache, full.ids, full.logprobs)


def _rows(
    model: Model, cell: Cell, unit: Unit, cache: CompressedCache, answer: Sequence[int], logprobs: torch.Tensor
) -> Iterator[dict[str, object]]:
    fed = torch.tensor(unit.turns[0].fed, device=model.network.device)
    _, [branch] = follow(model.network, Fork(cache, cell.method), fed, [answer])
    mine = branch.logits.float().log_softmax(-1)
    kl = (logprobs.exp() * (logprobs - mine)).sum(-1).tolist()
    agree = (logprobs.argmax(-1) == mine.argmax(-1)).tolist()
    usage = branch.usage
    for i, held in enumerate(usage.held):
        yield {
            "method": cell.label,
            "budget": str(cell.budget),
            "context": unit.id,
            "token": i,
            "kl_full": kl[i],
            "agree_full": int(agree[i]),
            "bytes_held": held,
            "bytes_read": int(usage.read[i]),
            "bytes_moved": int(usage.moved[i]),
        }
