"""KIVI."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Int8
from torch import Tensor

from kvbench.budget import Allowance
from kvbench.cache.codecs.exact import Exact
from kvbench.cache.codecs.quant import Quant
from kvbench.cache.fork import Edit, Event
from kvbench.errors import UsageError
from kvbench.method import Base, Family, Method, Trust
from kvbench.plan import EXACT, Infeasible, LayerPlan, Plan, Tier, keep_all
from kvbench.prefill import Seen

Setting = tuple[int, int]  # bits, residual


@dataclass(frozen=True)
class KIVI(Method):
    """4- or 2-bit keys by channel, in groups of tokens, and values by token (Liu et al., arXiv 2402.02750, sec. 3).

    The last `residual` values and the last (tokens mod `residual`) keys are exact. `bits` unset: exact if the budget
    allows, else 4, else 2; if that is still too much the residual shrinks, group by group. `decode`: the question and
    the answer are quantised too, as if they had always been part of the context, with bits and residual that keep the
    budget at every token; else they stay exact. Differs: values leave the residual in groups too, so up to `group` - 1
    more of them are exact; a key whose value is quantised later is encoded again then, from its decoded form.
    """

    family: ClassVar[Family] = Family.codec
    trust: ClassVar[Trust] = Trust.parity
    holds: ClassVar[str] = "every token in 2 or 4 bits, the last ones exact"
    fixed_rate: ClassVar[bool] = True
    budget_base: ClassVar[Base] = Base.seen

    bits: int | None = None
    group: int = 32
    residual: int = 128
    decode: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (None, 2, 4):
            raise UsageError(f"method.bits={self.bits} is not one of 2, 4, or null: as the budget allows")
        if self.group < 4 or self.group % 4 or self.residual < 0 or self.residual % self.group:
            raise UsageError(
                f"method.group={self.group} method.residual={self.residual}: "
                "the group is a multiple of 4, the residual one of the group"
            )

    @property
    def steps(self) -> bool:  # type: ignore[override]
        return self.decode

    def plan(self, seen: Seen, budget: Allowance) -> Plan:
        tokens, heads = len(seen.token_ids), sum(len(x.key) for x in seen.layers)
        exact = heads * tokens * budget.charged(*EXACT.row_bytes(seen.dim, seen.dtype))
        if self.bits is None and exact <= budget.limit:
            return keep_all(seen)
        smallest, looks = exact, self.decode and not budget.nominal
        for setting in self._settings():
            # While decoding, exact rows come and go within a period, and a share grows with the tokens.
            ahead = max(setting[1] - tokens, 0) + max(setting[1], self.group) if looks else 0
            sizes = ((heads * self._size(seen, budget, setting, n), n) for n in range(tokens, tokens + ahead + 1))
            size = max(-(-size * tokens // n) for size, n in sizes)
            if size <= budget.limit:
                route = {x: self._route(tokens, setting).to(x) for x in seen.network.devices}
                state = setting if self.decode else None
                routes = [route[x.key.device].expand(len(x.key), -1) for x in seen.layers]
                return Plan(tuple(LayerPlan(self._tiers(setting), x, state=state) for x in routes))
            smallest = min(smallest, size)
        raise Infeasible(smallest, budget.limit)

    def step(self, state: Setting | None, event: Event) -> tuple[Setting | None, Edit | None]:
        if state is None or self._ends(event.seen, state) == self._ends(event.seen - 1, state):
            return state, None
        route = self._route(event.seen, state).to(event.key.device)
        return state, Edit(self._tiers(state), route.expand(len(event.key), -1))

    def _settings(self) -> Iterator[Setting]:
        """From the largest to the smallest."""
        if self.bits is None:
            yield 4, self.residual
        for residual in range(self.residual, -1, -self.group):
            yield self.bits or 2, residual

    def _tiers(self, setting: Setting) -> tuple[Tier, Tier, Tier]:
        bits, _ = setting
        key, value = Quant(bits, tokens=self.group), Quant(bits, channels=self.group)
        return Tier(f"{bits}-bit", key, value), Tier(f"{bits}-bit keys", key, Exact()), EXACT

    def _ends(self, tokens: int, setting: Setting) -> tuple[int, int]:
        """How many of the first values, and keys, are quantised."""
        _, residual = setting
        return max(tokens - residual, 0) // self.group * self.group, tokens - tokens % max(residual, self.group)

    def _route(self, tokens: int, setting: Setting) -> Int8[Tensor, " tokens"]:
        values, keys = self._ends(tokens, setting)
        at = torch.arange(tokens)
        return (at >= values).to(torch.int8) + (at >= keys).to(torch.int8)

    def _size(self, seen: Seen, budget: Allowance, setting: Setting, tokens: int) -> int:
        """Charged bytes of one KV head once it has seen so many tokens."""
        values, keys = self._ends(tokens, setting)
        rows = zip(self._tiers(setting), (values, keys - values, tokens - keys), strict=True)
        return sum(n // tier.group * budget.charged(*tier.row_bytes(seen.dim, seen.dtype)) for tier, n in rows)
