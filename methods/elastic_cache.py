"""Elastic Cache."""

import enum
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from kvbench.budget import Allowance
from kvbench.method import Family, Method, Scale, Trust
from kvbench.plan import LayerPlan, Plan, shrink
from kvbench.prefill import Seen, Statistic
from kvbench.toolbox.merging import merged_layer, most_centres, pooled
from kvbench.toolbox.statistics import ColumnSums


class Variant(enum.Enum):
    """`paper`: anchors are the most important tokens. `released`: ids are taken for ranks, members are shifted."""

    paper = 0
    released = 1


@dataclass(frozen=True)
class ElasticCache(Method):
    """Keep a layer's most attended tokens, average the others into the nearest of them (Liu et al., arXiv 2407.18121).

    Importance is the attention a token receives from all queries and heads; every token that is not kept joins the kept
    one next to it (the earlier of two), whose key and value become the plain mean of all. The first `start` tokens and
    the last stay as they are. `variant=released` does what the released code does: it takes the token ids of a sort for
    ranks, so that anchors have little to do with importance, and averages tokens `start` places too early. Differs:
    acts once, after the context is read (the paper also drops a row at a fixed place while decoding); true positions
    are kept; merged rows hold a log multiplicity, here 0, which costs 4 bytes.
    """

    family: ClassVar[Family] = Family.merging
    trust: ClassVar[Trust] = Trust.parity
    holds: ClassVar[str] = "exact tokens; means of neighbouring tokens"
    scale: ClassVar[Scale] = Scale.mass

    start: int = 1
    variant: Variant = Variant.paper

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset({ColumnSums()})

    @property
    def protect(self) -> tuple[int, int]:
        return (self.start, 1)

    def scores(self, seen: Seen, layer: int) -> Float[Tensor, "kv_heads tokens"]:
        sums = seen.statistics[ColumnSums()][layer]
        return sums.mean(0).expand(seen.layers[layer].key.shape[:2])

    def plan(self, seen: Seen, budget: Allowance) -> Plan:
        every = range(len(seen.layers))
        return most_centres(seen, budget, lambda keep: Plan(tuple(self._merge(seen, i, keep) for i in every)))

    def _merge(self, seen: Seen, layer: int, keep: int) -> LayerPlan:
        x = seen.layers[layer]
        kv_heads, tokens, _ = x.key.shape
        first, last = shrink(self.protect, keep, tokens)
        order = self.scores(seen, layer)[0, first : tokens - last].argsort(stable=True)
        rank = order.argsort() if self.variant is Variant.paper else order
        kept = rank >= tokens - keep
        anchors, members = (which.nonzero()[:, 0] + first for which in (kept, ~kept))
        if self.variant is Variant.released:
            members = members - first
        after = torch.searchsorted(anchors, members).clamp(max=len(anchors) - 1)
        before = (after - 1).clamp(min=0)
        nearest = torch.where(anchors[after] - members < members - anchors[before], after, before) + first
        ends = torch.arange(tokens, device=members.device)
        centres = torch.cat([ends[:first], anchors, ends[tokens - last :]]).expand(kv_heads, -1)
        size = 1 + nearest.bincount(minlength=keep).float()
        key, value = (
            pooled(y[:, centres[0]], y[:, members], nearest.expand(kv_heads, -1)) / size[:, None]
            for y in (x.key.float(), x.value.float())
        )
        return merged_layer(x, centres, key, value, size.expand(kv_heads, -1))
