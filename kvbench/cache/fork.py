"""A fork: one continuation of a compressed context, with its own tail and the method's state."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from kvbench.cache.attention import Ready, attention_weights, causal_mask, oracle_attention, tiered_attention
from kvbench.cache.codecs.base import Context
from kvbench.cache.packed import CompressedCache, Dense, Edit, Keep, PackedLayer, nbytes
from kvbench.cache.rope import Rope, renumber
from kvbench.method import Positions
from kvbench.plan import EXACT, tensors_in

if TYPE_CHECKING:
    from kvbench.method import Method

__all__ = ["Edit", "Event", "Fork", "Keep", "Selection", "Usage", "acts_in_time"]

_SLACK = 64  # rows by which the working copy of a layer grows at a time


@dataclass(frozen=True)
class Event:
    """What a method sees of one layer and `new` tokens: `select` before they attend, `step` after it.

    Slots are the layer's rows on the device: the context's (`context` of them), then the tail's, the new tokens last.
    """

    layer: int
    query: Float[Tensor, "heads new dim"]
    key: Float[Tensor, "kv_heads slots dim"]
    value: Float[Tensor, "kv_heads slots dim"]
    position: Int[Tensor, "kv_heads slots"] | None  # where every token is there, or positions held; -1 in empty slots
    token_ids: Int[Tensor, " new"]
    context: int
    seen: int  # tokens read so far, the new ones included
    scale: float
    mask: Tensor | None
    rope: Rope
    packed: PackedLayer

    @property
    def new(self) -> int:
        return self.query.shape[1]

    @property
    def slots(self) -> int:
        return self.key.shape[1]

    def weights(self) -> Float[Tensor, "heads new slots"]:
        """The new tokens' attention over the slots, in float32."""
        return attention_weights(self.query, self.key, self.scale, self.mask)


@dataclass(frozen=True)
class Selection:
    """The rows that the new tokens read.

    `mask` says it of the slots; None: all of them. `fetch` are rows of the tier on the host, equally many for every KV
    head, read besides; those that were fetched for the token before stay on the device and do not move again.
    `scanned` are the bytes, per new token, that were read to choose.
    """

    mask: Bool[Tensor, "heads new slots"] | None = None  # heads: the query heads, the KV heads, or 1
    fetch: Int[Tensor, "kv_heads fetched"] | None = None
    scanned: int = 0


@dataclass(frozen=True)
class Usage:
    """What a cache held, read and moved to the device, in bytes, token by token: one entry for each that was fed."""

    held: tuple[int, ...] = ()
    read: tuple[int | Tensor, ...] = ()
    moved: tuple[int | Tensor, ...] = ()

    def __len__(self) -> int:
        return len(self.held)

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.held + other.held, self.read + other.read, self.moved + other.moved)

    def __getitem__(self, part: slice) -> Usage:
        return Usage(self.held[part], self.read[part], self.moved[part])


@dataclass(frozen=True)
class _Fetched:
    """Rows of the host's tier that lie on the device."""

    index: Int[Tensor, "kv_heads fetched"]
    key: Float[Tensor, "kv_heads fetched dim"]
    value: Float[Tensor, "kv_heads fetched dim"]


def _fetch(packed: PackedLayer, index: Int[Tensor, "kv_heads fetched"], held: _Fetched | None) -> tuple[_Fetched, int]:
    """The host's rows `index` on the device, and how many of them had to move: not those in `held`."""
    slab = packed.host
    assert slab is not None
    flat = index + slab.layout.starts(index.device)[:, None]
    if held is None:
        key, value = slab.fetch(flat.flatten(), packed.empty)
        return _Fetched(index, *(x.unflatten(0, index.shape) for x in (key, value))), index.numel()
    at = torch.arange(held.index.shape[1], device=index.device).expand(held.index.shape)
    here = torch.full((len(index), slab.layout.width), -1, device=index.device)
    where = here.scatter(1, held.index.long(), at).gather(1, index.long())
    missing = where < 0
    key, value = (x.take_along_dim(where.clamp(min=0)[..., None], 1) for x in (held.key, held.value))
    rows = flat[missing]
    key[missing], value[missing] = slab.fetch(rows, packed.empty)
    return _Fetched(index, key, value), len(rows)


class ForkLayer:
    """One layer of a fork. The rows are decoded once into a working copy, to which the tail is appended.

    In a tiered fork the working copy is the tail alone, and `context` 0: the rows are read where they are stored.
    """

    def __init__(self, packed: PackedLayer, state: Any, fork: Fork, index: int) -> None:
        self.state, self.fork, self.index = state, fork, index
        self.tail_start = fork.next_position  # position of the tail's first row
        self._fetched: _Fetched | None = None
        self.read: int | Tensor = 0  # bytes, by the last new token
        self.moved: int | Tensor = 0
        self._show(packed)

    def _show(self, packed: PackedLayer) -> None:
        """Makes `packed` the context, and the tail empty."""
        self.packed = packed
        if self.fork.tiered:
            self._ready: Ready | None = Ready.of(packed, self.fork.contexts[packed.empty.device])
            dense = Dense(packed.empty, packed.empty, None, None)
        else:
            self._ready, dense = None, packed.dense()
        self._key, self._value, self._bias, self._position = dense.key, dense.value, dense.bias, dense.position
        self.context = self.length = dense.key.shape[1]
        self._own = False  # whether the working copy may be written to
        self._packed_bytes = nbytes(packed.tensors())

    def clone(self, fork: Fork) -> ForkLayer:
        """Shares everything; whoever appends next copies."""
        other = copy.copy(self)
        other.fork = fork
        self._own = other._own = False
        return other

    @property
    def tail(self) -> tuple[Float[Tensor, "kv_heads tail dim"], Float[Tensor, "kv_heads tail dim"]]:
        return self._key[:, self.context : self.length], self._value[:, self.context : self.length]

    @property
    def row_bytes(self) -> int:
        """Bytes of one exact row in every KV head."""
        kv_heads, _, dim = self.packed.empty.shape
        return 2 * kv_heads * dim * self.packed.empty.element_size()

    @property
    def tail_bytes(self) -> int:
        return (self.length - self.context) * self.row_bytes

    @property
    def held(self) -> int:
        """Bytes on the device: the packed rows, those fetched from the host, the tail, the method's state."""
        fetched = self._fetched
        working = tensors_in(self.state) + ([] if fetched is None else [fetched.index, fetched.key, fetched.value])
        return self._packed_bytes + self.tail_bytes + nbytes(working)

    def working(self) -> Iterator[Tensor]:
        """What is kept from step to step: the working copy, or what makes the rows ready where they are stored."""
        yield from (x for x in (self._key, self._value, self._bias, self._position) if x is not None)
        if self._ready is not None:
            yield from self._ready.tensors()

    def attend(
        self,
        query: Float[Tensor, "heads new dim"],
        key: Float[Tensor, "kv_heads new dim"],
        value: Float[Tensor, "kv_heads new dim"],
        scale: float,
    ) -> Float[Tensor, "heads new dim"]:
        """Appends the new rows to the tail, attends over context and tail, and lets the method act."""
        self._append(key, value)
        if self._ready is not None:
            return tiered_attention(query, self._ready, self.tail, scale)
        keys, values, mask = self._key[:, : self.length], self._value[:, : self.length], self._mask(query)
        if not self.fork.watched:
            return oracle_attention(query, keys, values, scale, mask)
        method = self.fork.method
        event = Event(
            self.index,
            query,
            keys,
            values,
            self._positions(),
            self.fork.incoming,
            self.context,
            self.fork.next_position + query.shape[1],
            scale,
            mask,
            self.fork.rope,
            self.packed,
        )
        chosen = Selection()
        if method.selects:
            self.state, chosen = method.select(self.state, event)
            self._count(chosen)
        if method.positions is Positions.contiguous:
            assert event.position is not None, "contiguous positions ask for a plan that holds the original ones"
            keys = renumber(keys, event.position, chosen.mask, self.fork.rope)
            event = replace(event, key=keys)
        out = self._attend(event, keys, chosen)
        if self.fork.observer is not None:
            self.fork.observer(event)
        if method.steps:
            self.state, edit = method.step(self.state, event)
            if edit is not None:
                self.edit(edit)
        return out

    def _attend(self, event: Event, keys: Tensor, chosen: Selection) -> Float[Tensor, "heads new dim"]:
        """Attention over the chosen slots and the rows fetched for them."""
        values, mask = event.value, event.mask
        if chosen.mask is not None:
            rows = chosen.mask.repeat_interleave(len(event.query) // len(chosen.mask), 0)
            if mask is None:
                mask = rows
            elif mask.is_floating_point():
                mask = mask.masked_fill(~rows, -torch.inf)
            else:
                mask = mask & rows
        if self._fetched is not None:
            fetched = self._fetched
            keys, values = torch.cat([fetched.key, keys], 1), torch.cat([fetched.value, values], 1)
            if mask is not None:
                mask = pad(mask, (fetched.index.shape[1], 0), value=0.0 if mask.is_floating_point() else True)
        return oracle_attention(event.query, keys, values, event.scale, mask)

    def _count(self, chosen: Selection) -> None:
        """Fetches what is asked for, and counts the bytes read and moved."""
        kv_heads = len(self._key)
        row = self.row_bytes // kv_heads
        read: int | Tensor = self.length * kv_heads
        if chosen.mask is not None:
            mask = chosen.mask[:, -1]
            union = mask.unflatten(0, (kv_heads, -1)).any(1) if len(mask) > kv_heads else mask
            read = union.sum().to(self.fork.token_ids.device) * (kv_heads // len(union))
        self.moved = 0
        if chosen.fetch is None:
            self._fetched = None
        else:
            read = read + chosen.fetch.numel()
            if self._fetched is None or chosen.fetch is not self._fetched.index:
                self._fetched, rows = _fetch(self.packed, chosen.fetch, self._fetched)
                self.moved = rows * row
        self.read = read * row + chosen.scanned

    def _append(self, key: Tensor, value: Tensor) -> None:
        end = self.length + key.shape[1]
        if not self._own or end > self._key.shape[1]:
            room = (self._key.shape[0], end + _SLACK, self._key.shape[2])
            for name in ("_key", "_value"):
                old = getattr(self, name)
                new = old.new_empty(room) if self.fork.tiered else key.new_empty(room)  # in the layers' dtype
                new[:, : self.length] = old[:, : self.length]
                setattr(self, name, new)
            self._own = True
        self._key[:, self.length : end] = key.to(self.packed.empty.dtype)  # rounded as the cache would hold it
        self._value[:, self.length : end] = value.to(self.packed.empty.dtype)
        self.length = end

    def _mask(self, query: Tensor) -> Tensor | None:
        """None where every new token sees every row; boolean; or additive where rows carry a bias."""
        heads, new, _ = query.shape
        mask = None if new == 1 else causal_mask(new, self.length, query.device)[None]
        if self.fork.tree is not None:
            mask = pad(self.fork.tree.to(query.device), (self.length - new, 0), value=True)[None]
        if self._bias is None:
            return mask
        bias = pad(self._bias, (0, self.length - self.context))
        bias = bias.repeat_interleave(heads // bias.shape[0], 0)[:, None].expand(-1, new, -1)
        return bias if mask is None else bias.masked_fill(~mask, -torch.inf)

    def _positions(self) -> Int[Tensor, "kv_heads slots"] | None:
        if self._position is None:
            every = self.context == self.tail_start and len(self.packed.slabs) == 1 and self._bias is None
            return torch.arange(self.length, device=self._key.device).expand(len(self._key), -1) if every else None
        return torch.cat([self._position, self._tail_positions().expand(len(self._position), -1)], 1)

    def _tail_positions(self) -> Int[Tensor, " tail"]:
        tail = torch.arange(self.length - self.context, device=self._key.device)
        return self.tail_start + tail

    def edit(self, edit: Edit | Keep) -> None:
        """Puts the edited rows in place of the context; the newest `keep_tail` rows stay in the tail."""
        cut = self.length - edit.keep_tail
        kept = self._key[:, cut : self.length], self._value[:, cut : self.length]
        moved = cut - self.context
        self._show(self._edited(edit, cut))
        self.tail_start += moved
        if edit.keep_tail:
            self._append(*kept)

    def _edited(self, edit: Edit | Keep, cut: int) -> PackedLayer:
        positions = self._tail_positions()[: cut - self.context]
        tail = self._key[:, self.context : cut], self._value[:, self.context : cut], positions
        ids = torch.cat([self.fork.token_ids, self.fork.incoming])
        return self.packed.edit(edit, tail, ids, len(ids))

    def whole(self) -> PackedLayer:
        """Context and tail, which is packed exact."""
        tiers = [slab.tier for slab in self.packed.slabs]
        if EXACT not in tiers:
            tiers.append(EXACT)
        widths = [slab.layout.width for slab in self.packed.slabs]
        widths[len(widths) :] = [0] * (len(tiers) - len(widths)) + [self.length - self.context]
        index = torch.tensor([*range(len(tiers)), tiers.index(EXACT)], dtype=torch.int8, device=self._key.device)
        route = index.repeat_interleave(torch.tensor(widths, device=index.device))
        return self._edited(Edit(tuple(tiers), route.expand(len(self._key), -1)), self.length)


def acts_in_time(method: Method) -> bool:
    """Whether a method has to do with what a layer attends to: then it does so over decoded rows."""
    return method.steps or method.selects or method.positions is Positions.contiguous


class Fork:
    """Made by `Fork(cache, method)` and `fork.fork()`; never sees what another fork does.

    `tiered`: attends over the tiers as they are stored, for methods that do not act in time.
    """

    def __init__(self, cache: CompressedCache, method: Method, tiered: bool = False) -> None:
        self.method, self.tiered, self.rope = method, tiered, cache.rope
        self.token_ids = cache.token_ids  # of everything read so far
        self.next_position = cache.next_position
        self.incoming = cache.token_ids[:0]  # the tokens on their way through the layers
        self.tree: Bool[Tensor, "new new"] | None = None  # which new tokens see which, where that isn't their order
        self.observer: Callable[[Event], None] | None = None  # told of every layer that has attended
        if tiered and acts_in_time(method):
            raise ValueError(f"{type(method).__name__} acts in time: it attends over decoded rows")
        devices = {layer.empty.device for layer in cache.layers}
        self.contexts = Context.of(cache.token_ids, cache.next_position, devices)
        self._usage = Usage()
        self.layers = [
            ForkLayer(packed, state, self, i)
            for i, (packed, state) in enumerate(zip(cache.layers, cache.states, strict=True))
        ]
        self._context_bytes = sum(layer.held for layer in self.layers)

    @property
    def watched(self) -> bool:
        """Whether anyone but the model has to do with what a layer attends to."""
        return acts_in_time(self.method) or self.observer is not None

    @property
    def one_by_one(self) -> bool:
        """Whether tokens must be fed one at a time."""
        return self.method.one_by_one

    def fork(self) -> Fork:
        other = copy.copy(self)
        other.layers = [layer.clone(other) for layer in self.layers]
        return other

    def advance(self, ids: Int[Tensor, " new"]) -> None:
        """Called once `ids` have gone through every layer."""
        self.token_ids = torch.cat([self.token_ids, ids])
        self.next_position += len(ids)
        self.incoming = ids[:0]
        if self.one_by_one:
            held = sum(layer.held for layer in self.layers)
            read = sum(layer.read for layer in self.layers) if self.method.selects else held
            self._usage += Usage((held,), (read,), (sum(layer.moved for layer in self.layers),))

    @property
    def usage(self) -> Usage:
        """Of every token fed after the context."""
        return self._usage if self.one_by_one else self.growth(0, self.layers[0].length - self.layers[0].context)

    def growth(self, start: int, end: int) -> Usage:
        """Of the `start`-th to the `end`-th token after the context, where the method does not act in time."""
        row = sum(layer.row_bytes for layer in self.layers)
        held = tuple(self._context_bytes + row * (i + 1) for i in range(start, end))
        return Usage(held, held, (0,) * len(held))

    def forget(self, rows: int) -> None:
        """Takes the newest rows back, before `advance`."""
        for layer in self.layers:
            layer.length -= rows

    def freeze(self) -> CompressedCache:
        """Everything read so far as a compressed context of its own: what is in the tail is packed, exact."""
        layers = tuple(layer.whole() for layer in self.layers)
        states = tuple(layer.state for layer in self.layers)
        return CompressedCache.of(layers, states, self.token_ids, self.next_position, self.rope)

    @property
    def working_bytes(self) -> int:
        """Bytes kept from step to step beside the compressed context and the tail's rows."""
        stored = {t.untyped_storage().data_ptr() for layer in self.layers for t in layer.packed.tensors()}
        kept = [t for layer in self.layers for t in layer.working()]
        kept += [t for context in self.contexts.values() for table in context.tables.values() for t in table]
        return nbytes(t for t in kept if t.untyped_storage().data_ptr() not in stored) - self.tail_bytes

    @property
    def tail_bytes(self) -> int:
        """Bytes of the exact rows after the context: question, answer prefix, answer."""
        return sum(layer.tail_bytes for layer in self.layers)
