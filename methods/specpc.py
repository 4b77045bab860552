"""SpecPC."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import max_pool1d

from kvbench.budget import Allowance
from kvbench.cache.attention import attention_weights, causal_mask
from kvbench.cache.packed import CompressedCache
from kvbench.errors import UsageError
from kvbench.method import Family, Method, Trust
from kvbench.plan import keep_all, shrink
from kvbench.prefill import Reader
from kvbench.toolbox.drafts import SELF, draft_network

START = 8  # the first layer of a draft that is listened to; half of a draft that has no more


@dataclass(frozen=True)
class SpecPC(Method):
    """Shorten the prompt to what a draft attends to, then read it (SpecPC, Galim et al., arXiv 2506.08373).

    A token's score is the most attention that the draft's last `window` queries, the later ones counting more, pay to
    it in any head of its layers from the ninth on, max-pooled over `pool` tokens. The best tokens come with their
    `neighbours` nearest ones, and the last `window` tokens always. The model reads them as a prompt of their own, at
    positions from 0 on with no gaps, and goes on from there: a token's position is not the one it had. `draft` is the
    model itself (`self`, the default: no saving), or a path or hub id of a model with the same tokens. Differs: in a
    draft of fewer than nine layers the upper half counts; the window shrinks to half of what is kept.
    """

    family: ClassVar[Family] = Family.scorer
    trust: ClassVar[Trust] = Trust.parity
    query_aware: ClassVar[bool] = True
    holds: ClassVar[str] = "a shorter prompt"
    own_prefill: ClassVar[bool] = True

    draft: str = SELF
    window: int = 64
    pool: int = 32
    neighbours: int = 32

    def __post_init__(self) -> None:
        if self.window < 1 or self.pool < 1 or self.neighbours < 0:
            raise UsageError(
                f"method.window={self.window} method.pool={self.pool} method.neighbours={self.neighbours}: "
                "window and pool at least 1, neighbours at least 0"
            )

    def prefill(self, reader: Reader, budget: Allowance) -> CompressedCache:
        keep = reader.rows(budget)
        chosen = self.choose(self.attention(reader), keep)
        seen = reader.read(reader.token_ids[chosen])
        return CompressedCache.pack(keep_all(seen), seen)

    def attention(self, reader: Reader) -> Float[Tensor, " tokens"]:
        """The most that a query of the draft's window pays to each token, before pooling."""
        draft = draft_network(self.draft, reader)
        tokens = len(reader.token_ids)
        window = min(self.window, tokens)
        own = Reader(draft, reader.token_ids)
        hidden, position = own.embed(), torch.arange(tokens, device=reader.token_ids.device)
        most = torch.zeros(tokens, device=position.device)
        with reader.drafting(draft):
            for layer in range(draft.layers):
                hidden = own.run(range(layer, layer + 1), hidden, position)
                if layer >= min(START, draft.layers // 2):
                    seen = own.last(layer)
                    mask = causal_mask(window, tokens, seen.key.device)
                    late = torch.linspace(0, 1, window, device=seen.key.device)[:, None]
                    weights = attention_weights(seen.query[:, -window:], seen.key, seen.scale, mask)
                    most = most.maximum((weights * late).amax((0, 1)).to(most.device))
                own.drop(layer)
        reader.holds(own.costs.bytes_prefill)
        return most

    def choose(self, attention: Float[Tensor, " tokens"], keep: int) -> Int[Tensor, " keep"]:
        """Which tokens stay, in their order."""
        tokens = len(attention)
        scores = max_pool1d(attention[None], self.pool, stride=1, padding=self.pool // 2)[0, :tokens]
        best = scores.sort(descending=True, stable=True).indices[:keep]
        side = torch.arange(1, self.neighbours // 2 + 1, device=best.device)
        around = torch.cat([side.new_zeros(1), torch.stack([-side, side], 1).flatten()])
        found = (best[:, None] + around).flatten()  # the best one, its neighbours from near to far, the second best ...
        turn = torch.arange(len(found), device=best.device)
        inside = (found >= 0) & (found < tokens)
        first = torch.full_like(attention, len(found), dtype=torch.long)
        first = first.scatter_reduce(0, found[inside], turn[inside], "amin")
        first[tokens - shrink((0, self.window), keep, tokens)[1] :] = -1
        return first.argsort(stable=True)[:keep].sort().values
