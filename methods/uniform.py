"""Uniform allocation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from kvbench.method import Family, Trust, Wrapper
from kvbench.plan import equal_shares
from kvbench.prefill import Seen


@dataclass(frozen=True)
class Uniform(Wrapper):
    """The same number of rows for every KV head of every layer, whatever the base would give them (no paper).

    What an allocator adds is what it adds to this: `base=kvzip` is KVzip without its global threshold.
    """

    family: ClassVar[Family] = Family.allocator
    trust: ClassVar[Trust] = Trust.parity
    query_aware: ClassVar[bool] = True

    def allocate(
        self, seen: Seen, scores: Sequence[Float[Tensor, "kv_heads tokens"]], rows: int
    ) -> Int[Tensor, "layers kv_heads"]:
        return equal_shares(seen, rows)
