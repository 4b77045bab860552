"""How a tier's rows lie in memory: flat, KV head after KV head, with no padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int, Int8, Shaped
from torch import Tensor


def index_dtype(count: int) -> torch.dtype:
    """The smallest type for indices 0 .. count-1. int16 is used as 16 plain bits: uint16 can't be gathered on CUDA."""
    return torch.int16 if count <= 2**16 else torch.int32


def widen(index: Int[Tensor, ...]) -> Int[Tensor, ...]:
    """Stored indices (`index_dtype`) as int64."""
    return index.long() & 0xFFFF if index.dtype == torch.int16 else index.long()


def look_up(table: Shaped[Tensor, "many ..."], index: Int[Tensor, ...]) -> Shaped[Tensor, ...]:
    """Rows of a table that the layers of all devices share, on the device of the indices."""
    return table[index.to(table.device)].to(index.device)


@dataclass(frozen=True)
class Layout:
    """`counts[g]` rows for KV head g. `shared`: every head holds the same tokens (then positions are held once)."""

    counts: tuple[int, ...]
    shared: bool = False

    @classmethod
    def of_route(cls, route: Int8[Tensor, "kv_heads rows"], tiers: int) -> list[Layout]:
        """The layout of each tier of a route; one transfer from the device."""
        masks = route[None] == torch.arange(tiers, device=route.device, dtype=route.dtype)[:, None, None]
        same = (masks == masks[:, :1]).all(-1).all(-1)
        table = torch.cat([masks.sum(-1), same[:, None]], dim=-1).tolist()
        return [cls(tuple(row[:-1]), bool(row[-1])) for row in table]

    @property
    def rows(self) -> int:
        return sum(self.counts)

    @property
    def width(self) -> int:
        return max(self.counts)

    @property
    def uniform(self) -> bool:
        return len(set(self.counts)) == 1

    def pad(self, x: Shaped[Tensor, "rows ..."]) -> Shaped[Tensor, "kv_heads width ..."]:
        """Rows by KV head; a view where all heads hold equally many, else filled up with zeros."""
        if self.uniform:
            return x.unflatten(0, (len(self.counts), self.width))
        return torch.nn.utils.rnn.pad_sequence(list(x.split(self.counts)), batch_first=True)

    def flatten(self, x: Shaped[Tensor, "kv_heads width ..."]) -> Shaped[Tensor, "rows ..."]:
        """The reverse of `pad`."""
        return x.flatten(0, 1) if self.uniform else x[self.mask(x.device)]

    def mask(self, device: torch.device) -> Bool[Tensor, "kv_heads width"]:
        """Which places of the padded form are rows."""
        counts = torch.tensor(self.counts, device=device)
        return torch.arange(self.width, device=device) < counts[:, None]

    def heads(self, device: torch.device) -> Shaped[Tensor, " rows"]:
        """The KV head of each row."""
        counts = torch.tensor(self.counts, device=device)
        return torch.arange(len(self.counts), device=device).repeat_interleave(counts, output_size=self.rows)

    def starts(self, device: torch.device) -> Int[Tensor, " kv_heads"]:
        """Where each KV head's rows begin."""
        counts = torch.tensor(self.counts, device=device)
        return counts.cumsum(0) - counts
