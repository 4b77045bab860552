"""TOVA."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from kvbench.method import Family, Method, Scale, Trust
from kvbench.prefill import Seen, Statistic
from kvbench.toolbox.statistics import WindowAttention


@dataclass(frozen=True)
class TOVA(Method):
    """Keep what the newest token attends to, the same tokens in all heads of a layer (Oren et al., arXiv 2401.06104).

    Attention is averaged over the layer's heads; neither first nor recent tokens are protected. Differs: acts once,
    after the context is read (the paper drops a token at every step); under `protocol=blind` the newest token is the
    context's last one, whatever that is.
    """

    family: ClassVar[Family] = Family.scorer
    trust: ClassVar[Trust] = Trust.parity
    query_aware: ClassVar[bool] = True
    scale: ClassVar[Scale] = Scale.mass

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset({WindowAttention(1)})

    def scores(self, seen: Seen, layer: int) -> Float[Tensor, "kv_heads tokens"]:
        attention = seen.statistics[WindowAttention(1)][layer]
        return attention.mean(0).expand(seen.layers[layer].key.shape[0], -1)
