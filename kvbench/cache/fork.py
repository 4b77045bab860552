"""A fork: one continuation of a compressed context, with its own tail and the method's state."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvbench.cache.attention import attention_weights, causal_mask, oracle_attention, tiered_attention
from kvbench.cache.packed import CompressedCache, Edit, PackedLayer

if TYPE_CHECKING:
    from kvbench.method import Method

__all__ = ["Edit", "Event", "Fork"]

_SLACK = 64  # rows by which the working copy of a layer grows at a time


@dataclass(frozen=True)
class Event:
    """What a method's `step` sees after a layer attended for `new` tokens.

    Slots are the layer's rows as attention sees them: the context's (`context` of them), then the tail's, the new
    tokens last.
    """

    layer: int
    query: Float[Tensor, "heads new dim"]
    key: Float[Tensor, "kv_heads slots dim"]
    value: Float[Tensor, "kv_heads slots dim"]
    position: Int[Tensor, "kv_heads slots"] | None  # where the plan holds positions; -1 in empty slots
    context: int
    scale: float
    mask: Tensor | None

    @property
    def new(self) -> int:
        return self.query.shape[1]

    def weights(self) -> Float[Tensor, "heads new slots"]:
        """The new tokens' attention over the slots, in float32."""
        return attention_weights(self.query, self.key, self.scale, self.mask)


class ForkLayer:
    """One layer of a fork. The rows are decoded once into a working copy, to which the tail is appended."""

    def __init__(self, packed: PackedLayer, state: Any, fork: Fork, index: int) -> None:
        self.packed, self.state, self.fork, self.index = packed, state, fork, index
        dense = packed.dense()
        self._key, self._value, self._bias, self._position = dense.key, dense.value, dense.bias, dense.position
        self.context = self.length = dense.key.shape[1]
        self.tail_start = fork.next_position  # position of the tail's first row
        self._own = False  # whether the working copy may be written to

    def clone(self, fork: Fork) -> ForkLayer:
        """Shares everything; whoever appends next copies."""
        other = copy.copy(self)
        other.fork = fork
        self._own = other._own = False
        return other

    @property
    def tail(self) -> tuple[Float[Tensor, "kv_heads tail dim"], Float[Tensor, "kv_heads tail dim"]]:
        return self._key[:, self.context : self.length], self._value[:, self.context : self.length]

    def attend(
        self,
        query: Float[Tensor, "heads new dim"],
        key: Float[Tensor, "kv_heads new dim"],
        value: Float[Tensor, "kv_heads new dim"],
        scale: float,
    ) -> Float[Tensor, "heads new dim"]:
        """Appends the new rows to the tail, attends over context and tail, and lets the method act."""
        self._append(key, value)
        method = self.fork.method
        if self.fork.tiered:
            return tiered_attention(query, self.packed, self.tail, scale)
        mask = self._mask(query)
        every_key, every_value = self._key[:, : self.length], self._value[:, : self.length]
        out = oracle_attention(query, every_key, every_value, scale, mask)
        if method.steps:
            event = Event(self.index, query, every_key, every_value, self._positions(), self.context, scale, mask)
            self.state, edit = method.step(self.state, event)
            if edit is not None:
                self._edit(edit)
        return out

    def _append(self, key: Tensor, value: Tensor) -> None:
        end = self.length + key.shape[1]
        if not self._own or end > self._key.shape[1]:
            room = (self._key.shape[0], end + _SLACK, self._key.shape[2])
            for name in ("_key", "_value"):
                old = getattr(self, name)
                new = key.new_empty(room)  # in the layers' dtype
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
            mask = torch.nn.functional.pad(self.fork.tree, (self.length - new, 0), value=True)[None]
        if self.fork.method.selects:
            chosen = self.fork.method.select(self.state, query, self.packed)
            chosen = chosen.repeat_interleave(heads // chosen.shape[0], 0)
            tail = chosen.new_ones(heads, new, self.length - self.context)
            chosen = torch.cat([chosen, tail], -1)
            mask = chosen if mask is None else mask & chosen
        if self._bias is None:
            return mask
        bias = torch.nn.functional.pad(self._bias, (0, self.length - self.context))
        bias = bias.repeat_interleave(heads // bias.shape[0], 0)[:, None].expand(-1, new, -1)
        return bias if mask is None else bias.masked_fill(~mask, -torch.inf)

    def _positions(self) -> Int[Tensor, "kv_heads slots"] | None:
        if self._position is None:
            return None
        return torch.cat([self._position, self._tail_positions().expand(len(self._position), -1)], 1)

    def _tail_positions(self) -> Int[Tensor, " tail"]:
        tail = torch.arange(self.length - self.context, device=self._key.device)
        return self.tail_start + tail

    def _edit(self, edit: Edit) -> None:
        """Puts the edited rows in place of the context; the newest `keep_tail` rows stay in the tail."""
        stay = edit.keep_tail
        cut = self.length - stay
        kept = self._key[:, cut : self.length], self._value[:, cut : self.length]
        moved = self._tail_positions()[: cut - self.context]
        tail = self._key[:, self.context : cut], self._value[:, self.context : cut], moved
        self.packed = self.packed.edit(edit, tail, self.fork.token_ids, self.tail_start + len(moved))
        dense = self.packed.dense()
        self._key, self._value, self._bias, self._position = dense.key, dense.value, dense.bias, dense.position
        self.context = self.length = dense.key.shape[1]
        self.tail_start += len(moved)
        self._own = False
        if stay:
            self._append(*kept)


class Fork:
    """Made by `Fork(cache, method)` and `fork.fork()`; never sees what another fork does."""

    def __init__(self, cache: CompressedCache, method: Method, tiered: bool = False) -> None:
        self.method, self.tiered = method, tiered
        self.token_ids = cache.token_ids  # of everything read so far
        self.next_position = cache.next_position
        self.tree: Bool[Tensor, "new new"] | None = None  # which new tokens see which, where that isn't their order
        self.layers = [
            ForkLayer(packed, state, self, i)
            for i, (packed, state) in enumerate(zip(cache.layers, cache.states, strict=True))
        ]

    def fork(self) -> Fork:
        other = copy.copy(self)
        other.layers = [layer.clone(other) for layer in self.layers]
        return other

    def advance(self, ids: Int[Tensor, " new"]) -> None:
        """Called once `ids` have gone through every layer."""
        self.token_ids = torch.cat([self.token_ids, ids])
        self.next_position += len(ids)

    def forget(self, rows: int) -> None:
        """Takes the newest rows back, before `advance`."""
        for layer in self.layers:
            layer.length -= rows

    @property
    def tail_bytes(self) -> int:
        """Bytes of the exact rows after the context: question, answer prefix, answer."""
        return sum(2 * x.tail[0].numel() * x.packed.empty.element_size() for x in self.layers)
