"""Reading a context exactly, once, and what is seen on the way."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from kvbench.measure.clock import Stopwatch

if TYPE_CHECKING:
    from kvbench.artefact import Artefact, Calibration
    from kvbench.cache.hf import Network


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
    statistics: Mapping[Statistic, tuple[Any, ...]] = field(default_factory=dict)  # one value a layer
    seconds: Mapping[Statistic, float] = field(default_factory=dict)  # what gathering them took
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
        self.last = Observed(self.layer, query[0], self.key, self.value, start, self.total, scale, self.network.rope)
        for statistic in self.observed:
            with self.clocks[statistic]:
                self.observed[statistic] = statistic.observe(self.observed[statistic], self.last)
        return out


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
    """What a method with an own prefill reads the context with: its tokens, and the model's layers one by one."""

    def __init__(
        self,
        network: Network,
        ids: Int[Tensor, " tokens"],
        statistics: Iterable[Statistic] = (),
        context_id: str = "",
    ) -> None:
        self.network, self.ids, self.context_id = network, ids, context_id
        statistics = list(statistics)
        self._clocks = {s: Stopwatch(network.device) for s in statistics}
        self.recorders = [Recorder(i, len(ids), network, statistics, self._clocks) for i in range(network.layers)]
        self._positions: dict[int, Tensor] = {}

    def embed(self) -> Float[Tensor, "tokens hidden"]:
        return self.network.embed(self.ids)

    def run(
        self, layers: range, hidden: Float[Tensor, "tokens hidden"], position: Int[Tensor, " tokens"]
    ) -> Float[Tensor, "tokens hidden"]:
        """Runs some layers over hidden states; they keep their rows."""
        for i in layers:
            hidden = self.network.run_layer(i, hidden, position, self.recorders[i])
            self._positions[i] = position
        return hidden

    def last(self, layer: int) -> Observed:
        """The queries, keys and values of a layer just run."""
        observed = self.recorders[layer].last
        assert observed is not None, f"layer {layer} has not been run"
        return observed

    def seen(self) -> Seen:
        every = torch.arange(len(self.ids), device=self.ids.device)
        layers = []
        for i, x in enumerate(self.recorders):
            assert x.key is not None, f"layer {i} has not been run"
            assert x.value is not None
            layers.append(SeenLayer(x.key, x.value, self._positions.get(i, every)))
        seen = Seen(tuple(layers), self.ids, self.network, self.context_id)
        statistics = {}
        for statistic, clock in self._clocks.items():
            with clock:
                statistics[statistic] = statistic.finish(tuple(r.observed[statistic] for r in self.recorders), seen)
        return replace(seen, statistics=statistics, seconds={s: clock.seconds for s, clock in self._clocks.items()})


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
