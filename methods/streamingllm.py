"""StreamingLLM."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from kvbench.method import Family, Method, Trust
from kvbench.prefill import Seen


@dataclass(frozen=True)
class StreamingLLM(Method):
    """Keep the first `sinks` tokens and the most recent ones (Xiao et al., arXiv 2309.17453).

    Differs: acts once, after the context is read, and keeps true positions (the paper rolls while decoding and numbers
    positions inside the cache).
    """

    family: ClassVar[Family] = Family.pattern
    trust: ClassVar[Trust] = Trust.parity

    sinks: int = 4

    @property
    def protect(self) -> tuple[int, int]:
        return (self.sinks, 0)

    def scores(self, seen: Seen, layer: int) -> Float[Tensor, "kv_heads tokens"]:
        x = seen.layers[layer]
        return x.position.float().expand(x.key.shape[:2])
