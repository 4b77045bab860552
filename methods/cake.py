"""CAKE."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvbench.errors import UsageError
from kvbench.method import Family, Trust, Wrapper
from kvbench.prefill import Seen, Statistic
from kvbench.toolbox.allocation import protected_rows, share_out
from kvbench.toolbox.statistics import WindowMoments


@dataclass(frozen=True)
class Cake(Wrapper):
    """More rows for layers that attend widely and changeably (CAKE, Qin et al., arXiv 2503.12491).

    A layer's share goes with E^(1/tau1) x V^(1/tau2): entropy and variance over time of the attention that the last
    `window` queries pay to the tokens before them, summed over query heads and tokens. `base=cake_scores` has the
    paper's own scores. Differs: all layers are cut at once after the context is read, which keeps what cutting layer by
    layer does; nothing is evicted while decoding; tau1 and tau2 are 1, as for models they were not tuned for.
    """

    family: ClassVar[Family] = Family.allocator
    trust: ClassVar[Trust] = Trust.parity
    query_aware: ClassVar[bool] = True

    base: str = "cake_scores"
    window: int = 32
    tau1: float = 1
    tau2: float = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 2 or min(self.tau1, self.tau2) <= 0:
            raise UsageError(f"method.window={self.window}: at least 2; tau1 and tau2 above 0")

    @property
    def needs(self) -> frozenset[Statistic]:
        return super().needs | {WindowMoments(self.window)}

    def allocate(
        self, seen: Seen, scores: Sequence[Float[Tensor, "kv_heads tokens"]], rows: int
    ) -> Int[Tensor, "layers kv_heads"]:
        kv_heads, tokens = scores[0].shape
        before = max(tokens - self.window, 0)
        moments = [x[1:, :, :before].double().sum((1, 2)) for x in seen.statistics[WindowMoments(self.window)]]
        sums = torch.stack(seen.network.gather(moments))
        preference = sums[:, 1] ** (1 / self.tau1) * sums[:, 0] ** (1 / self.tau2)
        least = max(sum(protected_rows(seen, self.protect, rows)), 1)
        counts = share_out(preference, rows // kv_heads, least, tokens)
        return counts[:, None].expand(-1, kv_heads)
