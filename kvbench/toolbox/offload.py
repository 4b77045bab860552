"""For methods that leave most rows on the host: what fits on the device, and an index of what can be fetched."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvbench.budget import Allowance
from kvbench.cache.fork import Edit, Event
from kvbench.cache.layout import widen
from kvbench.plan import EXACT, HOST, Infeasible
from kvbench.prefill import Seen

LEAST = 3  # rows on the device that a layer can't do without: the newest one, and two to be fetched
_INDEX = 4  # bytes that say which row is fetched
_CHUNK = 1024  # tokens whose distances to all centroids exist at once


@dataclass(frozen=True)
class Room:
    """What one layer may hold on the device, in bytes; a share of all tokens seen so far grows with them."""

    budget: Allowance
    row: int  # bytes of a token in every KV head
    kv_heads: int

    def fetched(self, tokens: int, held: int, other: int, more: int = 0) -> int:
        """Rows that can be fetched once so many tokens have been seen, beside `held` rows and `other` bytes here.

        `more` are further bytes that each of them takes.
        """
        left = self.budget.at(tokens) - self.budget.charged(held * self.row, other)
        return left // self.budget.charged(self.row, _INDEX * self.kv_heads + more)


def layer_room(seen: Seen, budget: Allowance) -> Room | None:
    """What each layer may hold, all alike; None where every token may stay on the device for good."""
    layers, full = len(seen.layers), seen.network.row_bytes()
    if budget.limit >= full * len(seen.token_ids) and (budget.nominal or budget.per_token >= full):
        return None
    share = replace(
        budget,
        limit=budget.limit // layers,
        tokens=len(seen.token_ids),
        per_token=budget.per_token / layers,
    )
    return Room(share, full // layers, len(seen.layers[0].key))


def rows_within(room: Room, seen: Seen, budget: Allowance, other: int, more: int = 0) -> int:
    """Rows of a layer on the device, at most all, besides `other` bytes. Raises Infeasible below `LEAST`."""
    rows = room.fetched(len(seen.token_ids), 0, other, more)
    if rows < LEAST:
        each = budget.charged(room.row, _INDEX * room.kv_heads + more)
        raise Infeasible(len(seen.layers) * (LEAST * each + budget.charged(0, other)), budget.limit)
    return min(rows, len(seen.token_ids))


class Index(NamedTuple):
    """Units of the rows that are, or will be, on the host: which unit each is of, in their order, and its mean key."""

    mean: Tensor  # (kv_heads, units, dim)
    unit: Tensor  # (kv_heads, rows), of `index_dtype`
    last: int = 0  # rows of the newest unit, where it is not the context's

    @property
    def nbytes(self) -> int:
        return self.mean.nbytes + self.unit.nbytes

    def more(self, rows: int) -> int:
        """Bytes that a new unit of `rows` rows takes."""
        return self.mean[:, :1].nbytes + len(self.unit) * rows * self.unit.element_size()

    def extended(self, total: Float[Tensor, "kv_heads dim"], rows: int, join: bool = False) -> Index:
        """With `rows` further rows, whose keys add up to `total`: a new unit, or part of the newest one."""
        mean, last = self.mean, 0
        if join:
            total, mean, last = total + mean[:, -1].float() * self.last, mean[:, :-1], self.last
        mean = torch.cat([mean, (total / (last + rows))[:, None].to(mean.dtype)], 1)
        unit = torch.full((len(mean), rows), mean.shape[1] - 1, device=mean.device).to(self.unit.dtype)
        return Index(mean, torch.cat([self.unit, unit], 1), last + rows)

    def best(self, scores: Float[Tensor, "kv_heads units"], rows: int, count: int) -> Int[Tensor, "kv_heads count"]:
        """Of the first `rows` rows those of the best units: unit after unit, the last of them cut off at `count`.

        Rows that are in no unit yet are never among them.
        """
        rank = scores.argsort(stable=True, dim=1, descending=True).argsort(1)
        return rank.gather(1, widen(self.unit[:, :rows])).argsort(stable=True, dim=1)[:, :count].int()


def to_host(event: Event, first: int, rows: int) -> Edit:
    """The oldest `rows` rows behind the `first` ones leave the device."""
    tail = min(event.slots - event.context, event.slots - first - rows)
    route = torch.zeros(len(event.key), event.slots - tail, dtype=torch.int8, device=event.key.device)
    route[:, first : first + rows] = 1
    return Edit((EXACT, HOST), route, tail)


def unit_means(
    key: Float[Tensor, "kv_heads rows dim"], unit: Int[Tensor, "kv_heads rows"], units: int
) -> Float[Tensor, "kv_heads {units} dim"]:
    """The mean key of each unit, in float32; zero where it has no row."""
    names = torch.arange(units, device=key.device)[:, None]
    total = key.new_zeros(len(key), units, key.shape[2], dtype=torch.float32)
    count = total[..., :1].clone()
    for rows, mine in zip(key.split(_CHUNK, 1), unit.split(_CHUNK, 1), strict=True):
        members = (mine[:, None] == names).float()
        total += members @ rows.float()
        count += members.sum(-1, keepdim=True)
    return total / count.clamp(min=1)


def k_means(
    key: Float[Tensor, "kv_heads rows dim"], units: int, iterations: int, generator: torch.Generator
) -> tuple[Float[Tensor, "kv_heads {units} dim"], Int[Tensor, "kv_heads rows"]]:
    """Lloyd's clusters of each KV head's keys, begun at random keys: (means, the cluster of each row)."""
    order = torch.rand(key.shape[:2], generator=generator).argsort(1)[:, :units].to(key.device)
    mean = key.float().take_along_dim(order[..., None], 1)
    for _ in range(iterations):
        unit = nearest(key, mean)
        mean = unit_means(key, unit, units)
    return mean, unit


def nearest(
    key: Float[Tensor, "kv_heads rows dim"], mean: Float[Tensor, "kv_heads units dim"]
) -> Int[Tensor, "kv_heads rows"]:
    """The unit of each row, by squared distance; one that nothing is nearest to takes the row farthest from its own."""
    half = mean.square().sum(-1)[:, None] / 2
    parts = [(rows.float() @ mean.mT - half).max(-1) for rows in key.split(_CHUNK, 1)]
    unit = torch.cat([part.indices for part in parts], 1)
    distance = key.float().square().sum(-1) / 2 - torch.cat([part.values for part in parts], 1)
    units, rows = mean.shape[1], key.shape[1]
    empty = torch.zeros(len(mean), units, device=key.device).scatter(1, unit, 1.0) == 0
    far = distance.topk(units).indices.gather(1, (empty.cumsum(1) - 1).clamp(min=0))
    far = far.masked_fill(~empty, rows)
    names = torch.arange(units, device=key.device).expand_as(far)
    return torch.nn.functional.pad(unit, (0, 1)).scatter(1, far, names)[:, :rows]
