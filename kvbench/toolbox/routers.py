"""Routers: who is retained, approximated or evicted, given what each costs and what each is worth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int, Int8
from torch import Tensor

from kvbench.method import Method, Scale
from kvbench.plan import EVICTED
from kvbench.prefill import Seen

RETAINED, APPROXIMATED = 0, 1


def as_mass(scores: Float[Tensor, "kv_heads tokens"], scale: Scale) -> Float[Tensor, "kv_heads tokens"]:
    """Scores as positive numbers that may be added up: where only their order counts, a softmax of the standardised."""
    if scale is Scale.mass:
        return scores
    spread = scores.std(1, correction=0, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
    return ((scores - scores.mean(1, keepdim=True)) / spread).softmax(1)


def hull_route(
    importance: Float[Tensor, "kv_heads tokens"],
    quality: Float[Tensor, "tiers kv_heads tokens"],
    costs: Sequence[int],
    limits: Int[Tensor, " kv_heads"],
    protected: Bool[Tensor, " tokens"],
) -> Int8[Tensor, "kv_heads tokens"]:
    """The tier of each token: maximises the sum of importance x quality in each KV head under its limit in bytes.

    A token in tier i costs costs[i] bytes and is worth importance x quality[i] (0 to 1); evicted it is worth nothing.
    The relaxation of this multiple-choice knapsack is solved by one sort: each token climbs its concave hull, from tier
    to dearer tier, in steps of falling worth per byte, and the best steps of all tokens are taken while they fit.
    Protected tokens go to the dearest tier, before any other step. The bytes of the first step left out stay unused.
    """
    device = importance.device
    limits, protected, price = limits.to(device), protected.to(device), torch.tensor(costs, device=device)
    value = importance * quality
    dearest = int(price.argmax())
    spent = torch.zeros_like(importance, dtype=torch.long)
    worth = torch.zeros_like(importance)
    densities: list[Tensor] = []
    prices: list[Tensor] = []
    tiers: list[Tensor] = []
    for _ in costs:  # one step of every token's hull
        more = price[:, None, None] - spent
        slope = ((value - worth) / more.clamp(min=1)).masked_fill(more <= 0, -torch.inf)
        density, tier = slope.max(0)
        if not densities:
            density, tier = density.masked_fill(protected, torch.inf), tier.masked_fill(protected, dearest)
        step = price[tier] - spent
        # A hull falls: rounding must not let a step go before the one it stands on.
        densities.append(density if not densities else density.minimum(densities[-1]))
        prices.append(step.clamp(min=0))
        tiers.append(tier)
        spent, worth = spent.maximum(price[tier]), value.gather(0, tier[None])[0]
    density = torch.cat(densities, 1)
    order = density.argsort(dim=1, descending=True, stable=True)
    affordable = torch.cat(prices, 1).gather(1, order).cumsum(1) <= limits[:, None]
    taken = torch.zeros_like(affordable).scatter(1, order, affordable) & (density >= 0)
    route = torch.full_like(importance, EVICTED, dtype=torch.int8)
    for tier, took in zip(tiers, taken.chunk(len(tiers), dim=1), strict=True):
        route = torch.where(took, tier.to(torch.int8), route)
    return route


def one_price_route(
    importance: Sequence[Float[Tensor, "units tokens"]],
    quality: Sequence[Float[Tensor, "tiers units tokens"]],
    costs: Sequence[int],
    limits: Int[Tensor, "layers units"],
    protected: Bool[Tensor, " tokens"],
) -> Int8[Tensor, "layers units tokens"]:
    """`hull_route` over the tokens of all layers and units at once: a byte is worth the same wherever it goes."""
    every, flat = torch.stack(list(importance)), torch.stack(list(quality), 1).flatten(1)[:, None]
    always = protected.repeat(every[..., 0].numel())
    return hull_route(every.flatten()[None], flat, costs, limits.sum()[None], always).view_as(every)


def byte_limits(
    method: Method, seen: Seen, scores: Sequence[Float[Tensor, "kv_heads tokens"]], limit: int, row: int
) -> Int[Tensor, "layers kv_heads"]:
    """`limit` bytes split over layers and KV heads as `method` allocates rows of `row` bytes each.

    What is left of whole rows is split equally; so is everything, if there isn't a row for each.
    """
    units = len(scores) * len(scores[0])
    if limit // row < units:
        return torch.full((len(scores), len(scores[0])), limit // units)
    counts = method.allocate(seen, seen.network.gather(scores), limit // row).cpu()
    return counts * row + (limit - int(counts.sum()) * row) // units


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
    scores: Float[Tensor, "units tokens"],
    error: Float[Tensor, "units tokens"],
    costs: Sequence[int],
    limits: Int[Tensor, " units"],
    protected: Bool[Tensor, " tokens"],
) -> Int8[Tensor, "units tokens"]:
    """VECTOR's truncation under a limit in bytes for each unit: of the pool (the best retained + approximated tokens)
    those with the least `error` lose their value. Protected tokens are in the pool and keep it."""
    protected = protected.to(scores.device)
    ranked = scores.masked_fill(protected, torch.inf)
    error = error.masked_fill(protected, torch.inf)
    route = torch.full_like(scores, EVICTED, dtype=torch.int8)
    for unit, limit in enumerate(limits.tolist()):
        retained, approximated = paper_counts(scores.shape[1], (costs[0], costs[1]), limit)
        pool = ranked[unit].topk(retained + approximated).indices
        route[unit, pool] = RETAINED
        route[unit, pool[error[unit, pool].argsort()[:approximated]]] = APPROXIMATED
    return route


def protected_tokens(
    method: Method, limits: Int[Tensor, "layers kv_heads"], row: int, tokens: int
) -> Bool[Tensor, " tokens"]:
    """The first and last tokens that `method` always keeps, of so many; `row` is a token's bytes."""
    first, last = method.protected(int(limits.sum()) // (limits.numel() * row), tokens)
    at = torch.arange(tokens)
    return (at < first) | (at >= tokens - last)
