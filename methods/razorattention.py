"""RazorAttention."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from kvbench.artefact import Calibration
from kvbench.budget import Allowance
from kvbench.method import Family, Trust, Wrapper
from kvbench.plan import EVICTED, EXACT, LayerPlan, Made, Plan, best_rows, equal_shares, keep_all, keep_best, shrink
from kvbench.prefill import Seen, SeenLayer
from kvbench.toolbox.allocation import retrieval_shares
from kvbench.toolbox.head_maps import CopyingHeads, copying_order

MADE = replace(EXACT, name="compensation")


@dataclass(frozen=True)
class RazorAttention(Wrapper):
    """Echo and induction heads hold every token, others sinks, a window and a mean (RazorAttention, arXiv 2407.15891).

    The mean is the compensation token: the mean key and value of what a head drops, its logit raised by ln of how many
    that are. Windows are `max(threshold, tokens / ratio)` rows, but half of an even share at most; what is left of the
    budget is for whole heads, ranked by their attention on `probe` random tokens read four times. The paper's heads
    hold sinks and a window: `base=streamingllm`; with another base they hold its best tokens, and the last ones that it
    protects, in place of the window. Differs: the budget says how many heads are whole (the paper: 15 %, a third of the
    bytes; nothing is compressed below `threshold`), a shorter probe, KV heads ranked by their best query head, no more
    compression while decoding.
    """

    family: ClassVar[Family] = Family.allocator
    trust: ClassVar[Trust] = Trust.paper
    holds: ClassVar[str] = "exact tokens; the mean of a head's others"

    base: str = "streamingllm"
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
        return super().calibrations | {self.heads}

    @property
    def protect(self) -> tuple[int, int]:
        return self.sinks, super().protect[1]

    def plan(self, seen: Seen, budget: Allowance) -> Plan:
        kv_heads, tokens, _ = seen.layers[0].key.shape
        heads = kv_heads * len(seen.layers)
        row = budget.charged(EXACT.row_bytes(seen.dim, seen.dtype)[0], 0)
        if budget.limit >= heads * tokens * row:
            return keep_all(seen)
        scores = [self.scores(seen, layer) for layer in range(len(seen.layers))]
        # Rows of either tier counted per head, and a log multiplicity for every made row.
        rows = (budget.limit - budget.charged(0, 3 * 4 * heads)) // row
        if rows < 4 * heads:  # too few for sinks, a window and a mean
            return keep_best(seen, scores, budget, lambda seen, _, rows: equal_shares(seen, rows), self.protect)
        window = max(self.threshold, int(tokens / self.ratio))
        artefact = seen.artefacts[self.heads].tensors
        importance = copying_order(artefact["echo"], artefact["induction"])
        counts = retrieval_shares(importance, rows, self.sinks + window + self.compensation, tokens)
        return Plan(tuple(map(self._layer, seen.layers, scores, counts.tolist())))

    def _layer(self, x: SeenLayer, scores: Float[Tensor, "kv_heads tokens"], counts: list[int]) -> LayerPlan:
        """`counts` rows for each head: the compensation token is one of them."""
        tokens = x.key.shape[1]
        own = [c if c == tokens else c - self.compensation for c in counts]
        route = best_rows(scores, own, [shrink(self.protect, c, tokens) for c in own])
        if not self.compensation:
            return LayerPlan((EXACT,), route)
        dropped = route == EVICTED
        many = dropped.sum(1, keepdim=True).clamp(min=1)
        share = dropped[:, None].float() / many[..., None]
        middle = (dropped * x.position).sum(1, keepdim=True) // many
        made = Made(share @ x.key.float(), share @ x.value.float(), many.float().log(), middle)
        mean = torch.where(dropped.any(1, keepdim=True), 1, EVICTED).to(torch.int8)
        return LayerPlan((EXACT, MADE), torch.cat([route, mean], 1), made)
