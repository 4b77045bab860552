"""KVzip."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvbench.errors import UsageError
from kvbench.method import Family, Method, Scale, Trust
from kvbench.prefill import Seen, Statistic
from kvbench.toolbox.statistics import Reconstruction


@dataclass(frozen=True)
class KVzip(Method):
    """Keep what the model looks at when it repeats its context (KVzip, Kim et al., arXiv 2505.23416).

    One threshold for all layers and KV heads: each gets as many rows as its scores earn, one at least, and the first
    `sinks` tokens stay everywhere, as do the last `window` (ours; none by default). Differs: no instruction to repeat
    goes before the repetition, only the last tokens of the chunk before; the template's head is scored like the rest of
    the context. Costs about two more prefills.
    """

    family: ClassVar[Family] = Family.scorer
    trust: ClassVar[Trust] = Trust.paper
    scale: ClassVar[Scale] = Scale.mass

    chunk: int = 2048
    sinks: int = 4
    window: int = 0

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise UsageError(f"method.chunk={self.chunk} is not at least 1")
        if self.window < 0:
            raise UsageError(f"method.window={self.window} is not at least 0")

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset({Reconstruction(self.chunk, self.sinks)})

    @property
    def protect(self) -> tuple[int, int]:
        return (self.sinks, self.window)

    def scores(self, seen: Seen, layer: int) -> Float[Tensor, "kv_heads tokens"]:
        return seen.statistics[Reconstruction(self.chunk, self.sinks)][layer]

    def allocate(
        self, seen: Seen, scores: Sequence[Float[Tensor, "kv_heads tokens"]], rows: int
    ) -> Int[Tensor, "layers kv_heads"]:
        every = torch.stack(list(scores))
        heads, tokens = every.shape[0] * every.shape[1], every.shape[2]
        first, last = self.protected(rows // heads, tokens)
        free = every[..., first : tokens - last].flatten(0, 1)
        free = free.scatter(1, free.argmax(1, keepdim=True), torch.inf)  # one of each head, whatever it scores
        best = free.flatten().topk(min(rows - (first + last) * heads, free.numel())).indices
        return first + last + torch.bincount(best // free.shape[1], minlength=heads).view(every.shape[:2])
