"""How much a codec may keep, given the budget."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable

import torch
from jaxtyping import Int8
from torch import Tensor

from kvbench.budget import Allowance
from kvbench.method import Wrapper
from kvbench.plan import EVICTED, EXACT, Infeasible, LayerPlan, Plan, Tier, keep_all, shrink, top_rows, weigh
from kvbench.prefill import Seen

THIN, WHOLE = 0, 1


def first_fitting(seen: Seen, budget: Allowance, plans: Iterable[Plan]) -> Plan:
    """The first plan that fits, made no sooner than needed. Raises Infeasible with the smallest of them."""
    smallest = None
    for plan in plans:
        weight = weigh(plan, seen)
        size = budget.charged(weight.payload, weight.metadata)
        if size <= budget.limit:
            return plan
        smallest = size if smallest is None else min(smallest, size)
    assert smallest is not None
    raise Infeasible(smallest, budget.limit)


def thin_rows(
    method: Wrapper,
    seen: Seen,
    budget: Allowance,
    tier: Callable[[int, int], Tier],
    levels: Iterable[int],
    window: int,
    grow: bool,
) -> Plan:
    """Thin rows and, last, at least `window` exact ones: as many tokens as the budget holds.

    `tier(layer, level)` is how thin rows are stored. The first of `levels` that holds every token is taken, and with
    `grow` the exact rows are then as many as fit; if none does, the last one is, for the tokens that the scores of
    `method` put first. The window shrinks to half of what is kept.
    """
    layers, (kv_heads, tokens, _) = len(seen.layers), seen.layers[0].key.shape
    exact = budget.charged(*EXACT.row_bytes(seen.dim, seen.dtype))
    if grow and budget.limit >= layers * kv_heads * tokens * exact:
        return keep_all(seen)
    least = min(window, tokens // 2)
    for level in levels:
        sample = tier(0, level)
        thin = budget.charged(*sample.row_bytes(seen.dim, seen.dtype))
        once = (codec.fixed_bytes(kv_heads, seen.dim, seen.dtype) for codec in (sample.key, sample.value))
        fixed = budget.charged(0, sum(once))
        room = (budget.limit // layers - fixed) // kv_heads
        spare = room - tokens * thin - least * (exact - thin)
        if spare >= 0:
            more = spare // (exact - thin) if thin < exact else tokens
            whole = min(least + more, tokens if grow else window)
            route = _split(torch.zeros_like(seen.layers[0].key[..., 0], dtype=torch.int8), whole)
            return Plan(tuple(LayerPlan((tier(i, level), EXACT), route) for i in range(layers)))

    first, last = method.protect
    protect = (first, max(last, window))

    def exact_rows(keep: int) -> int:
        return min(shrink(protect, keep, tokens)[1], window)

    def size(keep: int) -> int:
        return keep * thin + exact_rows(keep) * (exact - thin)

    keep = bisect_right(range(tokens), room, key=size) - 1
    if keep < 1:
        raise Infeasible(layers * (fixed + kv_heads * thin), budget.limit)
    routes = [_split(top_rows(method.scores(seen, i), keep, protect), exact_rows(keep)) for i in range(layers)]
    return Plan(tuple(LayerPlan((tier(i, level), EXACT), route) for i, route in enumerate(routes)))


def _split(route: Int8[Tensor, "kv_heads tokens"], whole: int) -> Int8[Tensor, "kv_heads tokens"]:
    """Of a route whose kept tokens are thin, the last `whole` tokens exact; they are all kept."""
    at = torch.arange(route.shape[1], device=route.device)
    return route.masked_fill((at >= route.shape[1] - whole) & (route != EVICTED), WHOLE)
