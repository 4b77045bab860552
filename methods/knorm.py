"""Knorm."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from kvbench.method import Family, Method, Trust
from kvbench.prefill import Seen


@dataclass(frozen=True)
class Knorm(Method):
    """Keep the keys with the smallest L2 norm (Devoto et al., arXiv 2406.11430).

    Differs: acts once, after the context is read, and on every layer (the authors leave the first two alone and prune
    again while decoding). Models that normalise their keys (Qwen3) leave less in the norms to go by.
    """

    family: ClassVar[Family] = Family.scorer
    trust: ClassVar[Trust] = Trust.parity

    def scores(self, seen: Seen, layer: int) -> Float[Tensor, "kv_heads tokens"]:
        return -seen.layers[layer].key.float().norm(dim=-1)
