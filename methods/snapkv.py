"""SnapKV."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool1d

from kvbench.errors import UsageError
from kvbench.method import Family, Method, Scale, Trust
from kvbench.prefill import Seen, Statistic
from kvbench.toolbox.statistics import WindowAttention


@dataclass(frozen=True)
class SnapKV(Method):
    """Keep what the context's last `window` queries attend to, and that window (Li et al., arXiv 2404.14469, sec. 4).

    Attention is averaged over the window and the query heads of a KV head, then average-pooled over `pool` neighbouring
    tokens. Differs: one set per KV head, not per query head; under `protocol=blind` the window ends the context and has
    not seen the question.
    """

    family: ClassVar[Family] = Family.scorer
    trust: ClassVar[Trust] = Trust.parity
    query_aware: ClassVar[bool] = True
    scale: ClassVar[Scale] = Scale.mass

    window: int = 64
    pool: int = 5

    def __post_init__(self) -> None:
        if self.window < 1 or self.pool < 1 or self.pool % 2 == 0:
            raise UsageError(f"method.window={self.window} method.pool={self.pool}: both at least 1, pool odd")

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset({WindowAttention(self.window)})

    @property
    def protect(self) -> tuple[int, int]:
        return (0, self.window)

    def scores(self, seen: Seen, layer: int) -> Float[Tensor, "kv_heads tokens"]:
        attention = seen.statistics[WindowAttention(self.window)][layer]
        kv_heads = seen.layers[layer].key.shape[0]
        group = attention.unflatten(0, (kv_heads, -1)).mean(1)
        return avg_pool1d(group, self.pool, stride=1, padding=self.pool // 2, count_include_pad=False)
