"""SentenceKV."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import max_pool1d

from kvbench.artefact import Calibration
from kvbench.budget import Allowance
from kvbench.cache.fork import Edit, Event, Selection
from kvbench.cache.layout import index_dtype, look_up
from kvbench.errors import UsageError
from kvbench.method import Axis, Base, Family, Method, Trust
from kvbench.plan import EVICTED, EXACT, HOST, LayerPlan, Plan, keep_all, top_rows
from kvbench.prefill import Seen, Statistic
from kvbench.toolbox.merging import rows as take
from kvbench.toolbox.offload import Index, Room, layer_room, rows_within, to_host, unit_means
from kvbench.toolbox.sentences import SentenceEnds, sentences
from kvbench.toolbox.statistics import WindowAttention
from kvbench.toolbox.windows import then_window


class State(NamedTuple):
    units: Index
    room: Room
    first: int  # rows of the start that stay on the device
    recent: int
    floor: int  # with no more rows to be fetched than this, a sentence gets no mean of its own
    ends: frozenset[int]
    key: Tensor  # sums over the sentence being written: of its keys, and of its queries' means over a group
    query: Tensor
    tokens: int = 0  # of that sentence


@dataclass(frozen=True)
class SentenceKV(Method):
    """Evict, and fetch whole sentences of the rest from the host, by their mean keys (SentenceKV, arXiv 2504.00970).

    The context keeps `factor` times the tokens that fit on the device: those that its last `window` queries attend to
    (max-pooled over `pool`), and that window. Its first `start` kept tokens and the latest `recent` ones stay on the
    device, the others go to the host. At every step the sentences whose mean key has the largest product with the mean
    query of the sentence being written are fetched until the device is full, mean keys included. Differs: one set of
    tokens and of sentences per KV head, by the means over its query heads (the code copies keys and values for each);
    the first token of a sentence chooses with its own query (the code reads all that is kept, which no budget
    bounds); a sentence of the answer for which there is no room joins the one before; up to half as many more tokens
    than `recent` are on the device, since they leave it in blocks; `start` and `recent` shrink, in proportion, to half
    of what fits.
    """

    family: ClassVar[Family] = Family.retrieval
    trust: ClassVar[Trust] = Trust.parity
    query_aware: ClassVar[bool] = True
    holds: ClassVar[str] = "exact tokens, most of them on the host, and the mean keys of sentences"
    axis: ClassVar[Axis] = Axis.DEVICE
    budget_base: ClassVar[Base] = Base.seen
    steps: ClassVar[bool] = True
    selects: ClassVar[bool] = True
    fixed_rate: ClassVar[bool] = True  # below the mean keys there is nothing

    factor: int = 3
    window: int = 32
    pool: int = 7
    start: int = 32
    recent: int = 32

    def __post_init__(self) -> None:
        if self.factor < 1 or self.window < 1 or self.pool < 1 or self.pool % 2 == 0:
            raise UsageError(
                f"method.factor={self.factor} method.window={self.window} method.pool={self.pool}: "
                "all at least 1, pool odd"
            )
        if self.start < 0 or self.recent < 1:
            raise UsageError(f"method.start={self.start} method.recent={self.recent}: at least 0, and 1")

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset({WindowAttention(self.window)})

    @property
    def calibrations(self) -> frozenset[Calibration]:
        return frozenset({SentenceEnds()})

    def scores(self, seen: Seen, layer: int) -> Float[Tensor, "kv_heads tokens"]:
        attention = seen.statistics[WindowAttention(self.window)][layer]
        window = min(self.window, attention.shape[1])
        before = attention[:, : attention.shape[1] - window]
        if before.shape[1]:
            before = max_pool1d(before, self.pool, stride=1, padding=self.pool // 2)
        return then_window(before.unflatten(0, (len(seen.layers[layer].key), -1)).mean(1), window)

    def plan(self, seen: Seen, budget: Allowance) -> Plan:
        room = layer_room(seen, budget)
        if room is None:
            return keep_all(seen)
        ends = seen.artefacts[SentenceEnds()].tensors["ids"]
        sentence, stops = sentences(seen.token_ids, ends), frozenset(ends.tolist())
        count, tokens = int(sentence[-1]) + 1, len(sentence)
        number = index_dtype(tokens)
        kv_heads, dim = room.kv_heads, seen.dim
        other = kv_heads * dim * ((count + 1) * seen.dtype.itemsize + 2 * 4)
        rows = rows_within(room, seen, budget, other, kv_heads * number.itemsize * self.factor)
        share = min(1, (rows - 1) / 2 / (self.start + self.recent * 1.5))
        first, recent = int(share * self.start), int(share * self.recent)
        kept = min(self.factor * rows, tokens)
        floor = (rows - first - recent - _block(recent)) // 2
        layers = []
        for i, x in enumerate(seen.layers):
            route = top_rows(self.scores(seen, i), kept, (0, self.window))
            at = (route != EVICTED).nonzero()[:, 1].view(kv_heads, kept)
            unit = look_up(sentence, at)
            mean = unit_means(take(x.key, at), unit, count).to(seen.dtype)
            route = route.scatter(1, at[:, first : kept - recent], 1)
            nothing = torch.zeros(kv_heads, dim, device=x.key.device)
            units = Index(mean, unit[:, first:].to(number))
            state = State(units, room, first, recent, floor, stops, nothing, nothing.clone())
            layers.append(LayerPlan((EXACT, HOST), route, state=state))
        return Plan(tuple(layers))

    def select(self, state: Any, event: Event) -> tuple[Any, Selection]:
        if state is None:
            return None, Selection()
        units, room = state.units, state.room
        query = state.query + event.query[:, -1].float().unflatten(0, (room.kv_heads, -1)).mean(1)
        scores = (units.mean.float() @ query[..., None])[..., 0]
        host = event.packed.host
        assert host is not None
        fetch = units.best(scores, host.layout.width, max(self._room(state, event), 1))
        return state._replace(query=query), Selection(fetch=fetch, scanned=units.nbytes)

    def step(self, state: Any, event: Event) -> tuple[Any, Edit | None]:
        if state is None:
            return None, None
        state = state._replace(key=state.key + event.key[:, -1].float(), tokens=state.tokens + 1)
        if int(event.token_ids[-1]) in state.ends:
            join = state.units.last > 0 and self._room(state, event) <= state.floor
            units = state.units.extended(state.key, state.tokens, join)
            nothing = torch.zeros_like(state.key)
            state = state._replace(units=units, key=nothing, query=nothing.clone(), tokens=0)
        old = event.slots - state.first - state.recent
        return state, to_host(event, state.first, old) if old >= _block(state.recent) else None

    def _room(self, state: State, event: Event) -> int:
        """Rows that can be fetched, if the sentence being written ends now and gets a mean of its own."""
        other = state.units.nbytes + state.units.more(state.tokens + 1) + state.key.nbytes + state.query.nbytes
        return state.room.fetched(event.seen, event.slots, other)


def _block(recent: int) -> int:
    """Tokens that leave the device together."""
    return max(recent // 2, 1)
