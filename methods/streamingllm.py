"""StreamingLLM."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from kvbench.budget import Allowance
from kvbench.cache.fork import Event, Keep
from kvbench.method import Family, Method, Positions, Trust
from kvbench.plan import EXACT, Plan, uniform_rows
from kvbench.prefill import Seen
from kvbench.toolbox.eviction import lasting_dtype, rolling_plan, without


@dataclass(frozen=True)
class StreamingLLM(Method):
    """Keep the first `sinks` tokens and the most recent ones (Xiao et al., arXiv 2309.17453).

    `decode=true` rolls: every new token pushes the oldest one out that is no sink. `positions=contiguous` numbers
    positions inside the cache. Both are the paper's form. Differs: by default acts once, after the context is read, and
    keeps true positions; contiguous ones are made from rotated keys and true positions, which are held.
    """

    family: ClassVar[Family] = Family.pattern
    trust: ClassVar[Trust] = Trust.parity

    sinks: int = 4
    decode: bool = False
    positions: Positions = Positions.original  # type: ignore[misc]

    @property
    def steps(self) -> bool:  # type: ignore[override]
        return self.decode

    @property
    def protect(self) -> tuple[int, int]:
        return (self.sinks, 0)

    def scores(self, seen: Seen, layer: int) -> Float[Tensor, "kv_heads tokens"]:
        x = seen.layers[layer]
        return x.position.float().expand(x.key.shape[:2])

    def plan(self, seen: Seen, budget: Allowance) -> Plan:
        contiguous = self.positions is Positions.contiguous
        if not (self.decode or contiguous):
            return super().plan(seen, budget)
        rows = uniform_rows(seen, budget, EXACT, per_token=lasting_dtype(seen).itemsize if contiguous else 0)
        return rolling_plan(self, seen, rows, hold_positions=contiguous)

    def step(self, state: int, event: Event) -> tuple[int, Keep | None]:
        if event.slots <= state:
            return state, None
        oldest = torch.full((len(event.key), 1), min(self.sinks, state // 2), device=event.key.device)
        return state, Keep(without(oldest, event.slots))
