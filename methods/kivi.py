"""KIVI."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from kvbench.budget import Allowance
from kvbench.cache.codecs.exact import Exact
from kvbench.cache.codecs.quant import Quant
from kvbench.errors import UsageError
from kvbench.method import Family, Method, Trust
from kvbench.plan import EXACT, LayerPlan, Plan, Tier, keep_all
from kvbench.prefill import Seen
from kvbench.toolbox.sizes import first_fitting


@dataclass(frozen=True)
class KIVI(Method):
    """4- or 2-bit keys by channel, in groups of tokens, and values by token (Liu et al., arXiv 2402.02750, sec. 3).

    The last `residual` values and the last (tokens mod `residual`) keys are exact. `bits` unset: exact if the budget
    allows, else 4, else 2; if that is still too much the residual shrinks, group by group. Differs: values leave the
    residual in groups too, so up to `group` - 1 more of them are exact; acts once, the tokens that follow stay exact.
    """

    family: ClassVar[Family] = Family.codec
    trust: ClassVar[Trust] = Trust.parity
    holds: ClassVar[str] = "every token in 2 or 4 bits, the last ones exact"
    fixed_rate: ClassVar[bool] = True

    bits: int | None = None
    group: int = 32
    residual: int = 128

    def __post_init__(self) -> None:
        if self.bits not in (None, 2, 4):
            raise UsageError(f"method.bits={self.bits} is not one of 2, 4, or null: as the budget allows")
        if self.group < 4 or self.group % 4 or self.residual < 0 or self.residual % self.group:
            raise UsageError(
                f"method.group={self.group} method.residual={self.residual}: "
                "the group is a multiple of 4, the residual one of the group"
            )

    def plan(self, seen: Seen, budget: Allowance) -> Plan:
        return first_fitting(seen, budget, self._plans(seen))

    def _plans(self, seen: Seen) -> Iterator[Plan]:
        """From the largest to the smallest."""
        if self.bits is None:
            yield keep_all(seen)
            yield self._plan(seen, 4, self.residual)
        for residual in range(self.residual, -1, -self.group):
            yield self._plan(seen, self.bits or 2, residual)

    def _plan(self, seen: Seen, bits: int, residual: int) -> Plan:
        key, value = Quant(bits, tokens=self.group), Quant(bits, channels=self.group)
        tiers = (Tier(f"{bits}-bit", key, value), Tier(f"{bits}-bit keys", key, Exact()), EXACT)
        kv_heads, tokens, _ = seen.layers[0].key.shape
        keys = tokens - tokens % max(residual, self.group)
        values = max(tokens - residual, 0) // self.group * self.group
        at = torch.arange(tokens, device=seen.token_ids.device)
        route = ((at >= values).to(torch.int8) + (at >= keys)).to(torch.int8).expand(kv_heads, -1)
        return Plan(tuple(LayerPlan(tiers, route) for _ in seen.layers))
