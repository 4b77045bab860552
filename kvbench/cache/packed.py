"""A plan made real: the bytes a compressed context holds, and the rows they decode to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int, Int8
from torch import Tensor

from kvbench.cache.codecs.base import Rows, Stored
from kvbench.cache.layout import Layout, index_dtype, look_up, widen
from kvbench.cache.rope import Rope
from kvbench.plan import EVICTED, EXACT, LayerPlan, Made, Plan, Tier, Weight, tensors_in, weigh

if TYPE_CHECKING:
    from kvbench.prefill import Seen, SeenLayer


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes really held: every distinct storage once, whole. A slice that keeps a tensor alive pays for all of it."""
    storages = [t.untyped_storage() for t in tensors]
    return sum({s.data_ptr(): s.nbytes() for s in storages if s.nbytes()}.values())


@dataclass(frozen=True)
class Slab:
    """The rows of one tier in one layer, encoded."""

    tier: Tier
    layout: Layout
    key: Stored
    value: Stored
    key_fixed: Stored
    value_fixed: Stored
    position: Int[Tensor, " held"] | None  # one per row; one per token where every head holds the same tokens
    log_multiplicity: Float[Tensor, " rows"] | None
    counts: Int[Tensor, " kv_heads"] | None  # where heads hold different numbers of rows

    @classmethod
    def encode(
        cls,
        tier: Tier,
        layout: Layout,
        key: Float[Tensor, "rows dim"],
        value: Float[Tensor, "rows dim"],
        position: Int[Tensor, " rows"],
        positions: int,
        token_ids: Int[Tensor, " tokens"],
        hold_positions: bool = False,
        log_multiplicity: Float[Tensor, " rows"] | None = None,
        fixed: tuple[Stored, Stored] | None = None,
    ) -> Slab:
        """Packs rows; `positions` bounds the positions to come, `fixed` is what an earlier `fit` left."""
        hold = hold_positions or tier.needs_position
        token = look_up(token_ids, position) if tier.needs_token else None
        rows = Rows(layout, position if hold else None, token)
        key_fixed = fixed[0] if fixed else tier.key.fit(key, rows)
        stored_key = tier.key.encode(key, rows, key_fixed)
        seen = replace(rows, key=tier.key.decode(stored_key, rows, key_fixed, key.dtype))
        value_fixed = fixed[1] if fixed else tier.value.fit(value, seen)
        once = position[: layout.width] if layout.shared else position
        return cls(
            tier,
            layout,
            stored_key,
            tier.value.encode(value, seen, value_fixed),
            key_fixed,
            value_fixed,
            once.to(index_dtype(positions)) if hold else None,
            log_multiplicity,
            None if layout.uniform else torch.tensor(layout.counts, dtype=torch.int32, device=key.device),
        )

    def tensors(self) -> Iterator[Tensor]:
        for stored in (self.key, self.value, self.key_fixed, self.value_fixed):
            yield from stored.values()
        yield from (x for x in (self.position, self.log_multiplicity, self.counts) if x is not None)

    def on_host(self) -> Slab:
        """Moved to the host's memory, from where the device can fetch."""
        key, value, key_fixed, value_fixed = (
            {name: _to_host(x) for name, x in stored.items()}
            for stored in (self.key, self.value, self.key_fixed, self.value_fixed)
        )
        position, multiplicity, counts = (
            None if x is None else _to_host(x) for x in (self.position, self.log_multiplicity, self.counts)
        )
        return Slab(self.tier, self.layout, key, value, key_fixed, value_fixed, position, multiplicity, counts)

    def fetch(self, rows: Int[Tensor, " rows"], like: Tensor) -> tuple[Tensor, Tensor]:
        """(keys, values) of some rows, moved to the device and decoded to the dtype of `like`."""
        order = rows.cpu()
        key, value = (
            {name: x[order].to(like.device, non_blocking=True) for name, x in stored.items()}
            for stored in (self.key, self.value)
        )
        known = Rows(Layout((len(order),)))
        known = replace(known, key=self.tier.key.decode(key, known, self.key_fixed, like.dtype))
        assert known.key is not None
        return known.key, self.tier.value.decode(value, known, self.value_fixed, like.dtype)

    def positions(self) -> Int[Tensor, " rows"] | None:
        """The position of each row, where held."""
        if self.position is None:
            return None
        wide = widen(self.position)
        return wide.repeat(len(self.layout.counts)) if self.layout.shared else wide

    def rows(self, token_ids: Int[Tensor, " tokens"] | None, like: torch.dtype) -> Rows:
        """What the value codec may know of the rows: the decoded keys included."""
        position = self.positions()
        token = None
        if self.tier.needs_token and token_ids is not None:
            assert position is not None, "a codec that needs tokens needs positions too"
            token = widen(look_up(token_ids, position))
        rows = Rows(self.layout, position, token)
        return replace(rows, key=self.tier.key.decode(self.key, rows, self.key_fixed, like))

    def decode(self, token_ids: Int[Tensor, " tokens"] | None, like: torch.dtype) -> tuple[Tensor, Tensor]:
        """(keys, values), each (rows, dim)."""
        rows = self.rows(token_ids, like)
        assert rows.key is not None
        return rows.key, self.tier.value.decode(self.value, rows, self.value_fixed, like)


def _to_host(x: Tensor) -> Tensor:
    return x.cpu().pin_memory() if x.is_cuda else x


@dataclass(frozen=True)
class Dense:
    """Decoded rows side by side, KV head by KV head: what the oracle attends over."""

    key: Float[Tensor, "kv_heads slots dim"]
    value: Float[Tensor, "kv_heads slots dim"]
    bias: Float[Tensor, "kv_heads slots"] | None  # log multiplicity; -inf where a head has fewer rows
    position: Int[Tensor, "kv_heads slots"] | None  # where every slab holds them; -1 where a head has fewer rows


@dataclass(frozen=True)
class Edit:
    """A new plan for the rows a layer holds on the device now, made while decoding.

    `route` runs over the slots the event showed (the context's, then the tail's without its newest `keep_tail` rows).
    A row whose tier stays the same is not encoded again. Without `keep_tail` the tail is empty afterwards.
    """

    tiers: tuple[Tier, ...]
    route: Int8[Tensor, "kv_heads slots"]
    keep_tail: int = 0


@dataclass(frozen=True)
class Keep:
    """The slots that stay, equally many for every KV head and in order; all others are evicted.

    For layers of exact rows alone. Nothing waits for the device.
    """

    slots: Int[Tensor, "kv_heads kept"]
    keep_tail: int = 0


@dataclass(frozen=True)
class PackedLayer:
    """One layer of a compressed context. Immutable: forks share it, an edit makes a new one."""

    slabs: tuple[Slab, ...]
    token_ids: Int[Tensor, " tokens"] | None
    empty: Float[Tensor, "kv_heads 0 dim"]  # the shape and dtype of no rows
    hold_positions: bool = False
    host: Slab | None = None  # rows in the host's memory

    def tensors(self) -> Iterator[Tensor]:
        """What is held on the device."""
        for slab in self.slabs:
            yield from slab.tensors()

    def weight(self) -> Weight:
        """Its bytes; what the tiers' formulas don't call payload is metadata."""
        shape, dtype = self.empty.shape, self.empty.dtype
        payload = sum(x.tier.row_bytes(shape[2], dtype)[0] * x.layout.rows // x.tier.group for x in self.slabs)
        host = nbytes(self.host.tensors()) if self.host else 0
        return Weight(payload, nbytes(self.tensors()) - payload, host)

    def dense(self) -> Dense:
        """Every row on the device, decoded. The exact rows of a slab with no padding are a view, not a copy."""
        like = self.empty.dtype
        parts = [slab.decode(self.token_ids, like) for slab in self.slabs]
        keys = [slab.layout.pad(k) for slab, (k, _) in zip(self.slabs, parts, strict=True)]
        values = [slab.layout.pad(v) for slab, (_, v) in zip(self.slabs, parts, strict=True)]
        positions = [slab.positions() for slab in self.slabs]
        held = [slab.layout.pad(p + 1) - 1 for slab, p in zip(self.slabs, positions, strict=True) if p is not None]
        return Dense(
            _cat(keys, self.empty),
            _cat(values, self.empty),
            self.bias(),
            torch.cat(held, 1) if held and len(held) == len(self.slabs) else None,
        )

    def bias(self) -> Float[Tensor, "kv_heads slots"] | None:
        """What is added to the logits of the rows on the device; None: nothing."""
        if all(slab.layout.uniform and slab.log_multiplicity is None for slab in self.slabs):
            return None
        return torch.cat([slab_bias(slab, self.empty.device) for slab in self.slabs], 1)

    def edit(
        self,
        edit: Edit | Keep,
        tail: tuple[Float[Tensor, "kv_heads tail dim"], Float[Tensor, "kv_heads tail dim"], Int[Tensor, " tail"]],
        token_ids: Int[Tensor, " tokens"],
        positions: int,
    ) -> PackedLayer:
        """The layer after `edit`; `tail` is (keys, values, positions) of the rows that came after the context."""
        dense = self.dense()
        key, value = (torch.cat([x, t.to(x.dtype)], 1) for x, t in zip((dense.key, dense.value), tail[:2], strict=True))
        context = dense.position if dense.position is not None else tail[2].new_zeros(key.shape[0], dense.key.shape[1])
        position = torch.cat([context, tail[2].expand(key.shape[0], -1)], 1)
        if isinstance(edit, Keep):
            rows = edit.slots[..., None].expand(-1, -1, key.shape[2])
            slab = Slab.encode(
                EXACT,
                Layout((edit.slots.shape[1],) * len(key)),
                key.gather(1, rows).flatten(0, 1),
                value.gather(1, rows).flatten(0, 1),
                position.gather(1, edit.slots).flatten(),
                positions,
                token_ids,
                self.hold_positions,
            )
            return replace(self, slabs=(slab,))
        old = {slab.tier: (slab, start) for slab, start in zip(self.slabs, self._starts(), strict=True)}
        route = edit.route
        if dense.bias is not None:  # places where a head has fewer rows are no rows, whatever the edit says of them
            empty = torch.nn.functional.pad(dense.bias.isneginf(), (0, route.shape[1] - dense.bias.shape[1]))
            route = route.masked_fill(empty, EVICTED)
        slabs, host = [], self.host
        for i, tier in enumerate(edit.tiers):
            moved = route == i
            kept = self.host if tier.host else None
            if tier in old:
                slab, start = old[tier]
                here = slice(start, start + slab.layout.width)
                kept = _keep(slab, slab.layout.flatten(moved[:, here]))
                moved = moved.clone()
                moved[:, here] = False
            layout = Layout(tuple(moved.sum(-1).tolist()))
            if layout.rows:
                new = Slab.encode(
                    tier,
                    layout,
                    key[moved],
                    value[moved],
                    position[moved],
                    positions,
                    token_ids,
                    self.hold_positions,
                    fixed=(kept.key_fixed, kept.value_fixed) if kept else None,
                )
                new = new.on_host() if tier.host else new
                kept = _merge(kept, new) if kept else new
            if tier.host:
                host = kept
            elif kept and kept.layout.rows:
                slabs.append(kept)
        return replace(self, slabs=tuple(slabs), host=host)

    def _starts(self) -> list[int]:
        widths = [slab.layout.width for slab in self.slabs]
        return [sum(widths[:i]) for i in range(len(widths))]


def slab_bias(slab: Slab, device: torch.device) -> Float[Tensor, "kv_heads width"]:
    """What is added to the logits of a slab's rows: log multiplicity, and -inf where a head has fewer rows."""
    layout = slab.layout
    bias = torch.zeros(len(layout.counts), layout.width, device=device)
    if slab.log_multiplicity is not None:
        bias = layout.pad(slab.log_multiplicity)
    return bias if layout.uniform else bias.masked_fill(~layout.mask(device), -torch.inf)


def _cat(parts: list[Tensor], empty: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1) if parts else empty


def _gather(slab: Slab, heads: Int[Tensor, " rows"], order: Int[Tensor, " kept"]) -> Slab:
    """The rows of a slab in `order`, which keeps groups whole and goes head by head (`heads`: the head of each row)."""
    counts = heads[order].bincount(minlength=len(slab.layout.counts))
    layout = Layout(tuple(counts.tolist()))
    return replace(
        slab,
        layout=layout,
        key=_take(slab.key, order, slab.tier.key.group),
        value=_take(slab.value, order, slab.tier.value.group),
        position=None if slab.position is None else slab.position[order],
        log_multiplicity=None if slab.log_multiplicity is None else slab.log_multiplicity[order],
        counts=None if layout.uniform else counts.int(),
    )


def _take(stored: Stored, order: Int[Tensor, " kept"], group: int) -> Stored:
    groups = order if group == 1 else order[::group] // group
    return {name: x[groups] for name, x in stored.items()}


def _one_position_per_row(slab: Slab) -> Slab:
    if slab.position is None or not slab.layout.shared:
        return slab
    return replace(slab, position=slab.position.repeat(len(slab.layout.counts)))


def _keep(slab: Slab, keep: Bool[Tensor, " rows"]) -> Slab:
    """The rows of a slab where `keep` holds."""
    if bool(keep.all()):
        return slab
    return _gather(_one_position_per_row(slab), slab.layout.heads(keep.device), keep.nonzero()[:, 0])


def _merge(old: Slab, new: Slab) -> Slab:
    """The rows of both, head by head, the old ones first."""
    old, new = _one_position_per_row(old), _one_position_per_row(new)
    device = next(iter(new.key.values())).device
    heads = torch.cat([slab.layout.heads(device) for slab in (old, new)])
    multiplicity = old.log_multiplicity
    both = replace(
        old,
        key=_join(old.key, new.key),
        value=_join(old.value, new.value),
        position=_join_positions(old.position, new.position),
        log_multiplicity=None
        if multiplicity is None
        else torch.cat([multiplicity, multiplicity.new_zeros(new.layout.rows)]),
    )
    return _gather(both, heads, heads.argsort(stable=True))


def _join_positions(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return None
    return torch.cat([widen(first), widen(second)]).to(torch.promote_types(first.dtype, second.dtype))


def _join(first: Stored, second: Stored) -> Stored:
    return {name: torch.cat([x, second[name]]) for name, x in first.items()}


def _concat_rows(layer: SeenLayer, made: Made | None) -> tuple[Tensor, Tensor, Tensor]:
    """(keys, values, positions) of a layer's tokens and then of the rows its plan makes, KV head by KV head."""
    position = layer.position.expand(layer.key.shape[0], -1)
    if made is None:
        return layer.key, layer.value, position
    return (
        torch.cat([layer.key, made.key.to(layer.key.dtype)], 1),
        torch.cat([layer.value, made.value.to(layer.value.dtype)], 1),
        torch.cat([position, made.position], 1),
    )


def pack_layer(plan: LayerPlan, seen: Seen, layer: SeenLayer, column: Int[Tensor, " tokens"]) -> PackedLayer:
    """Encodes one layer's rows as its plan says; `column` are the token ids, held once for all layers that need it."""
    key, value, position = _concat_rows(layer, plan.made)
    slabs = []
    for i, layout in enumerate(Layout.of_route(plan.route, len(plan.tiers))):
        if not layout.rows:
            continue
        whole = layout.rows == plan.route.numel()
        chosen = None if whole else (plan.route == i).flatten().nonzero()[:, 0]
        flat = [x.flatten(0, 1) if chosen is None else x.flatten(0, 1)[chosen] for x in (key, value, position)]
        slabs.append(
            Slab.encode(
                plan.tiers[i],
                layout,
                flat[0],
                flat[1],
                flat[2],
                seen.next_position,
                seen.token_ids,
                plan.hold_positions,
                _multiplicity(plan.made, layer.key.shape[1], chosen, i, plan.route),
            )
        )
    tokens = column if any(slab.tier.needs_token for slab in slabs) else None
    host = next((slab.on_host() for slab in slabs if slab.tier.host), None)
    device = tuple(slab for slab in slabs if not slab.tier.host)
    return PackedLayer(device, tokens, layer.key[:, :0].clone(), plan.hold_positions, host)


def _multiplicity(
    made: Made | None, tokens: int, chosen: Tensor | None, tier: int, route: Tensor
) -> Float[Tensor, " rows"] | None:
    """Log multiplicities of a slab's rows; none where it holds no made row."""
    if made is None or not bool((route[:, tokens:] == tier).any()):
        return None
    own = made.log_multiplicity.new_zeros(made.log_multiplicity.shape[0], tokens)
    every = torch.cat([own, made.log_multiplicity], 1).float().flatten()
    return every if chosen is None else every[chosen]


@dataclass(frozen=True)
class CompressedCache:
    """A compressed context, immutable and shared by all forks (see kvbench.cache.fork)."""

    layers: tuple[PackedLayer, ...]
    states: tuple[Any, ...]  # where the method's `step` and `select` start, layer by layer
    token_ids: Int[Tensor, " tokens"]
    next_position: int
    planned: Weight
    rope: Rope

    @classmethod
    def pack(cls, plan: Plan, seen: Seen) -> CompressedCache:
        """Packs a plan. Raises RuntimeError if the measured bytes are not the planned ones: a codec's formula lies."""
        column = seen.token_ids.to(index_dtype(seen.vocabulary))
        layers = tuple(pack_layer(p, seen, x, column) for p, x in zip(plan.layers, seen.layers, strict=True))
        states = tuple(p.state for p in plan.layers)
        cache = cls(layers, states, seen.token_ids, seen.next_position, weigh(plan, seen), seen.network.rope)
        if (cache.nbytes, cache.offloaded) != (cache.planned.held, cache.planned.offloaded):
            found = f"{cache.nbytes} are held, {cache.offloaded} on the host"
            raise RuntimeError(
                f"the plan weighs {cache.planned.held} bytes, {cache.planned.offloaded} offloaded: {found}"
            )
        return cache

    @classmethod
    def of(
        cls,
        layers: Sequence[PackedLayer],
        states: Sequence[Any],
        token_ids: Int[Tensor, " tokens"],
        next_position: int,
        rope: Rope,
    ) -> CompressedCache:
        """A context that was packed layer by layer."""
        weights = [layer.weight() for layer in layers]
        about = sum(x.metadata for x in weights) + nbytes(tensors_in(tuple(states)))
        weight = Weight(sum(x.payload for x in weights), about, sum(x.offloaded for x in weights))
        return cls(tuple(layers), tuple(states), token_ids, next_position, weight, rope)

    def tensors(self) -> Iterator[Tensor]:
        """Everything held on the device for the context: rows, metadata, the method's state."""
        for layer, state in zip(self.layers, self.states, strict=True):
            yield from layer.tensors()
            yield from tensors_in(state)
            if layer.token_ids is not None:
                yield layer.token_ids

    @property
    def nbytes(self) -> int:
        """Bytes held on the device, measured on the distinct storages."""
        return nbytes(self.tensors())

    @property
    def offloaded(self) -> int:
        """Bytes held in the host's memory."""
        return nbytes(t for layer in self.layers if layer.host for t in layer.host.tensors())

    @property
    def shared_bytes(self) -> int:
        """Bytes of per-model artefacts that decoding reads: held once, whatever the number of contexts."""
        return nbytes(t for layer in self.layers for slab in layer.slabs for t in slab.tier.shared)
