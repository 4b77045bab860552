"""CriticalKV."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from kvbench.budget import Allowance
from kvbench.errors import UsageError
from kvbench.method import Family, Scale, Trust, Wrapper
from kvbench.plan import EXACT, LayerPlan, Plan, allocated, shrink, top_rows
from kvbench.prefill import Seen, Statistic
from kvbench.toolbox.routers import as_mass
from kvbench.toolbox.statistics import OutputNorms

EPSILON = 1e-4


@dataclass(frozen=True)
class CriticalKV(Wrapper):
    """Re-rank a scorer by how far each token moves the layer's output (CriticalKV, Feng et al., arXiv 2502.03805).

    Of a KV head's rows the share `safe` goes to the base's best tokens, the rest to the highest (score + 1e-4) x
    ||W_O value||_1. How many rows a head has is the base's to say: an allocator as base is the paper's CriticalAda. As
    the base of another method, whose budget it doesn't know, it gives the second stage's scores alone. Differs: bases
    whose scores are no shares of attention are mapped to positive numbers first.
    """

    family: ClassVar[Family] = Family.scorer
    trust: ClassVar[Trust] = Trust.parity
    query_aware: ClassVar[bool] = True
    scale = Scale.mass  # type: ignore[assignment]

    safe: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.safe <= 1:
            raise UsageError(f"method.safe={self.safe} is not a share")

    @property
    def needs(self) -> frozenset[Statistic]:
        return super().needs | {OutputNorms()}

    def scores(self, seen: Seen, layer: int) -> Float[Tensor, "kv_heads tokens"]:
        raw = as_mass(self.scorer.scores(seen, layer), self.scorer.scale)
        return (raw + EPSILON) * seen.statistics[OutputNorms()][layer]

    def plan(self, seen: Seen, budget: Allowance) -> Plan:
        raw = [self.scorer.scores(seen, layer) for layer in range(len(seen.layers))]
        counts = allocated(seen, raw, budget, self.allocate).tolist()
        layers = []
        for layer, (base, keep) in enumerate(zip(raw, counts, strict=True)):
            heads = zip(base.split(1), self.scores(seen, layer).split(1), keep, strict=True)
            layers.append(LayerPlan((EXACT,), torch.cat([self._two_stages(*head) for head in heads])))
        return Plan(tuple(layers))

    def _two_stages(self, base: Tensor, critical: Tensor, keep: int) -> Tensor:
        """The route of one KV head. Protected tokens are part of the first stage."""
        tokens = base.shape[1]
        first, last = shrink(self.protect, keep, tokens)
        middle = base[:, first : tokens - last]
        safe = min(max(int(self.safe * keep) - first - last, 0), middle.shape[1])
        best = middle.topk(safe, dim=1).indices + first
        return top_rows(critical.scatter(1, best, torch.inf), keep, self.protect)
