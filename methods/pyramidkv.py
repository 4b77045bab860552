"""PyramidKV."""

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


@dataclass(frozen=True)
class PyramidKV(Wrapper):
    """More rows for low layers, fewer for high ones, falling evenly (PyramidKV, Cai et al., arXiv 2406.02069).

    With b rows per KV head on average, the protected ones left out, the first layer has 2b - b/beta and the last b/beta
    (beta=1 is the base itself); where the first would have more than all tokens it has all, and the slope is gentler.
    Differs: whole numbers by largest remainder, so the sum is the budget's, where the released code rounds the slope
    and goes over; no fall-back to equal shares for short contexts.
    """

    family: ClassVar[Family] = Family.allocator
    trust: ClassVar[Trust] = Trust.parity
    query_aware: ClassVar[bool] = True

    beta: float = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta < 1:
            raise UsageError(f"method.beta={self.beta} is below 1: the pyramid would stand on its top")

    def allocate(
        self, seen: Seen, scores: Sequence[Float[Tensor, "kv_heads tokens"]], rows: int
    ) -> Int[Tensor, "layers kv_heads"]:
        kv_heads, tokens = scores[0].shape
        total = rows // kv_heads
        protected = sum(protected_rows(seen, self.protect, rows))
        mean = total / len(scores) - protected
        low = max(mean / self.beta, 2 * mean - (tokens - protected))
        slope = torch.linspace(2 * mean - low, low, len(scores), dtype=torch.float64)
        least = max(protected, 1)
        counts = share_out((slope + protected - least).clamp(min=0), total, least, tokens)
        return counts[:, None].expand(-1, kv_heads)
