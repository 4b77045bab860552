"""LouisKV."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from kvbench.budget import Allowance
from kvbench.cache.fork import Edit, Event, Selection
from kvbench.cache.layout import index_dtype
from kvbench.errors import UsageError
from kvbench.method import Axis, Base, Family, Method, Trust
from kvbench.plan import EXACT, HOST, LayerPlan, Plan, keep_all, shrink
from kvbench.prefill import Seen
from kvbench.toolbox.offload import LEAST, Index, Room, k_means, layer_room, rows_within, to_host


class State(NamedTuple):
    units: Index
    room: Room
    first: int  # sinks
    local: int  # rows at which the local buffer is full
    floor: int  # with no more rows to be fetched than this, rows that leave the buffer join the newest unit
    cuts: tuple[int, ...] = ()  # positions at which segments begin
    previous: Tensor | None = None  # query
    fetch: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.units.nbytes + (0 if self.previous is None else self.previous.nbytes)


@dataclass(frozen=True)
class LouisKV(Method):
    """Fetch clusters of the context from the host when the queries turn to something else (LouisKV, arXiv 2510.11292).

    The keys of the context are clustered per KV head (k-means, `cluster` tokens a unit on average), the answer's tokens
    are segments. A segment ends, and units are fetched anew, where the mean cosine of the query heads to the query
    before falls below `tau`; in between the same rows are attended. The paper sets `tau` per model: 0.7 is Qwen3-8B's,
    and a stale choice costs a smaller model dearly. Units go by the softmax of the query over their mean keys, averaged
    over the query heads of a KV head, until the device is full. `sinks` and a buffer of the latest tokens, the
    context's last ones included, are always on the device. Written without the authors' code: the sizes of both,
    Lloyd's `iterations` on squared distances of keys, queries compared after the rotary embedding, and when the buffer
    lets go are ours: when `local` tokens are in it, the oldest segments leave, at least `cluster` tokens and at most
    half, as one unit. Differs: where mean keys would take more than half of what is free there are fewer clusters; a
    unit of the answer for which there is no room joins the one before; sinks and buffer shrink to half of what fits.
    """

    family: ClassVar[Family] = Family.retrieval
    trust: ClassVar[Trust] = Trust.reconstructed
    holds: ClassVar[str] = "all tokens, exact, most of them on the host, and the mean keys of clusters"
    axis: ClassVar[Axis] = Axis.DEVICE
    budget_base: ClassVar[Base] = Base.seen
    steps: ClassVar[bool] = True
    selects: ClassVar[bool] = True
    fixed_rate: ClassVar[bool] = True  # below what says which cluster a token is in there is nothing

    tau: float = 0.7
    cluster: int = 16
    sinks: int = 4
    local: int = 64
    iterations: int = 8

    def __post_init__(self) -> None:
        if self.cluster < 1 or self.sinks < 0 or self.local < 1 or self.iterations < 1:
            raise UsageError(
                f"method.cluster={self.cluster} method.sinks={self.sinks} method.local={self.local} "
                f"method.iterations={self.iterations}: all at least 1, sinks at least 0"
            )

    def plan(self, seen: Seen, budget: Allowance) -> Plan:
        room = layer_room(seen, budget)
        if room is None:
            return keep_all(seen)
        tokens, kv_heads, size = len(seen.token_ids), room.kv_heads, seen.dtype.itemsize
        number, mean = index_dtype(tokens), kv_heads * seen.dim * size
        other = kv_heads * tokens * number.itemsize + seen.network.heads * seen.dim * size + mean  # the answer's first
        free = room.fetched(tokens, LEAST, other) * room.row
        units = max(min(tokens // self.cluster, free // 2 // mean), 1)
        rows = rows_within(room, seen, budget, other + units * mean)
        first, local = shrink((self.sinks, self.local - 1), max(rows - 2, 0), tokens)
        start, end = first, tokens - (local + 1) // 2  # half of the buffer holds the context's end
        layers = []
        for i, x in enumerate(seen.layers):
            route = torch.zeros_like(x.key[..., 0], dtype=torch.int8)
            route[:, start:end] = 1
            means, unit = k_means(x.key[:, start:end], units, self.iterations, seen.generator("louiskv", i))
            index = Index(means.to(seen.dtype), unit.to(number))
            state = State(index, room, first, local + 1, (rows - first - local - 1) // 2)
            layers.append(LayerPlan((EXACT, HOST), route, state=state))
        return Plan(tuple(layers))

    def select(self, state: Any, event: Event) -> tuple[Any, Selection]:
        if state is None:
            return None, Selection()
        query, fetch = event.query[:, -1].to(state.units.mean.dtype, copy=True), state.fetch
        previous = query if state.previous is None else state.previous
        scanned = previous.nbytes
        rows = max(state.room.fetched(event.seen, state.first + state.local, state.units.nbytes + query.nbytes), 1)
        if fetch is None or bool(turn(previous, query) < self.tau):
            scores = unit_scores(query, state.units.mean, event.scale)
            fetch = state.units.best(scores, state.units.unit.shape[1], rows)
            state = state._replace(cuts=(*state.cuts, event.seen - 1))
            scanned += state.units.nbytes
        elif fetch.shape[1] > rows:
            fetch = fetch[:, :rows].clone()
        return state._replace(previous=query, fetch=fetch), Selection(fetch=fetch, scanned=scanned)

    def step(self, state: Any, event: Event) -> tuple[Any, Edit | None]:
        if state is None or event.slots - state.first < state.local:
            return state, None
        oldest, half = event.seen - (event.slots - state.first), max(state.local // 2, 1)
        ends = [cut - oldest for cut in state.cuts if self.cluster <= cut - oldest <= half]
        rows = ends[0] if ends else half
        other = state.nbytes + state.units.more(rows)
        fetched = state.room.fetched(event.seen, state.first + state.local, other)
        leaving = event.key[:, state.first : state.first + rows].float().sum(1)
        units = state.units.extended(leaving, rows, state.units.last > 0 and fetched <= state.floor)
        cuts = tuple(cut for cut in state.cuts if cut > oldest + rows)
        return state._replace(units=units, cuts=cuts), to_host(event, state.first, rows)


def turn(before: Float[Tensor, "heads dim"], now: Float[Tensor, "heads dim"]) -> Float[Tensor, ""]:
    """How alike two queries are: the mean cosine over the query heads."""
    return cosine_similarity(before.float(), now.float(), dim=-1).mean()


def unit_scores(
    query: Float[Tensor, "heads dim"], mean: Float[Tensor, "kv_heads units dim"], scale: float
) -> Float[Tensor, "kv_heads units"]:
    """What each query head's softmax gives a unit's mean key, averaged over the query heads of a KV head."""
    logits = query.float().unflatten(0, (len(mean), -1)) @ mean.float().mT * scale
    return logits.softmax(-1).mean(1)
