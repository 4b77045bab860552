"""For methods that hold everything and read a part of it: what a layer may read at a step, and choices within it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvbench.budget import Allowance
from kvbench.cache.fork import Event
from kvbench.plan import Infeasible, Plan, keep_all
from kvbench.prefill import Seen


@dataclass(frozen=True)
class Reading:
    """What one layer may read at a step, in bytes; a share of all tokens seen so far grows with them."""

    budget: Allowance
    row: int  # bytes of one token in every KV head

    @property
    def everything(self) -> bool:
        """Whether it may read all tokens at every step."""
        return self.all(self.budget.tokens) and self.budget.per_token >= self.row

    def all(self, tokens: int) -> bool:
        """Whether it may read all of so many tokens."""
        return self.budget.at(tokens) >= tokens * self.row

    def rows(self, event: Event, scanned: int = 0) -> int:
        """Tokens that every KV head may read besides `scanned` bytes; none, once a ceiling in bytes is exceeded."""
        return max((self.budget.at(event.slots) - self.budget.charged(0, scanned)) // self.row, 0)


def layer_reading(seen: Seen, budget: Allowance, least: int, dense: int = 0) -> Reading:
    """What each layer may read where the first `dense` ones read everything, and the others alike.

    `least` are the bytes below which a layer can't choose. Raises Infeasible.
    """
    layers, tokens = len(seen.layers), len(seen.token_ids)
    row = seen.network.row_bytes() // layers
    dense = min(dense, layers)
    smallest = min(dense * row * (tokens + 1) + (layers - dense) * least, layers * row * tokens)
    if budget.limit < smallest and not budget.nominal:
        raise Infeasible(smallest, budget.limit)
    sparse = max(layers - dense, 1)
    limit = (budget.limit - dense * row * tokens) // sparse
    growth = (budget.per_token - dense * row) / sparse
    return Reading(replace(budget, limit=limit, tokens=tokens, per_token=growth), row)


def keep_all_with(seen: Seen, states: Iterable[Any]) -> Plan:
    """Every token exact, and where each layer's `select` starts."""
    return Plan(tuple(replace(x, state=state) for x, state in zip(keep_all(seen).layers, states, strict=True)))


def best_within(
    scores: Float[Tensor, "heads candidates"], kv_heads: int, most: int
) -> Bool[Tensor, "heads candidates"]:
    """Each query head's best candidates: as many, alike for the heads of a group, as keep their union at `most`."""
    if most >= scores.shape[1]:
        return torch.ones_like(scores, dtype=torch.bool)
    rank = scores.argsort(dim=1, descending=True, stable=True).argsort(1)
    first = rank.unflatten(0, (kv_heads, -1)).amin(1).sort(1).values  # by the head that wants it most
    return rank < first[:, most].repeat_interleave(len(scores) // kv_heads)[:, None]
