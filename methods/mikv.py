"""MiKV."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from kvbench.budget import Allowance
from kvbench.cache.codecs.balanced import Balanced
from kvbench.cache.codecs.quant import Quant
from kvbench.errors import UsageError
from kvbench.method import Family, Trust, Wrapper
from kvbench.plan import EXACT, Infeasible, LayerPlan, Plan, Tier, keep_all, top_rows
from kvbench.prefill import Observed, Seen, Statistic

IMPORTANT, REST = 0, 1


@dataclass(frozen=True)
class QueryMaxima(Statistic):
    """The largest magnitude of each query channel over the context: (heads, dim), float32, per layer."""

    def observe(self, state: Tensor | None, seen: Observed) -> Float[Tensor, "heads dim"]:
        most = seen.query.abs().amax(1).float()
        return most if state is None else state.maximum(most)


@dataclass(frozen=True)
class MiKV(Wrapper):
    """No token left behind: important tokens exact, all others in `bits` bits (MiKV, Yang et al., arXiv 2402.18096).

    As many tokens are important as the budget pays for, the best by `base` (accumulated attention and recent tokens, as
    H2O). Keys of the others are scaled by sqrt(max |q| / max |k|), channel by channel, before they are quantised, so
    that outliers don't take the whole range. Differs: KV-head granularity (max |q| over a group's query heads); blocks
    of 64 channels; acts once, after the context is read. No published code: blocks and grouping are inferred.
    """

    family: ClassVar[Family] = Family.router
    trust: ClassVar[Trust] = Trust.reconstructed
    fixed_rate: ClassVar[bool] = True  # below `bits` for every token there is nothing
    holds: ClassVar[str] = "every token, the important exact, the others in few bits"

    base: str = "h2o"
    bits: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in (2, 4, 8):
            raise UsageError(f"method.bits={self.bits} is not one of 2, 4, 8")

    @property
    def needs(self) -> frozenset[Statistic]:
        return super().needs | {QueryMaxima()}

    def plan(self, seen: Seen, budget: Allowance) -> Plan:
        layers, (kv_heads, tokens, _) = len(seen.layers), seen.layers[0].key.shape
        exact = budget.charged(*EXACT.row_bytes(seen.dim, seen.dtype))
        if budget.limit >= layers * kv_heads * tokens * exact:
            return keep_all(seen)
        tiers = [(EXACT, self._low(seen, i)) for i in range(layers)]
        low = budget.charged(*tiers[0][REST].row_bytes(seen.dim, seen.dtype))
        fixed = budget.charged(0, tiers[0][REST].key.fixed_bytes(kv_heads, seen.dim, seen.dtype))
        room = (budget.limit // layers - fixed) // kv_heads - tokens * low  # of a KV head, for its important tokens
        if room < 0:
            raise Infeasible(layers * (fixed + kv_heads * tokens * low), budget.limit)
        important = min(room // max(exact - low, 1), tokens)
        routes = [top_rows(self.scores(seen, i), important, self.protect) for i in range(layers)]
        return Plan(
            tuple(LayerPlan(t, route.where(route == IMPORTANT, REST)) for t, route in zip(tiers, routes, strict=True))
        )

    def _low(self, seen: Seen, layer: int) -> Tier:
        key = seen.layers[layer].key
        most = seen.statistics[QueryMaxima()][layer].unflatten(0, (len(key), -1)).amax(1)
        balance = (most / key.float().abs().amax(1).clamp(min=torch.finfo(torch.float16).tiny)).sqrt()
        quant = Quant(self.bits, 64)
        return Tier(f"{self.bits}-bit", Balanced(quant, balance), quant)
