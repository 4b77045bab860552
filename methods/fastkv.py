"""FastKV."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool1d

from kvbench.budget import Allowance
from kvbench.cache.attention import attention_weights, causal_mask
from kvbench.cache.layout import look_up
from kvbench.cache.packed import CompressedCache
from kvbench.errors import UsageError
from kvbench.method import Family, Method, Trust
from kvbench.plan import EXACT, LayerPlan, top_rows
from kvbench.prefill import Observed, Reader
from kvbench.toolbox.windows import then_window


@dataclass(frozen=True)
class FastKV(Method):
    """From a middle layer on, read only the tokens that it attends to (FastKV, Jo et al., arXiv 2502.01068).

    Every layer keeps what its last `window` queries attend to, average-pooled over `pool` tokens and summed over the
    query heads of a KV head, and that window. After layer `layer` (default: the last of the lower half, as in the
    paper) only the share `passed` of the tokens goes on, the same for all heads, at the positions they had; never
    fewer than are kept. A layer's exact rows are let go as soon as it has run. Differs: each layer keeps as many rows
    as the budget holds, where the paper's rounding may leave the upper ones a row less.
    """

    family: ClassVar[Family] = Family.scorer
    trust: ClassVar[Trust] = Trust.parity
    query_aware: ClassVar[bool] = True
    own_prefill: ClassVar[bool] = True

    passed: float = 0.2
    layer: int | None = None
    window: int = 8
    pool: int = 7

    def __post_init__(self) -> None:
        if self.window < 1 or self.pool < 1 or self.pool % 2 == 0:
            raise UsageError(f"method.window={self.window} method.pool={self.pool}: both at least 1, pool odd")
        if not 0 < self.passed <= 1:
            raise UsageError(f"method.passed={self.passed} is not a share of the tokens")

    def prefill(self, reader: Reader, budget: Allowance) -> CompressedCache:
        keep, layers = reader.rows(budget), reader.network.layers
        last = max(layers // 2 - 1, 0) if self.layer is None else min(self.layer, layers - 1)
        position = torch.arange(len(reader.token_ids), device=reader.token_ids.device)
        hidden = reader.embed()
        for layer in range(layers):
            hidden = reader.run(range(layer, layer + 1), hidden, position)
            scores = self.attention(reader.last(layer))
            if layer == last:
                passed = max(int(self.passed * len(position)), keep)
                [on] = (top_rows(scores.sum(0, keepdim=True), passed, (0, self.window)) == 0).nonzero(as_tuple=True)[1:]
                hidden, position = hidden[on], look_up(position, on)
            reader.pack(layer, LayerPlan((EXACT,), top_rows(scores, keep, (0, self.window))))
        return reader.cache()

    def attention(self, seen: Observed) -> Float[Tensor, "kv_heads tokens"]:
        """What the window's queries pay to each token before it; the window itself comes last."""
        kv_heads, tokens, _ = seen.key.shape
        window = min(self.window, tokens)
        query = seen.query[:, -window:]
        weights = attention_weights(query, seen.key, seen.scale, causal_mask(window, tokens, query.device))
        paid = weights[..., : tokens - window].sum(1)
        if tokens > window:
            paid = avg_pool1d(paid, self.pool, stride=1, padding=self.pool // 2)
        return then_window(paid.unflatten(0, (kv_heads, -1)).sum(1), window)
