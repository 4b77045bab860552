"""Mustafar."""

from dataclasses import dataclass
from typing import ClassVar

from kvbench.budget import Allowance
from kvbench.cache.codecs.sparse import Sparse
from kvbench.errors import UsageError
from kvbench.method import Family, Trust, Wrapper
from kvbench.plan import Plan, Tier
from kvbench.prefill import Seen
from kvbench.toolbox.sizes import thin_rows

SPARSEST = 0.7  # of the paper's settings


@dataclass(frozen=True)
class Mustafar(Wrapper):
    """Keep the largest entries of each key and each value (Joo et al., arXiv 2505.22913): unstructured sparsity.

    The last `window` tokens are exact. `sparsity` unset: as little as lets the budget hold every token, and the window
    grows into what is left; 0.7 at most, and below that `base` evicts first, as the paper does with H2O. Differs: a
    bitmap per row and no offsets or padding, so fewer bytes than the paper's GPU tiles; acts once, the tokens that
    follow stay exact.
    """

    family: ClassVar[Family] = Family.codec
    trust: ClassVar[Trust] = Trust.parity
    query_aware: ClassVar[bool] = True
    holds: ClassVar[str] = "the largest entries of keys and values, the last tokens exact"

    sparsity: float | None = None
    window: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 0 or not 0 <= (self.sparsity or 0) < 1:
            raise UsageError(f"method.sparsity={self.sparsity} method.window={self.window}: in [0, 1), and at least 0")

    def plan(self, seen: Seen, budget: Allowance) -> Plan:
        least = seen.dim - int(seen.dim * (SPARSEST if self.sparsity is None else self.sparsity))
        free = self.sparsity is None
        levels = range(seen.dim - 1, least - 1, -1) if free else [least]
        return thin_rows(self, seen, budget, _tier, levels, self.window, grow=free)


def _tier(layer: int, keep: int) -> Tier:
    return Tier("sparse", Sparse(keep), Sparse(keep))
