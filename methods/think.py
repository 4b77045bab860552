"""ThinK."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from kvbench.budget import Allowance
from kvbench.cache.codecs.channels import Channels
from kvbench.cache.codecs.exact import Exact
from kvbench.errors import UsageError
from kvbench.method import Family, Trust, Wrapper
from kvbench.plan import Plan, Tier
from kvbench.prefill import Observed, Seen, Statistic
from kvbench.toolbox.sizes import thin_rows

MOST = 0.5  # of the paper's settings


@dataclass(frozen=True)
class QueryEnergy(Statistic):
    """Sum of squares of each channel over the context's last `window` queries: (heads, dim), float32, per layer."""

    window: int

    def observe(self, state: Tensor | None, seen: Observed) -> Float[Tensor, "heads dim"]:
        first = max(seen.total - self.window - seen.start, 0)
        total = seen.query[:, first:].float().square().sum(1)
        return total if state is None else state + total


@dataclass(frozen=True)
class ThinK(Wrapper):
    """Drop the key channels that the last queries weigh least, KV head by KV head (Xu et al., arXiv 2407.21018).

    A channel counts by its mean square in the last `window` queries times that in the stored keys. The last `recent`
    tokens are exact, values always. `ratio` unset: as few channels go as let the budget hold every token, and the exact
    tokens grow into what is left; half of them at most, and below that `base` evicts first, as in the paper. Differs:
    the window ends the context; one set of channels per KV head; acts once, the tokens that follow stay exact.
    """

    family: ClassVar[Family] = Family.codec
    trust: ClassVar[Trust] = Trust.parity
    query_aware: ClassVar[bool] = True
    holds: ClassVar[str] = "some channels of the keys, exact values; the last tokens exact"

    ratio: float | None = None
    window: int = 32
    recent: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1 or self.recent < 0 or not 0 <= (self.ratio or 0) < 1:
            raise UsageError(
                f"method.ratio={self.ratio} method.window={self.window} method.recent={self.recent}: "
                "the ratio in [0, 1), the window at least 1, recent at least 0"
            )

    @property
    def needs(self) -> frozenset[Statistic]:
        return super().needs | {QueryEnergy(self.window)}

    def plan(self, seen: Seen, budget: Allowance) -> Plan:
        least = seen.dim - int(seen.dim * (MOST if self.ratio is None else self.ratio))
        kv_heads = seen.layers[0].key.shape[0]
        energies = [energy.unflatten(0, (kv_heads, -1)).sum(1) for energy in seen.statistics[QueryEnergy(self.window)]]

        def tier(layer: int, keep: int) -> Tier:
            return Tier("pruned", Channels(keep, energies[layer]), Exact())

        free = self.ratio is None
        levels = range(seen.dim - 1, least - 1, -1) if free else [least]
        return thin_rows(self, seen, budget, tier, levels, self.recent, grow=free)
