"""RazorAttention."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from kvbench.artefact import Calibration
from kvbench.budget import Allowance
from kvbench.method import Family, Method, Trust
from kvbench.plan import EVICTED, EXACT, LayerPlan, Made, Plan, equal_shares, keep_all, keep_best
from kvbench.prefill import Seen, SeenLayer
from kvbench.toolbox.allocation import retrieval_shares
from kvbench.toolbox.head_maps import CopyingHeads, copying_order

MADE = replace(EXACT, name="compensation")


@dataclass(frozen=True)
class RazorAttention(Method):
    """Echo and induction heads hold every token, others sinks, a window and a mean (RazorAttention, arXiv 2407.15891).

    The mean is the compensation token: the mean key and value of what a head drops, its logit raised by ln of how many
    that are. Windows are `max(threshold, tokens / ratio)` rows, but half of an even share at most; what is left of the
    budget is for whole heads, ranked by their attention on `probe` random tokens read four times. Differs: the budget
    says how many heads are whole (the paper: 15 %, a third of the bytes; nothing is compressed below `threshold`), a
    shorter probe, KV heads ranked by their best query head, no more compression while decoding.
    """

    family: ClassVar[Family] = Family.allocator
    trust: ClassVar[Trust] = Trust.paper
    holds: ClassVar[str] = "exact tokens; the mean of a head's others"

    sinks: int = 4
    threshold: int = 4000
    ratio: float = 5
    compensation: bool = True
    probe: int = 500

    @property
    def heads(self) -> CopyingHeads:
        return CopyingHeads(self.probe)

    @property
    def calibrations(self) -> frozenset[Calibration]:
        return frozenset({self.heads})

    def plan(self, seen: Seen, budget: Allowance) -> Plan:
        kv_heads, tokens, _ = seen.layers[0].key.shape
        heads = kv_heads * len(seen.layers)
        row = budget.charged(EXACT.row_bytes(seen.dim, seen.dtype)[0], 0)
        if budget.limit >= heads * tokens * row:
            return keep_all(seen)
        # Rows of either tier counted per head, and a log multiplicity for every made row.
        rows = (budget.limit - budget.charged(0, 3 * 4 * heads)) // row
        if rows < 4 * heads:  # too few for sinks, a window and a mean
            recency = [x.position.float().expand(x.key.shape[:2]) for x in seen.layers]
            return keep_best(seen, recency, budget, lambda seen, _, rows: equal_shares(seen, rows), (self.sinks, 0))
        window = max(self.threshold, int(tokens / self.ratio))
        artefact = seen.artefacts[self.heads].tensors
        importance = copying_order(artefact["echo"], artefact["induction"])
        counts = retrieval_shares(importance, rows, self.sinks + window + self.compensation, tokens)
        return Plan(tuple(self._layer(x, c) for x, c in zip(seen.layers, counts.tolist(), strict=True)))

    def _layer(self, x: SeenLayer, counts: list[int]) -> LayerPlan:
        """`counts` rows for each head: the compensation token is one of them."""
        tokens = x.key.shape[1]
        at = torch.arange(tokens, device=x.key.device)
        own = torch.tensor([c if c == tokens else c - self.compensation for c in counts], device=at.device)[:, None]
        first = (own // 2).clamp(max=self.sinks)
        dropped = (at >= first) & (at < tokens - (own - first))
        route = torch.where(dropped, EVICTED, 0).to(torch.int8)
        if not self.compensation:
            return LayerPlan((EXACT,), route)
        many = dropped.sum(1, keepdim=True)
        share = dropped[:, None].float() / many.clamp(min=1)[..., None]
        made = Made(share @ x.key.float(), share @ x.value.float(), many.clamp(min=1).float().log(), first + many // 2)
        return LayerPlan((EXACT, MADE), torch.cat([route, torch.where(many > 0, 1, EVICTED).to(torch.int8)], 1), made)
