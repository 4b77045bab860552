"""TreeKV."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from kvbench.budget import Allowance
from kvbench.cache.fork import Event, Keep
from kvbench.errors import UsageError
from kvbench.method import Family, Method, Positions, Trust
from kvbench.plan import EVICTED, EXACT, LayerPlan, Plan, shrink, uniform_rows
from kvbench.prefill import Seen, Statistic
from kvbench.toolbox.eviction import grouped_weights, lasting_dtype, without
from kvbench.toolbox.statistics import WindowAttention

State = tuple[Tensor, int, int, int]


@dataclass(frozen=True)
class TreeKV(Method):
    """Of two neighbours one leaves at every step, in turn from old to new: a tree (He et al., arXiv 2501.04987).

    The one that got less attention per query since it came; older tokens thin out like that. Half of the rows are the
    first `sinks` tokens and the most recent ones, which stay. The context is cut in the same way, in blocks of `block`
    tokens, by the mean attention of its last `block` queries. Positions are numbered inside the cache, as in the paper,
    or the true ones (`positions=original`); true ones are held either way, for how many queries a token has seen.
    Inferred: that the most recent tokens stay while the context is cut, too; that the turn goes on from there while
    decoding; one set per KV head, by the mean over its query heads. The last block to lose keeps what the budget has
    room for, and blocks shrink so that two fit.
    """

    family: ClassVar[Family] = Family.scorer
    trust: ClassVar[Trust] = Trust.reconstructed
    query_aware: ClassVar[bool] = True
    steps: ClassVar[bool] = True

    sinks: int = 4
    block: int = 16
    positions: Positions = Positions.contiguous  # type: ignore[misc]

    def __post_init__(self) -> None:
        if self.block < 1:
            raise UsageError(f"method.block={self.block} must be at least 1")

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset({WindowAttention(self.block)})

    def plan(self, seen: Seen, budget: Allowance) -> Plan:
        rows = uniform_rows(seen, budget, EXACT, per_token=4 + lasting_dtype(seen).itemsize)
        tokens = len(seen.token_ids)
        layers = []
        for x, attention in zip(seen.layers, seen.statistics[WindowAttention(self.block)], strict=True):
            scores = attention.unflatten(0, (len(x.key), -1)).mean(1)
            kept, turn = self._cut(scores, rows)
            route = torch.where(kept, 0, EVICTED).to(torch.int8)
            state = (scores[kept].view(len(scores), -1), turn, rows, tokens)
            layers.append(LayerPlan((EXACT,), route, hold_positions=True, state=state))
        return Plan(tuple(layers))

    def _ends(self, rows: int) -> tuple[int, int]:
        """How many of the first and of the last tokens stay."""
        return shrink((self.sinks, 2**31), rows, rows + 1)

    def _cut(self, scores: Float[Tensor, "kv_heads tokens"], rows: int) -> tuple[Bool[Tensor, "kv_heads tokens"], int]:
        """Which tokens of the context stay, and the slot after the sinks whose turn it is."""
        kept = torch.ones_like(scores, dtype=torch.bool)
        leave = scores.shape[1] - rows
        if leave <= 0:
            return kept, 0
        sinks, recent = self._ends(rows)
        block = max(min(self.block, (rows - sinks - recent) // 2), 1)
        blocks = (scores.shape[1] - sinks - recent) // block
        turns = -(-leave // block)
        tree = scores[:, sinks : sinks + blocks * block].unflatten(1, (blocks, block))
        losers = compete(tree.mean(-1), blocks - turns)
        stay = torch.ones_like(tree, dtype=torch.bool).scatter(1, losers[..., None].expand(-1, -1, block), False)
        last = losers[:, -1:]  # gives up no more than needed
        best = tree.take_along_dim(last[..., None], 1)[:, 0].topk(turns * block - leave).indices
        kept[:, sinks : sinks + blocks * block] = stay.flatten(1).scatter(1, last * block + best, True)
        return kept, turns % (blocks - turns) * block

    def step(self, state: State, event: Event) -> tuple[State, Keep | None]:
        sums, turn, rows, tokens = state
        sums = pad(sums, (0, 1)) + grouped_weights(event).mean(1)
        if event.slots <= rows:
            return (sums, turn, rows, tokens), None
        assert event.position is not None
        sinks, recent = self._ends(rows)
        pair = slice(sinks + turn, sinks + turn + 2)
        queries = event.seen - event.position[:, pair].clamp(min=tokens - 1)  # the context's are one, before decoding
        left, right = (sums[:, pair] / queries).split(1, 1)
        slots = without(sinks + turn + (right <= left).long(), event.slots)
        return (sums.gather(1, slots), (turn + 1) % (rows - sinks - recent), rows, tokens), Keep(slots)


def compete(scores: Float[Tensor, "kv_heads blocks"], keep: int) -> Int[Tensor, "kv_heads turns"]:
    """The blocks that leave, in order: one for each that comes in once `keep` are there, by a turn of neighbours.

    The pairs of a sweep over all that is held don't overlap and are known before, so a sweep is one operation: there
    are as many as the blocks are more than `keep`, over `keep`.
    """
    every = torch.arange(scores.shape[1], device=scores.device).expand(len(scores), -1)
    held, losers = every[:, :keep], []
    for come in every[:, keep:].split(keep, 1):
        line = torch.cat([held, come], 1)
        pairs = line[:, : 2 * come.shape[1]].unflatten(1, (-1, 2))
        left, right = scores.gather(1, pairs.flatten(1)).unflatten(1, (-1, 2)).unbind(-1)
        weaker = (right <= left).long()[..., None]
        losers.append(pairs.take_along_dim(weaker, 2)[..., 0])
        held = torch.cat([pairs.take_along_dim(1 - weaker, 2)[..., 0], line[:, 2 * come.shape[1] :]], 1)
    return torch.cat(losers, 1)
