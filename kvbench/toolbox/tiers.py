"""Tiers by name, and how much of a token survives in one: what a router decides by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from kvbench.cache.codecs.base import Contexts, Rows
from kvbench.cache.codecs.quant import Quant
from kvbench.cache.codecs.standardised import Standardised
from kvbench.cache.layout import Layout
from kvbench.plan import EXACT, Tier
from kvbench.plugins import known
from kvbench.prefill import SeenLayer

BITS = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}
NAMES = ("exact", *BITS)


def tier(name: str) -> Tier:
    """`exact`, or keys and values quantised token by token in blocks of 64 channels, keys after standardising these."""
    known("tier", name, NAMES)
    return EXACT if name == "exact" else Tier(name, few_bits_key(BITS[name]), Quant(BITS[name], 64))


def few_bits_key(bits: int) -> Standardised:
    return Standardised(Quant(bits, 64))


def fixed_bytes(tiers: Iterable[Tier], kv_heads: int, dim: int, dtype: torch.dtype) -> int:
    """What the tiers' codecs leave per layer and context."""
    return sum(codec.fixed_bytes(kv_heads, dim, dtype) for tier in tiers for codec in (tier.key, tier.value))


# What a key's relative error counts for beside a value's. In theory the variance of a head's logits over the tokens it
# sees: 6.8 in the median head of SmolLM2-135M, 8.1 on average; half of the heads have 4.9 to 9.6.
KEY_WEIGHT = 6.0


def kept(x: SeenLayer, tiers: Sequence[Tier], contexts: Contexts) -> Float[Tensor, "tiers kv_heads tokens"]:
    """What each tier would keep of each token's share of the attention output, 0 to 1.

    The output's squared error is attention^2 x (|dv|^2 + (q dk)^2 |v - o|^2) to first order: the relative error of the
    value, and KEY_WEIGHT x the error of the key relative to the mean squared distance of the head's keys from their
    mean, which shifts all logits alike. Values that are estimated are taken to be estimated from exact keys.
    """
    rows, shape = every_row(x, contexts), x.key.shape[:2]
    size = x.value.float().square().sum(-1)
    centred = x.key.float() - x.key.float().mean(1, keepdim=True)
    spread = centred.square().sum(-1).mean(1, keepdim=True)
    by_value = {codec: codec.squared_error(x.value.flatten(0, 1), rows) for codec in {one.value for one in tiers}}
    by_key = {codec: codec.squared_error(x.key.flatten(0, 1), rows) for codec in {one.key for one in tiers}}
    lost = [
        by_value[one.value].view(shape) / size.clamp(min=1e-12)
        + KEY_WEIGHT * by_key[one.key].view(shape) / spread.clamp(min=1e-12)
        for one in tiers
    ]
    return (1 - torch.stack(lost)).clamp(0, 1)


def every_row(x: SeenLayer, contexts: Contexts) -> Rows:
    """Every token of a layer in every KV head, as a codec sees them."""
    kv_heads, tokens, _ = x.key.shape
    layout, position = Layout((tokens,) * kv_heads, shared=True), x.position.repeat(kv_heads)
    return Rows(layout, position, key=x.key.flatten(0, 1), context=contexts[x.key.device])
