"""EMS."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from kvbench.budget import Allowance
from kvbench.errors import UsageError
from kvbench.method import Family, Method, Scale, Trust
from kvbench.plan import EVICTED, LayerPlan, Plan, top_rows
from kvbench.prefill import Seen, SeenLayer, Statistic
from kvbench.toolbox.merging import merged_layer, most_centres, most_similar, pooled, rows
from kvbench.toolbox.statistics import ColumnSums, WindowAttention


@dataclass(frozen=True)
class EMS(Method):
    """Evict, then merge: the best tokens take in the next best, the rest is dropped (EMS, arXiv 2412.08521).

    Scores are the larger of the attention a token receives from all queries and from the last `window` ones, brought to
    the same mean. The tokens after the kept ones, up to `factor` times as many and until `mass` of a head's scores is
    covered, join the centre with the most similar key and value (product of the two cosines) if that is above
    `threshold`, or are dropped. Values are averaged by score, keys in direction and in norm. Reconstructed from the
    abstract, reviews and secondary notes: `window`, `factor`, `mass` and `threshold` are ours. `multiplicity` (ours):
    a merged row competes as all its tokens. Differs: one set per KV head; acts once, after the context is read.
    """

    family: ClassVar[Family] = Family.merging
    trust: ClassVar[Trust] = Trust.reconstructed
    query_aware: ClassVar[bool] = True
    holds: ClassVar[str] = "exact tokens; averages of similar tokens"
    scale: ClassVar[Scale] = Scale.mass

    window: int = 32
    factor: float = 1.0
    mass: float = 0.95
    threshold: float = 0.6
    multiplicity: bool = False

    def __post_init__(self) -> None:
        if self.window < 1 or self.factor < 0:
            raise UsageError(f"method.window={self.window} method.factor={self.factor}: at least 1, at least 0")

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset({ColumnSums(), WindowAttention(self.window)})

    @property
    def protect(self) -> tuple[int, int]:
        return (0, self.window)

    def scores(self, seen: Seen, layer: int) -> Float[Tensor, "kv_heads tokens"]:
        kv_heads = seen.layers[layer].key.shape[0]
        whole, local = (
            seen.statistics[need][layer].unflatten(0, (kv_heads, -1)).mean(1)
            for need in (ColumnSums(), WindowAttention(self.window))
        )
        return (whole * (local.mean(1, keepdim=True) / whole.mean(1, keepdim=True))).maximum(local)

    def plan(self, seen: Seen, budget: Allowance) -> Plan:
        layers = [(x, self.scores(seen, i)) for i, x in enumerate(seen.layers)]
        return most_centres(seen, budget, lambda keep: Plan(tuple(self._merge(*layer, keep) for layer in layers)))

    def _merge(self, x: SeenLayer, scores: Tensor, keep: int) -> LayerPlan:
        kv_heads, tokens = scores.shape
        scores = scores.clamp(min=1e-30)  # weights: a cluster of them is never without any
        route = top_rows(scores, keep, self.protect)
        centres = (route != EVICTED).nonzero()[:, 1].view(kv_heads, keep)
        rest = scores.masked_fill(route != EVICTED, -torch.inf)
        weight, members = rest.topk(min(int(self.factor * keep), tokens - keep))
        own = scores.gather(1, centres)
        before = own.sum(1, keepdim=True) + weight.cumsum(1) - weight
        centre = most_similar(x, members, centres, self.threshold)
        centre[before >= self.mass * scores.sum(1, keepdim=True)] = keep
        own, weight = own[..., None], weight[..., None]

        def average(y: Tensor) -> Tensor:
            return pooled(own * rows(y, centres), weight * rows(y, members), centre) / total

        total = pooled(own, weight, centre)
        size = pooled(torch.ones_like(own), torch.ones_like(weight), centre)[..., 0]
        length = x.key.float().norm(dim=-1, keepdim=True)
        key = normalize(average(x.key.float() / length), dim=-1) * average(length)
        return merged_layer(x, centres, key, average(x.value.float()), size, self.multiplicity)
