"""H2O."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from kvbench.budget import Allowance
from kvbench.cache.fork import Event, Keep
from kvbench.method import Family, Method, Scale, Trust
from kvbench.plan import EXACT, LayerPlan, Plan, top_rows, uniform_rows
from kvbench.prefill import Seen, Statistic
from kvbench.toolbox.eviction import grouped_weights, without
from kvbench.toolbox.statistics import ColumnSums


@dataclass(frozen=True)
class H2O(Method):
    """Keep what all queries together attended to most, and as many recent tokens (Zhang et al., arXiv 2306.14048).

    Half of the budget for either, as in the paper's main setting. Attention is summed, not averaged over the queries
    that saw a token. `decode=true` goes on as the paper does: the sums (4 bytes a row) go on, and every new token costs
    a place among the older rows. Differs: by default acts once, after the context is read; one set per KV head, by the
    sum over its query heads.
    """

    family: ClassVar[Family] = Family.scorer
    trust: ClassVar[Trust] = Trust.parity
    scale: ClassVar[Scale] = Scale.mass

    decode: bool = False

    @property
    def steps(self) -> bool:  # type: ignore[override]
        return self.decode

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset({ColumnSums()})

    @property
    def protect(self) -> tuple[int, int]:
        return (0, 2**31)  # more than there are: protection shrinks to half of what is kept

    def scores(self, seen: Seen, layer: int) -> Float[Tensor, "kv_heads tokens"]:
        sums = seen.statistics[ColumnSums()][layer]
        return sums.unflatten(0, (seen.layers[layer].key.shape[0], -1)).sum(1)

    def plan(self, seen: Seen, budget: Allowance) -> Plan:
        if not self.decode:
            return super().plan(seen, budget)
        rows = uniform_rows(seen, budget, EXACT, per_token=4)
        layers = []
        for i in range(len(seen.layers)):
            sums = self.scores(seen, i)
            route = top_rows(sums, rows, self.protect)
            layers.append(LayerPlan((EXACT,), route, state=(sums[route == 0].view(len(sums), -1), rows)))
        return Plan(tuple(layers))

    def step(self, state: tuple[Tensor, int], event: Event) -> tuple[tuple[Tensor, int], Keep | None]:
        sums, rows = state
        sums = pad(sums, (0, 1)) + grouped_weights(event).sum(1)
        if event.slots <= rows:
            return (sums, rows), None
        older = event.slots - rows // 2
        slots = without(sums[:, :older].argmin(1, keepdim=True), event.slots)
        return (sums.gather(1, slots), rows), Keep(slots)
