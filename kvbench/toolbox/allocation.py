"""Rows split among layers and KV heads in whole numbers: what the allocators share."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvbench.plan import shrink
from kvbench.prefill import Seen


def share_out(weights: Float[Tensor, " parts"], total: int, least: int, most: int) -> Int[Tensor, " parts"]:
    """`total` in whole numbers: `least` for each, the rest in proportion to `weights`, nobody above `most`.

    What one can't hold goes to the others in proportion. Fractions are rounded by largest remainder, the first of equal
    ones up, so the sum is `total` (or `most` for all). `least` for each must not be more than `total`.
    """
    weights = weights.double().cpu()
    room = most - least
    rest = min(total, len(weights) * most) - len(weights) * least
    full = torch.zeros(len(weights), dtype=torch.bool)
    while True:
        wish = weights.masked_fill(full, 0)
        if wish.sum() == 0:
            wish = (~full).double()
        ideal = (wish * (rest - room * int(full.sum())) / wish.sum()).masked_fill(full, room)
        over = (ideal > room + 1e-6) & ~full
        if not over.any():
            break
        full |= over
    counts = ideal.clamp(max=room).floor().long()
    remainder = (ideal - counts).round(decimals=6).masked_fill(counts >= room, -1)
    counts[remainder.argsort(descending=True, stable=True)[: rest - int(counts.sum())]] += 1
    return counts + least


def retrieval_shares(
    importance: Float[Tensor, "layers kv_heads"], rows: int, streaming: int, tokens: int
) -> Int[Tensor, "layers kv_heads"]:
    """All tokens for as many of the most important KV heads as can be while the others have `streaming` rows each.

    `streaming` shrinks to half of an even share. What is left widens the others' share evenly.
    """
    heads = importance.numel()
    if rows >= heads * tokens:
        return torch.full(importance.shape, tokens)
    streaming = max(min(streaming, rows // heads // 2), 1)
    whole = (rows - heads * streaming) // (tokens - streaming)
    order = importance.flatten().argsort(descending=True, stable=True).cpu()
    counts = torch.full((heads,), tokens)
    counts[order[whole:]] = share_out(torch.ones(heads - whole), rows - whole * tokens, streaming, tokens)
    return counts.view(importance.shape)


def protected_rows(seen: Seen, protect: tuple[int, int], rows: int) -> tuple[int, int]:
    """(first, last): the protected tokens of every KV head when `rows` are split; they shrink with an even share."""
    kv_heads, tokens, _ = seen.layers[0].key.shape
    return shrink(protect, rows // (len(seen.layers) * kv_heads), tokens)
