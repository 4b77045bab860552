"""AdaKV."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvbench.errors import UsageError
from kvbench.method import Family, Trust, Wrapper
from kvbench.prefill import Seen
from kvbench.toolbox.allocation import protected_rows, share_out
from kvbench.toolbox.routers import as_mass


@dataclass(frozen=True)
class AdaKV(Wrapper):
    """The KV heads of a layer compete for its rows with their tokens' scores (Ada-KV, Feng et al., arXiv 2407.11550).

    A head has 1 - alpha times the tokens it has among the layer's best, plus alpha times an equal share. A layer's rows
    are the base's to say: `base=pyramidkv` is the paper's Ada-Pyramid. Differs: KV heads compete, not query heads;
    whole numbers by largest remainder; where a base's scores only rank a head's tokens, the softmax of the standardised
    ones competes.
    """

    family: ClassVar[Family] = Family.allocator
    trust: ClassVar[Trust] = Trust.parity
    query_aware: ClassVar[bool] = True

    alpha: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"method.alpha={self.alpha} is not a share")

    def allocate(
        self, seen: Seen, scores: Sequence[Float[Tensor, "kv_heads tokens"]], rows: int
    ) -> Int[Tensor, "layers kv_heads"]:
        kv_heads, tokens = scores[0].shape
        first, last = protected_rows(seen, self.protect, rows)
        protected = first + last
        shares = self.scorer.allocate(seen, scores, rows).sum(1).tolist()
        pools = [max(share - kv_heads * protected, 0) for share in shares]
        won = []
        for s, pool in zip(scores, pools, strict=True):
            free = as_mass(s, self.scale)[:, first : tokens - last]
            winners = free.flatten().topk(min(pool, free.numel())).indices
            won.append(torch.bincount(winners // free.shape[1], minlength=kv_heads))
        counts = []
        for share, pool, mine in zip(shares, pools, torch.stack(won).cpu(), strict=True):
            wish = (1 - self.alpha) * mine.double() + self.alpha * pool / kv_heads
            least = min(max(protected, 1), share // kv_heads)
            counts.append(share_out((wish + protected - least).clamp(min=0), share, least, tokens))
        return torch.stack(counts)
