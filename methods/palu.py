"""Palu."""

from dataclasses import dataclass
from typing import ClassVar

from kvbench.artefact import Calibration
from kvbench.budget import Allowance
from kvbench.cache.codecs.low_rank import LowRank
from kvbench.cache.layout import index_dtype
from kvbench.corpora import CALIBRATION_TEXTS
from kvbench.errors import UsageError
from kvbench.method import Family, Method, Trust
from kvbench.plan import Infeasible, LayerPlan, Plan, Tier, keep_all
from kvbench.prefill import Seen
from kvbench.toolbox.low_rank import Directions, group_size


@dataclass(frozen=True)
class Palu(Method):
    """Low-rank keys and values: a few coordinates for each group of `heads` KV heads (Chang et al., arXiv 2407.21118).

    Bases are fitted once per model on `texts`: those of the whitened singular value decomposition of its key and value
    weights. Keys are projected before their rotary embedding. `ratio` is the share of the ranks that is kept; unset:
    exact if the budget allows, else the most it does. Differs: every layer has the same ranks, keys and values 2 to 3
    (the paper searches by Fisher information and multiples of 32); the context is read exactly and only then projected,
    the paper's weights are changed; no quantisation on top; the tokens that follow stay exact.
    """

    family: ClassVar[Family] = Family.codec
    trust: ClassVar[Trust] = Trust.reconstructed
    holds: ClassVar[str] = "coordinates of every token along a few directions"
    fixed_rate: ClassVar[bool] = True

    ratio: float | None = None
    heads: int = 4
    texts: tuple[str, ...] = CALIBRATION_TEXTS

    def __post_init__(self) -> None:
        if not 0 < (1 if self.ratio is None else self.ratio) <= 1 or self.heads < 1:
            raise UsageError(f"method.ratio={self.ratio} method.heads={self.heads}: in (0, 1], and at least 1")

    @property
    def directions(self) -> Directions:
        return Directions(self.texts, self.heads)

    @property
    def calibrations(self) -> frozenset[Calibration]:
        return frozenset({self.directions})

    def plan(self, seen: Seen, budget: Allowance) -> Plan:
        exact = keep_all(seen)
        if self.ratio is None and budget.limit >= sum(x.key.nbytes + x.value.nbytes for x in seen.layers):
            return exact
        kv_heads, tokens, dim = seen.layers[0].key.shape
        rank = budget.charged(len(exact.layers) * kv_heads * tokens * seen.dtype.itemsize, 0)
        positions = budget.charged(0, len(exact.layers) * tokens * index_dtype(seen.next_position).itemsize)
        ranks = (budget.limit - positions) // rank
        least = 2 if self.ratio is None else max(int(2 * dim * self.ratio), 2)
        if ranks < least:
            raise Infeasible(positions + least * rank, budget.limit)
        ranks = min(ranks, 2 * dim - 1) if self.ratio is None else least
        value = min(max(ranks * 3 // 5, 1), dim)
        return Plan(
            tuple(LayerPlan((self._tier(seen, i, ranks - value, value),), x.route) for i, x in enumerate(exact.layers))
        )

    def _tier(self, seen: Seen, layer: int, key: int, value: int) -> Tier:
        tensors = seen.artefacts[self.directions].tensors
        size = group_size(seen.layers[0].key.shape[0], self.heads)
        device = seen.layers[layer].key.device
        parts = (tensors[kind][layer, :, :, : size * r] for kind, r in (("key", key), ("value", value)))
        keys, values = (x.to(device, copy=True) for x in parts)
        return Tier("low-rank", LowRank(keys, key, seen.network.rope), LowRank(values, value))
