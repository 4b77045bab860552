"""Quest."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from kvbench.budget import Allowance
from kvbench.cache.fork import Event, Selection
from kvbench.errors import UsageError
from kvbench.method import Axis, Base, Family, Method, Trust
from kvbench.plan import Plan, keep_all
from kvbench.prefill import Seen
from kvbench.toolbox.reading import best_within, keep_all_with, layer_reading


@dataclass(frozen=True)
class Quest(Method):
    """Hold everything, read the pages whose bounds promise the largest logits (Quest, Tang et al., arXiv 2406.10774).

    The smallest and largest key of each page, dimension by dimension, bound a query's logits in it. Every query head
    reads its own best pages; the heads of a group read equally many, so that what the group reads, bounds included, is
    within the budget: a paper's count of pages would not bound it. Differs: the page that is being filled is always
    read; all tokens after the context choose, the question's too; `dense=2`, the paper's first layers that read
    everything, is not the default, since at small budgets that is most of what may be read.
    """

    family: ClassVar[Family] = Family.retrieval
    trust: ClassVar[Trust] = Trust.parity
    holds: ClassVar[str] = "all tokens, exact, and bounds of the keys of each page"
    axis: ClassVar[Axis] = Axis.READ
    budget_base: ClassVar[Base] = Base.seen
    selects: ClassVar[bool] = True
    fixed_rate: ClassVar[bool] = True  # below the bounds and a page per query head there is nothing

    page: int = 16
    dense: int = 0

    def __post_init__(self) -> None:
        if self.page < 1 or self.dense < 0:
            raise UsageError(f"method.page={self.page} method.dense={self.dense}: at least 1, and 0")

    def plan(self, seen: Seen, budget: Allowance) -> Plan:
        network, tokens = seen.network, len(seen.token_ids)
        row = network.row_bytes() // network.layers  # of a token, and of a page's bounds
        pages = tokens // self.page
        least = (pages + self.page + network.heads // network.kv_heads * self.page) * row
        reading = layer_reading(seen, budget, least, self.dense)
        if reading.everything:
            return keep_all(seen)
        layers = enumerate(seen.layers)
        return keep_all_with(
            seen, (None if i < self.dense else (reading, *self.bounds(x.key, 0, pages)) for i, x in layers)
        )

    def bounds(self, key: Float[Tensor, "kv_heads rows dim"], start: int, end: int) -> tuple[Tensor, Tensor]:
        """The smallest and the largest key of some pages."""
        pages = key[:, start * self.page : end * self.page].unflatten(1, (end - start, self.page))
        return pages.amin(2), pages.amax(2)

    def select(self, state: Any, event: Event) -> tuple[Any, Selection]:
        if state is None or state[0].all(event.slots):
            return state, Selection()
        reading, *bounds = state
        kv_heads, held, _ = bounds[0].shape
        pages = (event.slots - 1) // self.page  # before the one that is being filled
        if pages > held:
            new = self.bounds(event.key, held, pages)
            bounds = [torch.cat([x, more.to(x.dtype)], 1) for x, more in zip(bounds, new, strict=True)]
        scanned = sum(x.nbytes for x in bounds)
        most = (reading.rows(event, scanned) - (event.slots - pages * self.page)) // self.page
        chosen = best_within(promise(event.query[:, 0], *bounds), kv_heads, max(most, 0))
        read = pad(chosen.repeat_interleave(self.page, 1), (0, event.slots - pages * self.page), value=True)
        return (reading, *bounds), Selection(read[:, None], scanned=scanned)


def promise(
    query: Float[Tensor, "heads dim"],
    low: Float[Tensor, "kv_heads pages dim"],
    high: Float[Tensor, "kv_heads pages dim"],
) -> Float[Tensor, "heads pages"]:
    """An upper bound of each query's products with the keys of each page, in float32."""
    group = len(query) // len(low)
    query = query.float()[:, None]
    ends = [query * x.float().repeat_interleave(group, 0) for x in (low, high)]
    return torch.maximum(*ends).sum(-1)
