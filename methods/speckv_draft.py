"""SpecKV with a draft."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import max_pool1d, pad

from kvbench.budget import Allowance
from kvbench.cache.attention import attention_weights, causal_mask
from kvbench.cache.packed import CompressedCache
from kvbench.errors import UsageError
from kvbench.method import Family, Method, Trust
from kvbench.plan import EVICTED, EXACT, LayerPlan, top_rows
from kvbench.prefill import Observed, Reader
from kvbench.toolbox.drafts import SELF, draft_network, lookahead
from kvbench.toolbox.windows import then_window

AT_ONCE = 64  # queries: bounds what is built of them


@dataclass(frozen=True)
class SpecKV(Method):
    """Keep what a draft's continuation of the context attends to (SpecKV, Galim et al., arXiv 2506.08373).

    `draft` writes up to `ahead` tokens, which the model reads after the context. A layer keeps what they and the last
    `window` + 1 tokens attend to: the maximum over those queries and the query heads of a KV head, max-pooled over
    `pool` tokens; and those last tokens. A layer's exact rows, the draft's tokens among them, are let go as soon as it
    has run. `draft=self`, the default, is the model itself with its full cache: an oracle's look ahead, no saving;
    otherwise a path or hub id of a model with the same tokens. Differs: as many tokens as an answer may have are more
    than a method knows, so `ahead` is 32; the last token of the context is kept, not fed again; the prefill is dense.
    """

    family: ClassVar[Family] = Family.scorer
    trust: ClassVar[Trust] = Trust.parity
    query_aware: ClassVar[bool] = True
    holds: ClassVar[str] = "exact tokens; by default an oracle's choice"
    own_prefill: ClassVar[bool] = True

    draft: str = SELF
    ahead: int = 32
    window: int = 32
    pool: int = 7

    def __post_init__(self) -> None:
        if self.window < 0 or self.ahead < 0 or self.pool < 1 or self.pool % 2 == 0:
            raise UsageError(
                f"method.window={self.window} method.ahead={self.ahead} method.pool={self.pool}: "
                "window and ahead at least 0, pool odd"
            )

    def prefill(self, reader: Reader, budget: Allowance) -> CompressedCache:
        keep, tokens = reader.rows(budget), len(reader.token_ids)
        guess = lookahead(reader, draft_network(self.draft, reader), self.ahead)
        every = torch.cat([reader.token_ids, guess])
        hidden, position = reader.network.embed(every), torch.arange(len(every), device=every.device)
        for layer in range(reader.network.layers):
            hidden = reader.run(range(layer, layer + 1), hidden, position)
            route = top_rows(self.attention(reader.last(layer), tokens), keep, (0, self.window + 1))
            reader.pack(layer, LayerPlan((EXACT,), pad(route, (0, len(guess)), value=EVICTED)))
        return reader.cache()

    def attention(self, seen: Observed, tokens: int) -> Float[Tensor, "kv_heads tokens"]:
        """The most that a query of the window or after it pays to each token before it; the window comes last."""
        kv_heads, every, _ = seen.key.shape
        before = max(tokens - self.window - 1, 0)
        mask = causal_mask(every - before, every, seen.key.device).split(AT_ONCE)
        parts = zip(seen.query[:, before:].split(AT_ONCE, 1), mask, strict=True)
        weights = [attention_weights(q, seen.key, seen.scale, m)[..., :before].amax(1) for q, m in parts]
        most = torch.stack(weights).amax(0).unflatten(0, (kv_heads, -1)).amax(1)
        if before:
            most = max_pool1d(most, self.pool, stride=1, padding=self.pool // 2)
        return then_window(most, tokens - before)
