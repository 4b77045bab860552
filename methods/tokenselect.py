"""TokenSelect."""

from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from kvbench.budget import Allowance
from kvbench.cache.fork import Event, Selection
from kvbench.cache.rope import rotate, unrotate
from kvbench.errors import UsageError
from kvbench.method import Axis, Base, Family, Method, Positions, Trust
from kvbench.plan import Plan, keep_all
from kvbench.prefill import Seen
from kvbench.toolbox.reading import keep_all_with, layer_reading


@dataclass(frozen=True)
class TokenSelect(Method):
    """Hold everything, read sinks, a window and the tokens that all heads of a layer vote for (arXiv 2411.02886).

    TokenSelect (Wu et al.): each query head's softmax over the keys is its vote; all heads of a layer read the same
    tokens. Queries vote as if every key were at one distance, `window` tokens away, and attend as if the tokens that
    are read stood next to each other (`positions=original`: where they are). Keys are read once to vote: with less than
    half of the cache there is no room to read. Sinks and window shrink, in proportion, to half of the tokens that are
    read; the paper's budget is of 2,048 tokens besides them. Differs: the context is read exactly (the paper selects
    there, too, in chunks); every token selects anew, as in the released code: the paper re-uses the choice for a query
    much like the last one; of votes that are alike to a hundredth, as those of a token's copies are in the first layer,
    the later counts more.
    """

    family: ClassVar[Family] = Family.retrieval
    trust: ClassVar[Trust] = Trust.parity
    holds: ClassVar[str] = "all tokens, exact"
    axis: ClassVar[Axis] = Axis.READ
    budget_base: ClassVar[Base] = Base.seen
    selects: ClassVar[bool] = True
    fixed_rate: ClassVar[bool] = True  # below the keys of all tokens there is nothing

    sinks: int = 128
    window: int = 512
    positions: Positions = Positions.contiguous  # type: ignore[misc]

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.window < 1:
            raise UsageError(f"method.sinks={self.sinks} method.window={self.window}: at least 0, and 1")

    def plan(self, seen: Seen, budget: Allowance) -> Plan:
        row = seen.network.row_bytes() // len(seen.layers)
        reading = layer_reading(seen, budget, (len(seen.token_ids) + 1) * row // 2 + 2 * row)
        return keep_all(seen) if reading.everything else keep_all_with(seen, [reading] * len(seen.layers))

    def ends(self, rows: int) -> tuple[int, int]:
        """How many of the first and of the last tokens are read."""
        share = min(1, rows / 2 / (self.sinks + self.window))
        return int(share * self.sinks), max(int(share * self.window), 1)

    def select(self, state: Any, event: Event) -> tuple[Any, Selection]:
        if state is None or state.all(event.slots):
            return state, Selection()
        key = state.row // 2  # bytes of a token's keys
        first, last = self.ends(state.rows(event, event.slots * key))
        start, end = first, event.slots - last
        rows = max(state.rows(event, (end - start) * key), first + last)
        place = event.position
        assert place is not None
        query = rotate(event.query, (last - place[:1, -1:]).expand(len(event.query), 1), event.rope)
        bare = unrotate(event.key[:, start:end], *event.rope(place[0, start:end]))
        rank = (100 * votes(query[:, 0], bare)).round().flip(0).argsort(descending=True, stable=True)
        best = end - 1 - rank[: rows - first - last]
        read = ((place[0] < start) | (place[0] >= end)).scatter(0, best, True)
        return state, Selection(read[None, None], scanned=(end - start) * key)


def votes(query: Float[Tensor, "heads dim"], key: Float[Tensor, "kv_heads tokens dim"]) -> Float[Tensor, " tokens"]:
    """What all heads give each token: every head has one vote, split by a softmax of its logits.

    As logarithms, in float32: the shares themselves would round to 0 for tokens that are still to be ranked.
    """
    logits = query.float().unflatten(0, (len(key), -1)) @ key.float().mT
    return logits.log_softmax(-1).logsumexp((0, 1))
