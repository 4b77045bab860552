"""Attention over a compressed layer, twice: the oracle decodes every row; the tiered one works on what is stored."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvbench.cache.packed import PackedLayer, slab_bias


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


def tiered_attention(
    query: Float[Tensor, "heads new dim"],
    layer: PackedLayer,
    tail: tuple[Float[Tensor, "kv_heads tail dim"], Float[Tensor, "kv_heads tail dim"]],
    scale: float,
) -> Float[Tensor, "heads new dim"]:
    """Each tier attends on its own, in float32; the parts are merged exactly by their log-sum-exp.

    Values that are a linear function of what is stored are never built (`Codec.mix`). Equal to `oracle_attention` over
    the decoded rows up to rounding; the newest rows of `tail` are the queries' own.
    """
    kv_heads, new = tail[0].shape[0], query.shape[1]
    grouped = query.float().unflatten(0, (kv_heads, -1)).flatten(1, 2)  # (kv_heads, group * new, dim)
    outs, masses = [], []
    for slab in layer.slabs:
        rows = slab.rows(layer.token_ids, torch.float32)
        assert rows.key is not None
        logits = grouped @ slab.layout.pad(rows.key).mT * scale + slab_bias(slab, query.device)[:, None]
        mass = logits.logsumexp(-1, keepdim=True)
        weights = (logits - mass.clamp(min=torch.finfo(mass.dtype).min)).exp()
        outs.append(slab.tier.value.mix(weights, slab.value, rows, slab.value_fixed))
        masses.append(mass)
    mask = causal_mask(new, tail[0].shape[1], query.device).repeat(query.shape[0] // kv_heads, 1)
    logits = (grouped @ tail[0].float().mT * scale).masked_fill(~mask, -torch.inf)
    masses.append(logits.logsumexp(-1, keepdim=True))
    outs.append((logits - masses[-1]).exp() @ tail[1].float())
    share = torch.stack(masses).softmax(0)
    out = (torch.stack(outs) * share).sum(0)
    return out.unflatten(1, (-1, new)).flatten(0, 1).to(query.dtype)
