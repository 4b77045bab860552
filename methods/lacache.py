"""LaCache."""

import enum
from dataclasses import dataclass
from math import ceil
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from kvbench.budget import Allowance
from kvbench.errors import UsageError
from kvbench.method import Family, Method, Trust
from kvbench.plan import EVICTED, EXACT, LayerPlan, Plan, keep_all, shrink, uniform_rows
from kvbench.prefill import Seen


class Pattern(enum.Enum):
    """`interleaved` (released code): layers take turns in offsets. `ladder` (paper): groups of layers share one."""

    interleaved = 0
    ladder = 1


@dataclass(frozen=True)
class LaCache(Method):
    """Keep a ladder of positions, other tokens in other layers, older ones sparser (Shi et al., arXiv 2507.14204).

    The first `sinks` tokens and as many last ones as there are layers stay; of each rung of tokens in between a layer
    keeps a few, at its own offset; what that can't free is freed by wider rungs over everything. A token stays in
    `span` layers of the first rungs, two neighbours share `overlap`. Differs: acts once, after the context is read; the
    last rung gives up no more than needed, so that the budget is filled; wide rungs with several survivors don't reach
    into the next one; true positions are kept (the paper numbers positions inside the cache).
    """

    family: ClassVar[Family] = Family.pattern
    trust: ClassVar[Trust] = Trust.parity

    span: int | None = None  # layers; by default half of the model's
    overlap: int = 0
    sinks: int = 4
    pattern: Pattern = Pattern.interleaved

    def plan(self, seen: Seen, budget: Allowance) -> Plan:
        layers, tokens = len(seen.layers), len(seen.token_ids)
        span = max(layers // 2, 1) if self.span is None else self.span
        if not (0 <= self.overlap < span < layers and _rung(layers, span, self.overlap)[1] > 0):
            raise UsageError(
                f"method.span={span} method.overlap={self.overlap}: overlap < span < {layers} layers, and smaller "
                "overlaps for spans above half of the layers, or no token would be evicted"
            )
        keep = uniform_rows(seen, budget, EXACT)
        if keep >= tokens:
            return keep_all(seen)
        plans = []
        for i, x in enumerate(seen.layers):
            route = torch.full((tokens,), EVICTED, dtype=torch.int8)
            route[self._kept(i, layers, span, tokens, keep)] = 0
            plans.append(LayerPlan((EXACT,), route.to(x.key.device).expand(x.key.shape[0], -1)))
        return Plan(tuple(plans))

    def _kept(self, layer: int, layers: int, span: int, tokens: int, keep: int) -> Int[Tensor, " keep"]:
        """The tokens that a layer keeps."""
        first, last = shrink((self.sinks, layers), keep, tokens)
        rung, free = _rung(layers, span, self.overlap)
        stay = min(rung - free, keep - first - last)  # of a rung, in each layer
        most = (keep - first - last) // stay * (rung - stay)  # what one pass can free
        evict = tokens - keep
        kept = torch.arange(tokens)
        for passes, part in ((1, min(evict, most)), (ceil((evict - most) / most), evict - most)):
            if part > 0:
                slack = passes * (rung - stay)
                ladder = passes * min(max(layer // (span - self.overlap) - stay + 1, 0), rung - stay)
                offset = layer % (slack + 1) if self.pattern is Pattern.interleaved else ladder
                kept = _thin(kept, first, part, passes * (rung - 1) + 1, offset + passes * torch.arange(stay))
        return kept


def _rung(layers: int, span: int, overlap: int) -> tuple[int, int]:
    """Tokens of a rung before the first pass, and how many of them a layer gives up."""
    step = span - overlap
    rung = 1 + ceil((layers - span) / step)
    return rung, rung - ceil(span / step)


def _thin(
    tokens: Int[Tensor, " tokens"], first: int, evict: int, rung: int, stay: Int[Tensor, " stay"]
) -> Int[Tensor, " kept"]:
    """Evicts `evict` tokens after the `first`, rung by rung from the oldest on, all but those at the places `stay`."""
    out = ~torch.isin(torch.arange(len(tokens) - first) % rung, stay)
    return torch.cat([tokens[:first], tokens[first:][~(out & (out.cumsum(0) <= evict))]])
