"""Tiers by name, and how much of a token survives in one: what a router decides by."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from kvbench.cache.codecs.base import Codec, Rows
from kvbench.cache.codecs.exact import Exact
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


def all_rows(x: SeenLayer) -> Rows:
    """Every token of a layer in every KV head, as a codec sees them."""
    return Rows(Layout((x.key.shape[1],) * x.key.shape[0], shared=True), x.position.repeat(x.key.shape[0]))


KEY_WEIGHT = 6.0  # the variance of attention's logits over the tokens of a head, about: what a key's error meets


def quality(
    x: SeenLayer,
    key: Float[Tensor, "kv_heads tokens dim"] | None,
    value: Float[Tensor, "kv_heads tokens dim"] | None,
) -> Float[Tensor, "kv_heads tokens"]:
    """What is kept of each token's share of the attention output, 0 to 1, if it comes back as `key` and `value` (None:
    as it was).

    The output's squared error is attention^2 x (|dv|^2 + (q dk)^2 |v - o|^2) to first order: the relative error of the
    value, and KEY_WEIGHT x the error of the key relative to the mean squared distance of the head's keys from their
    mean, which shifts all logits alike.
    """
    lost = torch.zeros(x.key.shape[:2], device=x.key.device)
    if value is not None:
        exact = x.value.float()
        lost = (value - exact).square().sum(-1) / exact.square().sum(-1).clamp(min=1e-12)
    if key is not None:
        exact = x.key.float()
        spread = (exact - exact.mean(1, keepdim=True)).square().sum(-1).mean(1, keepdim=True)
        lost = lost + KEY_WEIGHT * (key - exact).square().sum(-1) / spread.clamp(min=1e-12)
    return (1 - lost).clamp(0, 1)


def round_trip(codec: Codec, x: Float[Tensor, "kv_heads tokens dim"], rows: Rows) -> Tensor | None:
    """Every row of a layer as `codec` would give it back, in float32; None: as it was."""
    return None if codec == Exact() else rows.layout.pad(codec.round_trip(x.flatten(0, 1), rows, torch.float32))
