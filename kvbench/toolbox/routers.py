"""Routers: who is retained, approximated or evicted, given what each costs and what each is worth."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int8
from torch import Tensor

from kvbench.method import Scale
from kvbench.plan import EVICTED

RETAINED, APPROXIMATED = 0, 1


def as_mass(scores: Float[Tensor, "kv_heads tokens"], scale: Scale) -> Float[Tensor, "kv_heads tokens"]:
    """Scores as positive numbers that may be added up: where only their order counts, a softmax of the standardised."""
    if scale is Scale.mass:
        return scores
    spread = scores.std(1, correction=0, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
    return ((scores - scores.mean(1, keepdim=True)) / spread).softmax(1)


def utility_route(
    importance: Float[Tensor, "kv_heads tokens"],
    approximated: Float[Tensor, "kv_heads tokens"],
    retained: Float[Tensor, "kv_heads tokens"],
    costs: tuple[int, int],
    limit: int,
    protected: Bool[Tensor, " tokens"],
) -> Int8[Tensor, "kv_heads tokens"]:
    """Maximises the sum of importance x quality in each KV head under `limit` bytes.

    A token is worth importance x `retained` (quality in [0, 1]) at costs[0] bytes, importance x `approximated` at
    costs[1] < costs[0], or nothing. The relaxation of this multiple-choice knapsack is solved by one sort of the worth
    per byte of the steps of each token's concave hull: first approximate then retain, or retain at once. Protected
    tokens are retained first. At most the last step's bytes stay unused.
    """
    dear, cheap = costs
    first = importance * approximated / cheap
    second = importance * (retained - approximated) / (dear - cheap)
    in_steps = (first >= second) & ~protected
    once = torch.where(protected, torch.inf, importance * retained / dear)
    density = torch.cat([torch.where(in_steps, first, once), torch.where(in_steps, second, -torch.inf)], dim=1)
    cost = torch.cat([torch.where(in_steps, cheap, dear), torch.full_like(in_steps, dear - cheap, dtype=torch.long)], 1)
    order = density.argsort(dim=1, descending=True, stable=True)
    affordable = cost.gather(1, order).cumsum(1) <= limit
    taken = torch.zeros_like(affordable).scatter(1, order, affordable) & (density >= 0)
    one, two = taken.chunk(2, dim=1)
    route = torch.full_like(importance, EVICTED, dtype=torch.int8)
    route[one & in_steps] = APPROXIMATED
    route[(one & ~in_steps) | two] = RETAINED
    return route


def paper_counts(tokens: int, costs: tuple[int, int], limit: int) -> tuple[int, int]:
    """(retained, approximated) tokens per KV head of VECTOR's split, the largest that fits into `limit` bytes.

    With k = (1 - p_c) T tokens' worth of bytes and p_a = min(p_c / 2, (1 - p_c) / 2): k + p_a T tokens are pooled, and
    2 p_a T of them lose their value. (0, 0) if not even one token fits.
    """
    k = torch.arange(tokens + 1)
    swapped = torch.minimum((tokens - k) // 2, k // 2)
    retained, approximated = k - swapped, 2 * swapped
    fits = retained * costs[0] + approximated * costs[1] <= limit
    best = int(fits.nonzero().max())
    return int(retained[best]), int(approximated[best])


def paper_route(
    scores: Float[Tensor, "kv_heads tokens"],
    error: Float[Tensor, "kv_heads tokens"],
    counts: tuple[int, int],
    protected: Bool[Tensor, " tokens"],
) -> Int8[Tensor, "kv_heads tokens"]:
    """VECTOR's truncation: of the pool (the best retained + approximated tokens) those with the least `error` lose
    their value. Protected tokens are in the pool and keep it."""
    retained, approximated = counts
    route = torch.full_like(scores, EVICTED, dtype=torch.int8)
    pool = scores.masked_fill(protected, torch.inf).topk(retained + approximated, dim=1).indices
    least = error.masked_fill(protected, torch.inf).gather(1, pool).argsort(dim=1)[:, :approximated]
    route.scatter_(1, pool, RETAINED)
    return route.scatter(1, pool.gather(1, least), APPROXIMATED)
