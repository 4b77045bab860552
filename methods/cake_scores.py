"""CAKE's scores."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool1d

from kvbench.errors import UsageError
from kvbench.method import Family, Method, Scale, Trust
from kvbench.prefill import Seen, Statistic
from kvbench.toolbox.statistics import WindowMoments


@dataclass(frozen=True)
class CakeScores(Method):
    """Keep what the last queries attend to much, or now and then (CAKE's scores, Qin et al., arXiv 2503.12491).

    Mean plus `gamma` times the variance of the last `window` queries' attention, average-pooled over `pool` neighbours
    (the window on its own) and over the query heads of a KV head. CAKE itself (method=cake) adds its shares of layers;
    this alone has equal ones.
    """

    family: ClassVar[Family] = Family.scorer
    trust: ClassVar[Trust] = Trust.parity
    query_aware: ClassVar[bool] = True
    scale: ClassVar[Scale] = Scale.mass

    window: int = 32
    pool: int = 5
    gamma: float = 200

    def __post_init__(self) -> None:
        if self.window < 2 or self.pool < 1 or self.pool % 2 == 0:
            raise UsageError(f"method.window={self.window} method.pool={self.pool}: at least 2 and 1, pool odd")

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset({WindowMoments(self.window)})

    @property
    def protect(self) -> tuple[int, int]:
        return (0, self.window)

    def scores(self, seen: Seen, layer: int) -> Float[Tensor, "kv_heads tokens"]:
        mean, variance, _ = seen.statistics[WindowMoments(self.window)][layer]
        group = (mean + self.gamma * variance).unflatten(0, (seen.layers[layer].key.shape[0], -1)).mean(1)
        parts = group.tensor_split([max(group.shape[1] - self.window, 0)], dim=1)
        pooled = [avg_pool1d(p, self.pool, 1, self.pool // 2, count_include_pad=False) for p in parts if p.shape[1]]
        return torch.cat(pooled, 1)
