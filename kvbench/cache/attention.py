"""Attention over a compressed layer, twice: the oracle decodes every row; the tiered one works on what is stored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvbench.cache.codecs.base import Context, Rows, Stored, product
from kvbench.cache.layout import Layout
from kvbench.cache.packed import PackedLayer, Slab


def causal_mask(new: int, slots: int, device: torch.device) -> Bool[Tensor, "new slots"]:
    """The newest `new` of `slots` rows see the earlier rows and each other in order."""
    return torch.ones(new, slots, dtype=torch.bool, device=device).tril(slots - new)


def oracle_attention(
    query: Float[Tensor, "heads new dim"],
    key: Float[Tensor, "kv_heads slots dim"],
    value: Float[Tensor, "kv_heads slots dim"],
    scale: float,
    mask: Tensor | None,
) -> Float[Tensor, "heads new dim"]:
    """One masked softmax over all rows; `mask` is boolean or additive, (heads or 1, new, slots)."""
    mask = mask if mask is None else mask[None].to(query.dtype) if mask.is_floating_point() else mask[None]
    return scaled_dot_product_attention(query[None], key[None], value[None], mask, scale=scale, enable_gqa=True)[0]


def attention_weights(
    query: Float[Tensor, "heads new dim"],
    key: Float[Tensor, "kv_heads slots dim"],
    scale: float,
    mask: Tensor | None,
) -> Float[Tensor, "heads new slots"]:
    """The softmax weights of `oracle_attention`, in float32."""
    group = query.shape[0] // key.shape[0]
    logits = query.float() @ key.float().repeat_interleave(group, 0).mT * scale
    if mask is not None:
        logits = logits + mask if mask.is_floating_point() else logits.masked_fill(~mask, -torch.inf)
    return logits.softmax(-1)


def causal_blocks(
    query: Float[Tensor, "heads new dim"], key: Float[Tensor, "kv_heads slots dim"], scale: float
) -> Iterator[Float[Tensor, "heads block seen"]]:
    """`attention_weights` of the newest rows' queries, causally, some queries at a time: each block's over the rows up
    to its last query's own. Blocks that fit into a CPU's caches are several times faster than the whole."""
    (kv_heads, slots, _), new = key.shape, query.shape[1]
    block = 512 if query.is_cuda else 64
    key = key.float().mT
    grouped = (query.float() * scale).unflatten(0, (kv_heads, -1))
    for first in range(0, new, block):
        queries = grouped[:, :, first : first + block]
        count = queries.shape[2]
        seen = slots - new + first + count
        logits = (queries.flatten(1, 2) @ key[..., :seen]).unflatten(1, (-1, count))
        future = torch.ones(count, count, dtype=torch.bool, device=query.device).triu(1)
        logits[..., seen - count :].masked_fill_(future, -torch.inf)
        yield logits.softmax(-1).flatten(0, 1)


@dataclass(frozen=True)
class _ReadySlab:
    """A slab with equally many places for every KV head: where heads differ in their rows, some places are empty.

    An empty place shows any row; the layer's bias keeps it from being read.
    """

    slab: Slab
    rows: Rows
    key_places: Int[Tensor, " keys"] | None  # the group of rows in each place; None: as they are stored
    value_places: Int[Tensor, " values"] | None

    @classmethod
    def of(cls, slab: Slab, context: Context, device: torch.device) -> _ReadySlab:
        layout, tier = slab.layout, slab.tier
        position = slab.positions() if tier.needs_position else None
        if layout.uniform:
            return cls(slab, Rows(layout, None if position is None else position.int(), context=context), None, None)
        if position is not None:
            position = position[_places(layout, 1, device)].int()
        rows = Rows(Layout((layout.width,) * len(layout.counts)), position, context=context)
        places = {size: _places(layout, size, device) for size in {tier.key.group, tier.value.group}}
        return cls(slab, rows, places[tier.key.group], places[tier.value.group])

    def dot(self, query: Float[Tensor, "kv_heads new dim"]) -> tuple[Float[Tensor, "kv_heads new width"], Rows]:
        """The queries' products with the keys; and what is known of the rows, the keys if the values need them."""
        key, fixed = self.slab.tier.key, self.slab.key_fixed
        stored = _placed(self.slab.key, self.key_places)
        if not self.slab.tier.value.needs_key:
            return key.dot(query, stored, self.rows, fixed), self.rows
        decoded = key.decode(stored, self.rows, fixed, torch.float32)
        return product(query, self.rows.layout.pad(decoded).mT), replace(self.rows, key=decoded)

    def mix(self, weights: Float[Tensor, "kv_heads new width"], rows: Rows) -> Float[Tensor, "kv_heads new dim"]:
        stored = _placed(self.slab.value, self.value_places)
        return self.slab.tier.value.mix(weights, stored, rows, self.slab.value_fixed)


def _places(layout: Layout, size: int, device: torch.device) -> Int[Tensor, " places"]:
    """For every place of the padded form the group of `size` rows that is there; beyond a head's own, any."""
    groups = Layout(tuple(count // size for count in layout.counts))
    places = groups.starts(device)[:, None] + torch.arange(groups.width, device=device)
    return places.clamp(max=groups.rows - 1).flatten().int()


def _placed(stored: Stored, places: Int[Tensor, " places"] | None) -> Stored:
    return stored if places is None else {name: x.index_select(0, places) for name, x in stored.items()}


@dataclass(frozen=True)
class Ready:
    """A layer to be attended to where it is stored. What it has beside the packed layer is working memory."""

    slabs: tuple[_ReadySlab, ...]
    bias: Float[Tensor, "kv_heads slots"] | None

    @classmethod
    def of(cls, layer: PackedLayer, context: Context) -> Ready:
        return cls(tuple(_ReadySlab.of(slab, context, layer.empty.device) for slab in layer.slabs), layer.bias())

    def tensors(self) -> Iterator[Tensor]:
        own = [x for slab in self.slabs for x in (slab.rows.position, slab.key_places, slab.value_places)]
        yield from (x for x in (*own, self.bias) if x is not None)


def tiered_attention(
    query: Float[Tensor, "heads new dim"],
    layer: Ready,
    tail: tuple[Float[Tensor, "kv_heads tail dim"], Float[Tensor, "kv_heads tail dim"]],
    scale: float,
) -> Float[Tensor, "heads new dim"]:
    """One softmax over what each tier makes of the queries (`Codec.dot`), then what each makes of the weights (`mix`).

    In float32. Equal to `oracle_attention` over the decoded rows up to rounding; the newest rows of `tail` are the
    queries' own.
    """
    kv_heads, rows = tail[0].shape[:2]
    grouped = query.float().unflatten(0, (kv_heads, -1)).flatten(1, 2)  # (kv_heads, group * new, dim)
    found = [slab.dot(grouped) for slab in layer.slabs]
    logits = torch.cat([*(x for x, _ in found), product(grouped, tail[0].mT)], -1).mul_(scale)
    if layer.bias is not None:
        logits[..., :-rows] += layer.bias[:, None]
    if query.shape[1] > 1:
        hidden = ~causal_mask(query.shape[1], rows, query.device)
        logits[..., -rows:].unflatten(1, (-1, query.shape[1])).masked_fill_(hidden, -torch.inf)
    *parts, last = logits.softmax(-1).split([*(x.shape[-1] for x, _ in found), rows], -1)
    out = product(last, tail[1])
    for slab, (_, known), weights in zip(layer.slabs, found, parts, strict=True):
        out = out + slab.mix(weights, known)
    return out.unflatten(1, (-1, query.shape[1])).flatten(0, 1).to(query.dtype)
