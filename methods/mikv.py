"""MiKV."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from kvbench.budget import Allowance
from kvbench.cache.codecs.balanced import Balanced
from kvbench.cache.codecs.quant import Quant
from kvbench.cache.fork import Edit, Event
from kvbench.errors import UsageError
from kvbench.method import Base, Family, Scale, Trust, Wrapper
from kvbench.plan import EXACT, Infeasible, LayerPlan, Plan, Tier, keep_all, shrink, top_rows
from kvbench.prefill import Observed, Seen, Statistic
from kvbench.toolbox.eviction import grouped_weights

IMPORTANT, REST = 0, 1
BURST = 16  # while decoding, one in so many of the important tokens is quantised at a time: an edit reads the layer


@dataclass(frozen=True)
class QueryMaxima(Statistic):
    """The largest magnitude of each query channel over the context: (heads, dim), float32, per layer."""

    def observe(self, state: Tensor | None, seen: Observed) -> Float[Tensor, "heads dim"]:
        most = seen.query.abs().amax(1).float()
        return most if state is None else state.maximum(most)


@dataclass(frozen=True)
class Share:
    """How many of a KV head's tokens the budget pays for exactly, after so many tokens; bytes are charged ones."""

    budget: Allowance
    layers: int
    kv_heads: int
    fixed: int  # of a layer
    exact: int  # of a row
    low: int

    def important(self, tokens: int) -> int:
        """Negative where not even low precision fits."""
        room = (self.budget.at(tokens) // self.layers - self.fixed) // self.kv_heads - tokens * self.low
        return min(room // max(self.exact - self.low, 1), tokens)


@dataclass(frozen=True)
class MiKV(Wrapper):
    """No token left behind: important tokens exact, all others in `bits` bits (MiKV, Yang et al., arXiv 2402.18096).

    As many tokens are important as the budget pays for, the best by `base` (accumulated attention and recent tokens, as
    H2O). Keys of the others are scaled by sqrt(max |q| / max |k|), channel by channel, before they are quantised, so
    that outliers don't take the whole range. `decode`: new tokens come in exact, the attention that important ones get
    goes on adding up, and when there are more than the budget (it grows with the tokens) pays for, those with the least
    are quantised, never what `base` protects (of H2O: the recent half); nobody comes back. Otherwise new tokens stay
    exact. Differs: KV-head granularity (max |q| over a group's query heads); blocks of 64 channels. No published code:
    blocks, grouping and what is done while decoding are inferred.
    """

    family: ClassVar[Family] = Family.router
    trust: ClassVar[Trust] = Trust.reconstructed
    fixed_rate: ClassVar[bool] = True  # below `bits` for every token there is nothing
    holds: ClassVar[str] = "every token, the important exact, the others in few bits"
    budget_base: ClassVar[Base] = Base.seen

    base: str = "h2o"
    bits: int = 2
    decode: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in (2, 4, 8):
            raise UsageError(f"method.bits={self.bits} is not one of 2, 4, 8")
        if self.decode and self.scale is not Scale.mass:
            raise UsageError(f"method.base={self.base} does not score by attention, which decode=true adds up")

    @property
    def steps(self) -> bool:  # type: ignore[override]
        return self.decode

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
        held = exact + budget.charged(0, 4 * self.decode)  # while decoding, with its attention so far
        share = Share(budget, layers, kv_heads, fixed, held, low)
        important = share.important(tokens)
        if important < 0:
            raise Infeasible(layers * (fixed + kv_heads * tokens * low), budget.limit)
        plans = []
        for i, of_layer in enumerate(tiers):
            scores = self.scores(seen, i)
            route = top_rows(scores, important, self.protect)
            sums = scores[route == IMPORTANT].view(kv_heads, important).float() if self.decode else None
            state = (sums, of_layer[REST], share) if self.decode else None
            plans.append(LayerPlan(of_layer, route.where(route == IMPORTANT, REST), state=state))
        return Plan(tuple(plans))

    def step(self, state: tuple[Tensor, Tier, Share] | None, event: Event) -> tuple[Any, Edit | None]:
        if state is None:
            return None, None
        sums, low, share = state
        kv_heads, tail = len(sums), event.slots - event.context
        attention = grouped_weights(event).sum(1)
        rows = (
            sums.shape[1] + 1
        )  # exact ones, the new one included: first of the context's slots, and all of the tail's
        sums = pad(sums, (0, 1)) + torch.cat([attention[:, : rows - tail], attention[:, event.context :]], 1)
        important = max(share.important(event.seen), 0)
        if rows <= important:
            return (sums, low, share), None
        stay = important - important // BURST
        first, last = shrink(self.protect, stay, event.seen)
        losers = sums[:, first : rows - last].topk(rows - stay, largest=False).indices + first
        lost = torch.zeros_like(sums, dtype=torch.bool).scatter(1, losers, True)
        route = torch.full_like(attention, REST, dtype=torch.int8)
        route[:, : rows - tail] = lost[:, : rows - tail]
        route[:, event.context :] = lost[:, rows - tail :]
        return (sums[~lost].view(kv_heads, stay), low, share), Edit((EXACT, low), route)

    def _low(self, seen: Seen, layer: int) -> Tier:
        key = seen.layers[layer].key
        most = seen.statistics[QueryMaxima()][layer].unflatten(0, (len(key), -1)).amax(1)
        balance = (most / key.float().abs().amax(1).clamp(min=torch.finfo(torch.float16).tiny)).sqrt()
        quant = Quant(self.bits, 64)
        return Tier(f"{self.bits}-bit", Balanced(quant, balance), quant)
