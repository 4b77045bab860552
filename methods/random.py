"""Random eviction."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from kvbench.method import Family, Method, Scale, Trust
from kvbench.prefill import Seen


@dataclass(frozen=True)
class Random(Method):
    """Keep tokens drawn at random, KV head by KV head: the floor that every method must beat (no paper).

    `sinks` and `window` protect the first and last tokens: what a scorer adds is what it adds to that.
    """

    family: ClassVar[Family] = Family.reference
    trust: ClassVar[Trust] = Trust.paper
    scale: ClassVar[Scale] = Scale.mass

    seed: int = 0
    sinks: int = 0
    window: int = 0

    @property
    def protect(self) -> tuple[int, int]:
        return (self.sinks, self.window)

    def scores(self, seen: Seen, layer: int) -> Float[Tensor, "kv_heads tokens"]:
        key = seen.layers[layer].key
        return torch.rand(key.shape[:2], generator=seen.generator(self.seed, layer)).to(key.device)
