"""PrefixKV."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvbench.method import Family, Scale, Trust, Wrapper
from kvbench.prefill import Seen
from kvbench.toolbox.allocation import protected_rows
from kvbench.toolbox.routers import as_mass


@dataclass(frozen=True)
class PrefixKV(Wrapper):
    """As many rows for each layer as it takes to keep the same share of attention in all (PrefixKV, arXiv 2412.03409).

    Scores are averaged over the KV heads of a layer, whose heads hold the same tokens. One threshold for all layers: a
    layer's best tokens are kept until they hold that share of its scores. The paper bisects on the threshold; here all
    layers' cumulative curves are sorted together, which meets the number of rows exactly. Differs: protected tokens
    count for the share that they hold; decided per context, with no table of ratios; acts once, after the context is
    read. The paper's scores are the attention of all queries: those of `base=h2o`. Protected are the first `sinks` and
    the last `recent` tokens, whatever the base would protect: snapkv as base wants `recent=64`.
    """

    family: ClassVar[Family] = Family.allocator
    trust: ClassVar[Trust] = Trust.parity
    scale = Scale.mass  # type: ignore[assignment]

    base: str = "h2o"
    sinks: int = 1
    recent: int = 1

    @property
    def protect(self) -> tuple[int, int]:
        return self.sinks, self.recent

    def scores(self, seen: Seen, layer: int) -> Float[Tensor, "kv_heads tokens"]:
        scores = as_mass(self.scorer.scores(seen, layer), self.scorer.scale)
        return scores.mean(0, keepdim=True).expand_as(scores)

    def allocate(
        self, seen: Seen, scores: Sequence[Float[Tensor, "kv_heads tokens"]], rows: int
    ) -> Int[Tensor, "layers kv_heads"]:
        kv_heads, tokens = scores[0].shape
        first, last = protected_rows(seen, self.protect, rows)
        mass = torch.stack([s.double().mean(0) for s in scores])
        mass = mass / mass.sum(1, keepdim=True)
        best = mass[:, first : tokens - last].sort(1, descending=True).values
        held = 1 - best.flip(1).cumsum(1).flip(1)  # what a layer has before each of its tokens, from the best on
        order = held.T.flatten().argsort(stable=True)  # of equal ones first those that are earlier in their layers
        free = rows // kv_heads - len(scores) * (first + last)
        counts = torch.bincount(order[:free] % len(scores), minlength=len(scores)) + first + last
        return counts[:, None].expand(-1, kv_heads)
