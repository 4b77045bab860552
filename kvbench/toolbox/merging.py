"""Merging: tokens that don't stay as they are leave something of themselves in a row that stays, their centre."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import normalize

from kvbench.budget import Allowance
from kvbench.plan import EVICTED, EXACT, Infeasible, LayerPlan, Made, Plan, keep_all, weigh
from kvbench.prefill import Seen, SeenLayer

CHUNK = 1024  # tokens whose similarity to all centres exists at once

MERGED = replace(EXACT, name="merged")  # rows made of several tokens: their log multiplicities are held, 4 bytes each


def most_centres(seen: Seen, budget: Allowance, make: Callable[[int], Plan]) -> Plan:
    """The plan `make` makes with as many centres per KV head as fit the budget; the full cache if that fits.

    How many rows are merged is known afterwards: it starts as if all were, and goes on while bytes are left over.
    """
    tokens, heads = len(seen.token_ids), sum(x.key.shape[0] for x in seen.layers)
    payload, _ = EXACT.row_bytes(seen.dim, seen.dtype)
    if budget.limit >= payload * tokens * heads:
        return keep_all(seen)
    row = heads * budget.charged(payload, 4)
    rows = max((budget.limit - budget.charged(0, 2 * 4 * heads)) // row, 1)  # heads' counts of exact and merged rows
    found = make(rows)
    while (spare := budget.limit - _charged(budget, found, seen)) >= row and rows < tokens - 1:
        rows = min(rows + spare // row, tokens - 1)
        more = make(rows)
        if _charged(budget, more, seen) > budget.limit:
            return found
        found = more
    if spare < 0:
        raise Infeasible(budget.limit - spare, budget.limit)
    return found


def _charged(budget: Allowance, plan: Plan, seen: Seen) -> int:
    weight = weigh(plan, seen)
    return budget.charged(weight.payload, weight.metadata)


def rows(
    x: Float[Tensor, "kv_heads tokens dim"], index: Int64[Tensor, "kv_heads chosen"]
) -> Float[Tensor, "kv_heads chosen dim"]:
    """The chosen rows of each KV head."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def most_similar(
    x: SeenLayer,
    members: Int64[Tensor, "kv_heads members"],
    centres: Int64[Tensor, "kv_heads rows"],
    threshold: float,
) -> Int64[Tensor, "kv_heads members"]:
    """The centre with the largest cosine of keys times cosine of values (negative ones are 0) for each member.

    It is the number of centres where nothing is above `threshold`.
    """
    units = [normalize(y.float(), dim=-1) for y in (x.key, x.value)]
    found = [members[:, :0]]
    for part in members.split(CHUNK, 1):
        key, value = ((rows(y, part) @ rows(y, centres).mT).relu() for y in units)
        best, centre = (key * value).max(-1)
        found.append(centre.masked_fill(best <= threshold, centres.shape[1]))
    return torch.cat(found, 1)


def pooled(
    own: Float[Tensor, "kv_heads rows dim"],
    joining: Float[Tensor, "kv_heads members dim"],
    centre: Int64[Tensor, "kv_heads members"],
) -> Float[Tensor, "kv_heads rows dim"]:
    """The sum over each centre's row and its members; `centre` = rows: the token joins none."""
    spare = torch.cat([own, own.new_zeros(own.shape[0], 1, own.shape[2])], 1)
    return spare.scatter_add(1, centre[..., None].expand_as(joining), joining)[:, :-1]


def merged_layer(
    x: SeenLayer,
    centres: Int64[Tensor, "kv_heads rows"],
    key: Float[Tensor, "kv_heads rows dim"],
    value: Float[Tensor, "kv_heads rows dim"],
    size: Float[Tensor, "kv_heads rows"],
    multiplicity: bool = False,
) -> LayerPlan:
    """Centres without members (`size` 1) stay exact, the others become the rows `key`, `value`.

    `multiplicity`: a merged row competes as `size` keys, else as one.
    """
    alone = size == 1
    none = torch.full(x.key.shape[:2], EVICTED, dtype=torch.int8, device=x.key.device)
    exact = none.scatter(1, centres, torch.where(alone, 0, EVICTED).to(torch.int8))
    log = size.log() if multiplicity else torch.zeros_like(size)
    route = torch.cat([exact, torch.where(alone, EVICTED, 1).to(torch.int8)], 1)
    return LayerPlan((EXACT, MERGED), route, Made(key, value, log, x.position[centres]))
