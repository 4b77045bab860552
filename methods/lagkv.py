"""LagKV."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from kvbench.budget import Allowance
from kvbench.errors import UsageError
from kvbench.method import Family, Method, Trust
from kvbench.plan import Plan, keep_best
from kvbench.prefill import Seen


@dataclass(frozen=True)
class LagKV(Method):
    """Keep tokens whose channels spread most, relative to the partition that follows (Liang et al., arXiv 2504.04704).

    After `sinks` tokens the context is cut into partitions of `lag` tokens; each is ranked by keys and values scaled to
    the range of the next one. Sinks, the last full partition and what follows it stay. Differs: acts once, and fills
    the budget: the paper keeps the same number of tokens of each partition, here one more of the newest where the
    budget doesn't divide evenly. Where it is below twice what stays, that shrinks to half of it, the oldest first.
    """

    family: ClassVar[Family] = Family.scorer
    trust: ClassVar[Trust] = Trust.parity

    lag: int = 128
    sinks: int = 4

    def __post_init__(self) -> None:
        if self.lag < 1 or self.sinks < 0:
            raise UsageError(f"method.lag={self.lag} method.sinks={self.sinks}: at least 1 and 0")

    @property
    def protect(self) -> tuple[int, int]:
        return (self.sinks, 2 * self.lag - 1)  # the most that may stay, where another method uses the scores

    def _ranked(self, tokens: int) -> int:
        """How many partitions have a full one behind them."""
        return max((tokens - self.sinks) // self.lag - 1, 0)

    def plan(self, seen: Seen, budget: Allowance) -> Plan:
        scores = [self.scores(seen, layer) for layer in range(len(seen.layers))]
        tokens = scores[0].shape[1]
        stay = max(tokens - self.sinks - self._ranked(tokens) * self.lag, 0)
        return keep_best(seen, scores, budget, self.allocate, (self.sinks, stay))

    def scores(self, seen: Seen, layer: int) -> Float[Tensor, "kv_heads tokens"]:
        x = seen.layers[layer]
        kv_heads, tokens, _ = x.key.shape
        ranked = self._ranked(tokens)
        # What has no rank comes behind all that has one, the newest first.
        scores = torch.arange(-tokens, 0, device=x.key.device).float().repeat(kv_heads, 1)
        if ranked:
            spread = (self._spread(x.key, ranked) + self._spread(x.value, ranked)) / 2
            newer = torch.arange(ranked, device=x.key.device)[:, None] / ranked  # of equal ranks the newest wins
            rank = spread.argsort(-1).argsort(-1) + newer
            scores[:, self.sinks : self.sinks + ranked * self.lag] = rank.flatten(1)
        return scores

    def _spread(self, x: Float[Tensor, "kv_heads tokens dim"], ranked: int) -> Float[Tensor, "kv_heads parts lag"]:
        """Each partition's softmax over its tokens' standard deviation over channels."""
        parts = x[:, self.sinks : self.sinks + (ranked + 1) * self.lag].float().unflatten(1, (-1, self.lag))
        low, high = parts[:, 1:].aminmax(dim=2, keepdim=True)
        scaled = (parts[:, :-1] - low) / (high - low).clamp(min=1e-6)
        return scaled.std(-1).softmax(-1)
