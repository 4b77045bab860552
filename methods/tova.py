"""TOVA."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from kvbench.budget import Allowance
from kvbench.cache.fork import Event, Keep
from kvbench.method import Family, Method, Scale, Trust
from kvbench.plan import EXACT, Plan, uniform_rows
from kvbench.prefill import Seen, Statistic
from kvbench.toolbox.eviction import rolling_plan, without
from kvbench.toolbox.statistics import WindowAttention


@dataclass(frozen=True)
class TOVA(Method):
    """Keep what the newest token attends to, the same tokens in all heads of a layer (Oren et al., arXiv 2401.06104).

    Attention is averaged over the layer's heads; neither first nor recent tokens are protected. `decode=true` drops the
    least attended token at every step, as the paper does, itself included. Differs: the context is cut once, after it
    is read, and by default nothing afterwards; under `protocol=blind` the newest token is then the context's last one,
    whatever that is.
    """

    family: ClassVar[Family] = Family.scorer
    trust: ClassVar[Trust] = Trust.parity
    query_aware: ClassVar[bool] = True
    scale: ClassVar[Scale] = Scale.mass

    decode: bool = False

    @property
    def steps(self) -> bool:  # type: ignore[override]
        return self.decode

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset({WindowAttention(1)})

    def scores(self, seen: Seen, layer: int) -> Float[Tensor, "kv_heads tokens"]:
        attention = seen.statistics[WindowAttention(1)][layer]
        return attention.mean(0).expand(seen.layers[layer].key.shape[0], -1)

    def plan(self, seen: Seen, budget: Allowance) -> Plan:
        if not self.decode:
            return super().plan(seen, budget)
        return rolling_plan(self, seen, uniform_rows(seen, budget, EXACT))

    def step(self, state: int, event: Event) -> tuple[int, Keep | None]:
        if event.slots <= state:
            return state, None
        least = event.weights().mean(0).argmin(-1, keepdim=True)  # of equal ones the oldest
        return state, Keep(without(least.expand(len(event.key), -1), event.slots))
