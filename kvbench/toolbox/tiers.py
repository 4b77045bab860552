"""Tiers by name, and how much of a token survives in one: what a router decides by."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from kvbench.cache.codecs.base import Rows
from kvbench.cache.codecs.quant import Quant
from kvbench.cache.layout import Layout
from kvbench.plan import EXACT, Tier
from kvbench.plugins import known
from kvbench.prefill import SeenLayer

BITS = {"int8": 8, "int4": 4, "int2": 2}
NAMES = ("exact", *BITS)


def tier(name: str) -> Tier:
    """`exact`, or keys and values quantised token by token in blocks of 64 channels."""
    known("tier", name, NAMES)
    return EXACT if name == "exact" else Tier(name, Quant(BITS[name], 64), Quant(BITS[name], 64))


def all_rows(x: SeenLayer) -> Rows:
    """Every token of a layer in every KV head, as a codec sees them."""
    return Rows(Layout((x.key.shape[1],) * x.key.shape[0], shared=True), x.position.repeat(x.key.shape[0]))


def quality(stored: Tier, x: SeenLayer) -> Float[Tensor, "kv_heads tokens"]:
    """What a tier keeps of each token, 0 to 1: (1 - relative squared error of its value) x (the same of its key).

    The error of a key is relative to its distance from the head's mean key, which shifts all logits alike.
    """
    rows = all_rows(x)
    if stored == EXACT:
        return x.key.new_ones(x.key.shape[:2]).float()
    kept = []
    for codec, exact in ((stored.key, x.key.float()), (stored.value, x.value.float())):
        flat = exact.to(x.key.dtype).flatten(0, 1)
        back = rows.layout.pad(codec.decode(codec.encode(flat, rows, {}), rows, {}, flat.dtype)).float()
        around = exact - exact.mean(1, keepdim=True) if codec is stored.key else exact
        kept.append(1 - (back - exact).square().sum(-1) / around.square().sum(-1).clamp(min=1e-12))
    return kept[0].clamp(0, 1) * kept[1].clamp(0, 1)
