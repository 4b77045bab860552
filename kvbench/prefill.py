"""Reading a context exactly, once, and what is seen on the way."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from kvbench.budget import Allowance
from kvbench.cache.packed import CompressedCache, PackedLayer, nbytes
from kvbench.measure.clock import Stopwatch
from kvbench.plan import Infeasible, LayerPlan, Plan

if TYPE_CHECKING:
    from kvbench.artefact import Artefact, Calibration
    from kvbench.cache.hf import Network
    from kvbench.model import Model


@dataclass(frozen=True)
class Observed:
    """What a statistic sees of one layer: a chunk of queries (positions start .. start + new) and all keys so far."""

    layer: int
    query: Float[Tensor, "heads new dim"]  # after the rotary embedding
    key: Float[Tensor, "kv_heads seen dim"]
    value: Float[Tensor, "kv_heads seen dim"]
    start: int
    total: int  # tokens of the whole context
    scale: float
    rope: Callable[[Int[Tensor, ...]], tuple[Tensor, Tensor]] | None = None  # (cos, sin) at any positions


class Statistic:
    """A frozen dataclass: what is gathered of a context, one value a layer. Equal statistics are gathered once.

    `observe` sees the layers while the context is read; `finish` may then feed further tokens (see `look_ahead`).
    """

    def observe(self, state: Any, seen: Observed) -> Any:
        """The layer's value after one more chunk; `state` is None at the first one."""
        return state

    def finish(self, values: tuple[Any, ...], seen: Seen) -> tuple[Any, ...]:
        """The values, layer by layer, once the context has been read; `seen` has no statistics yet."""
        return values


@dataclass(frozen=True)
class Costs:
    """What reading a context takes besides seconds: the names are those of docs/metrics.md."""

    bytes_prefill: int = 0
    tokens_prefill: float = 0.0
    tokens_draft: float = 0.0


@dataclass(frozen=True)
class SeenLayer:
    """The exact rows of a layer. Shared by all cells: never changed."""

    key: Float[Tensor, "kv_heads tokens dim"]  # after the rotary embedding
    value: Float[Tensor, "kv_heads tokens dim"]
    position: Int[Tensor, " tokens"]


@dataclass(frozen=True)
class Seen:
    """What one exact prefill saw: all that a method's plan may depend on."""

    layers: tuple[SeenLayer, ...]
    token_ids: Int[Tensor, " tokens"]
    network: Network
    context_id: str = ""
    costs: Costs = Costs()  # of reading, statistics left out
    statistics: Mapping[Statistic, tuple[Any, ...]] = field(default_factory=dict)  # one value a layer
    seconds: Mapping[Statistic, float] = field(default_factory=dict)  # what gathering them took
    passed: Mapping[Statistic, float] = field(default_factory=dict)  # tokens that gathering them sent through the model
    artefacts: Mapping[Calibration, Artefact] = field(default_factory=dict)  # of the method's `calibrations`

    @property
    def next_position(self) -> int:
        return len(self.token_ids)

    @property
    def dim(self) -> int:
        return self.network.dim

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0].key.dtype

    @property
    def vocabulary(self) -> int:
        return self.network.vocabulary

    def generator(self, *names: object) -> torch.Generator:
        """A CPU generator seeded by the context and `names`: the same draws on any device, in any order of cells."""
        digest = hashlib.sha256("|".join(map(str, (self.context_id, *names))).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))


class Recorder:
    """The cache of one layer during an exact prefill: attends causally, keeps the rows, feeds the statistics."""

    def __init__(
        self,
        layer: int,
        total: int,
        network: Network,
        statistics: Iterable[Statistic],
        clocks: dict[Statistic, Stopwatch],
    ) -> None:
        self.layer, self.total, self.network, self.clocks = layer, total, network, clocks
        self.key: Tensor | None = None
        self.value: Tensor | None = None
        self.observed: dict[Statistic, Any] = dict.fromkeys(statistics)
        self.watched = False  # whether `last` is kept
        self.last: Observed | None = None

    def attend(
        self,
        query: Float[Tensor, "1 heads new dim"],
        key: Float[Tensor, "1 kv_heads new dim"],
        value: Float[Tensor, "1 kv_heads new dim"],
        scale: float,
    ) -> Float[Tensor, "1 heads new dim"]:
        start = 0 if self.key is None else self.key.shape[1]
        new_key, new_value = (x[0].to(self.network.dtype).contiguous() for x in (key, value))
        if self.key is None or self.value is None:
            self.key, self.value = new_key, new_value
        else:
            self.key, self.value = torch.cat([self.key, new_key], 1), torch.cat([self.value, new_value], 1)
            key, value = (x[None].to(query.dtype) for x in (self.key, self.value))
        new = query.shape[2]
        mask = causal_lower_right(new, start + new) if start else None
        out = scaled_dot_product_attention(query, key, value, mask, is_causal=not start, scale=scale, enable_gqa=True)
        seen = Observed(self.layer, query[0], self.key, self.value, start, self.total, scale, self.network.rope)
        self.last = seen if self.watched else None
        for statistic in self.observed:
            with self.clocks[statistic]:
                self.observed[statistic] = statistic.observe(self.observed[statistic], seen)
        return out

    @property
    def rows(self) -> list[Tensor]:
        """The keys and values held."""
        return [x for x in (self.key, self.value) if x is not None]

    def drop(self) -> None:
        self.key = self.value = self.last = None


def read_exactly(
    network: Network,
    ids: Int[Tensor, " tokens"],
    statistics: Iterable[Statistic] = (),
    context_id: str = "",
    chunk: int = 65536,
) -> Seen:
    """One causal pass over a context, in chunks of `chunk` tokens; scaled-dot-product attention, no T x T matrix."""
    reader = Reader(network, ids, statistics, context_id)
    for start in range(0, len(ids), chunk):
        part = ids[start : start + chunk][None]
        position = torch.arange(start, start + part.shape[1], device=ids.device)[None]
        network.hidden(part, position, reader.recorders)
    return reader.seen()


class Reader:
    """What a method with an own prefill reads a context with: its tokens, the model layer by layer, and the bill.

    A layer that has been run holds its exact rows until it is packed or dropped.
    """

    def __init__(
        self,
        network: Network,
        ids: Int[Tensor, " tokens"],
        statistics: Iterable[Statistic] = (),
        context_id: str = "",
        artefacts: Mapping[Calibration, Artefact] | None = None,
        model: Model | None = None,
    ) -> None:
        self.network, self.token_ids, self.context_id = network, ids, context_id
        self.artefacts = artefacts or {}
        self.model = model  # whose network it is
        statistics = list(statistics)
        self._clocks = {s: Stopwatch(*network.devices) for s in statistics}
        self.recorders = [Recorder(i, len(ids), network, statistics, self._clocks) for i in range(network.layers)]
        self._positions: dict[int, Tensor] = {}
        self._packed: dict[int, CompressedCache] = {}  # of one layer each
        self._peak = 0
        self._draft = 0.0
        self._started = network.passed
        self._ended: int | None = None

    def embed(self) -> Float[Tensor, "tokens hidden"]:
        return self.network.embed(self.token_ids)

    def run(
        self, layers: range, hidden: Float[Tensor, "tokens hidden"], position: Int[Tensor, " tokens"]
    ) -> Float[Tensor, "tokens hidden"]:
        """Runs some layers over hidden states; they keep their rows."""
        for i in layers:
            self.recorders[i].watched = True
            hidden = self.network.run_layer(i, hidden, position, self.recorders[i])
            self._positions[i] = position
            self.holds()
        return hidden

    def last(self, layer: int) -> Observed:
        """The queries, keys and values of a layer just run."""
        observed = self.recorders[layer].last
        assert observed is not None, f"layer {layer} has not been run"
        return observed

    def pack(self, layer: int, plan: LayerPlan) -> None:
        """Packs the rows of a layer just run, and lets go of the exact ones."""
        one = Seen((self._rows(layer),), self.token_ids, self.network, self.context_id)
        self._packed[layer] = CompressedCache.pack(Plan((plan,)), one)
        self.holds()
        self.drop(layer)

    def drop(self, layer: int) -> None:
        """Lets go of the rows of a layer just run."""
        self.recorders[layer].drop()

    def cache(self) -> CompressedCache:
        """The compressed context, once every layer has been packed."""
        parts = [self._packed[i] for i in range(self.network.layers)]
        layers, states = [x.layers[0] for x in parts], [x.states[0] for x in parts]
        return CompressedCache.of(layers, states, self.token_ids, len(self.token_ids), self.network.rope)

    def seen(self) -> Seen:
        """What was read, where layers weren't packed one by one: all that `Method.plan` asks for."""
        seen = Seen(
            tuple(self._rows(i) for i in range(len(self.recorders))),
            self.token_ids,
            self.network,
            self.context_id,
            self.costs,
            artefacts=self.artefacts,
        )
        statistics, passed = {}, {}
        for statistic, clock in self._clocks.items():
            before = self.network.passed
            with clock:
                statistics[statistic] = statistic.finish(tuple(r.observed[statistic] for r in self.recorders), seen)
            passed[statistic] = (self.network.passed - before) / self.network.layers
        seconds = {s: clock.seconds for s, clock in self._clocks.items()}
        return replace(seen, statistics=statistics, seconds=seconds, passed=passed)

    def _rows(self, layer: int) -> SeenLayer:
        x = self.recorders[layer]
        assert x.key is not None, f"layer {layer} has not been run"
        assert x.value is not None
        every = torch.arange(x.key.shape[1], device=x.key.device)
        return SeenLayer(x.key, x.value, self._positions.get(layer, every).to(x.key.device))

    def empty(self) -> CompressedCache:
        """A compressed context of no tokens, for a fork that reads block by block."""
        network = self.network
        size = (network.kv_heads, 0, network.dim)
        rows = [torch.empty(size, dtype=network.dtype, device=device) for device in network.placement]
        layers = [PackedLayer((), None, x) for x in rows]
        return CompressedCache.of(layers, [None] * network.layers, self.token_ids[:0], 0, network.rope)

    def read(self, ids: Int[Tensor, " new"]) -> Seen:
        """Reads `ids` in place of the context, exactly."""
        seen = read_exactly(self.network, ids, context_id=self.context_id)
        self.holds(seen.costs.bytes_prefill)
        return seen

    def rows(self, budget: Allowance) -> int:
        """Exact tokens that the allowance holds, the same number in every layer and KV head. Raises Infeasible."""
        row = self.network.row_bytes()
        if budget.limit < row:
            raise Infeasible(row, budget.limit)
        return min(budget.limit // row, len(self.token_ids))

    # -- the bill --------------------------------------------------------------------------------------------------

    def holds(self, more: int = 0) -> None:
        """Says that `more` bytes of keys and values are held now, besides those that this reader knows of."""
        packed = (t for cache in self._packed.values() for t in cache.tensors())
        mine = nbytes([*packed, *(t for x in self.recorders for t in x.rows)])
        self._peak = max(self._peak, mine + more)

    @contextmanager
    def drafting(self, draft: Network) -> Iterator[None]:
        """What is run inside is the draft's cost, not the reading's; `draft` may be this very network."""
        before, mine = draft.passed, self.network.passed
        yield
        self._draft += (draft.passed - before) / draft.layers
        self._started += self.network.passed - mine

    def close(self) -> None:
        """Ends the bill: what the network does from now on is for others."""
        self._ended = self.network.passed

    @property
    def costs(self) -> Costs:
        """Of all that the network was run for since the reader was made, until it was closed."""
        self.holds()
        ended = self.network.passed if self._ended is None else self._ended
        return Costs(self._peak, (ended - self._started) / self.network.layers, self._draft)


class _Ahead:
    """One layer of a look ahead: new tokens attend to the exact rows and, causally, to each other."""

    def __init__(self, layer: int, rows: SeenLayer) -> None:
        self.layer, self.rows = layer, rows
        self.observed: Observed | None = None

    def attend(
        self,
        query: Float[Tensor, "1 heads new dim"],
        key: Float[Tensor, "1 kv_heads new dim"],
        value: Float[Tensor, "1 kv_heads new dim"],
        scale: float,
    ) -> Float[Tensor, "1 heads new dim"]:
        tokens, new = self.rows.key.shape[1], query.shape[2]
        key, value = (
            torch.cat([x[None].to(y.dtype), y], 2) for x, y in ((self.rows.key, key), (self.rows.value, value))
        )
        self.observed = Observed(self.layer, query[0], key[0], value[0], tokens, tokens + new, scale)
        mask = causal_lower_right(new, tokens + new)
        return scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=True)


def look_ahead(
    seen: Seen,
    ids: Int[Tensor, " new"],
    position: Int[Tensor, " new"] | None = None,
    observe: Callable[[Observed], Any] = lambda observed: observed,
) -> list[Any]:
    """Feeds tokens after an exactly read context, and forgets them: what `observe` makes of each layer.

    `position` is where they stand; by default right after the context. `seen` is not changed.
    """
    if position is None:
        position = seen.next_position + torch.arange(len(ids), device=ids.device)
    ahead = [_Ahead(i, rows) for i, rows in enumerate(seen.layers)]
    found: list[Any] = []
    hidden = seen.network.embed(ids)
    for i, layer in enumerate(ahead):
        hidden = seen.network.run_layer(i, hidden, position, layer)
        assert layer.observed is not None
        found.append(observe(layer.observed))
        layer.observed = None
    return found
