"""KeyDiff."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from kvbench.method import Family, Method, Trust
from kvbench.prefill import Seen


@dataclass(frozen=True)
class KeyDiff(Method):
    """Keep the keys that point away from the mean direction of all keys (Park et al., arXiv 2504.15364).

    Differs: acts once, after an exact reading of the context. The paper's memory is bounded while reading too: it cuts
    the cache after every block of tokens, so that later blocks see what earlier ones left.
    """

    family: ClassVar[Family] = Family.scorer
    trust: ClassVar[Trust] = Trust.parity

    def scores(self, seen: Seen, layer: int) -> Float[Tensor, "kv_heads tokens"]:
        direction = normalize(seen.layers[layer].key.float(), dim=-1)
        anchor = normalize(direction.mean(1, keepdim=True), dim=-1)
        return -(direction * anchor).sum(-1)
