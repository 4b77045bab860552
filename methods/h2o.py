"""H2O."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from kvbench.method import Family, Method, Scale, Trust
from kvbench.prefill import Seen, Statistic
from kvbench.toolbox.statistics import ColumnSums


@dataclass(frozen=True)
class H2O(Method):
    """Keep what all queries together attended to most, and as many recent tokens (Zhang et al., arXiv 2306.14048).

    Half of the budget for either, as in the paper's main setting. Attention is summed, not averaged over the queries
    that saw a token. Differs: acts once, after the context is read (the paper goes on evicting while decoding); one
    set per KV head, by the sum over its query heads.
    """

    family: ClassVar[Family] = Family.scorer
    trust: ClassVar[Trust] = Trust.parity
    scale: ClassVar[Scale] = Scale.mass

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset({ColumnSums()})

    @property
    def protect(self) -> tuple[int, int]:
        return (0, 2**31)  # more than there are: protection shrinks to half of what is kept

    def scores(self, seen: Seen, layer: int) -> Float[Tensor, "kv_heads tokens"]:
        sums = seen.statistics[ColumnSums()][layer]
        return sums.unflatten(0, (seen.layers[layer].key.shape[0], -1)).sum(1)
