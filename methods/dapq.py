"""DapQ."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool1d

from kvbench.cache.attention import attention_weights, causal_mask
from kvbench.errors import UsageError
from kvbench.method import Family, Method, Scale, Trust
from kvbench.prefill import Observed, Seen, Statistic, look_ahead


@dataclass(frozen=True)
class FutureAttention(Statistic):
    """Mean attention that `queries` pseudo tokens pay to each token: (heads, tokens), float32, per layer.

    They stand right after the context, where the answer will, and are its first and last tokens over again; softmax
    over all tokens and, causally, over the pseudo tokens. Their keys and values are forgotten.
    """

    queries: int

    def finish(self, values: tuple[Any, ...], seen: Seen) -> tuple[Tensor, ...]:
        last = self.queries // 2
        ids = seen.token_ids
        pseudo = torch.cat([ids[: self.queries - last], ids[max(len(ids) - last, 0) :]])
        return tuple(look_ahead(seen, pseudo, observe=mean_attention))


def mean_attention(ahead: Observed) -> Float[Tensor, "heads tokens"]:
    mask = causal_mask(ahead.query.shape[1], ahead.total, ahead.query.device)
    return attention_weights(ahead.query, ahead.key, ahead.scale, mask)[..., : ahead.start].mean(1)


@dataclass(frozen=True)
class DapQ(Method):
    """Keep what `queries` pseudo tokens at the answer's positions attend to (DapQ, arXiv 2603.11564).

    SnapKV with a window of throw-away tokens after the context: a query's position says more of what the answer will
    look at than its content. Reconstructed: the pseudo tokens are the first and last of the prompt, half of each;
    average-pooled over `pool` neighbours and over the query heads of a KV head; the last real tokens are candidates
    like all others.
    """

    family: ClassVar[Family] = Family.scorer
    trust: ClassVar[Trust] = Trust.reconstructed
    query_aware: ClassVar[bool] = True
    scale: ClassVar[Scale] = Scale.mass

    queries: int = 32
    pool: int = 5

    def __post_init__(self) -> None:
        if self.queries < 1 or self.pool < 1 or self.pool % 2 == 0:
            raise UsageError(f"method.queries={self.queries} method.pool={self.pool}: both at least 1, pool odd")

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset({FutureAttention(self.queries)})

    def scores(self, seen: Seen, layer: int) -> Float[Tensor, "kv_heads tokens"]:
        attention = seen.statistics[FutureAttention(self.queries)][layer]
        group = attention.unflatten(0, (seen.layers[layer].key.shape[0], -1)).mean(1)
        return avg_pool1d(group, self.pool, stride=1, padding=self.pool // 2, count_include_pad=False)
