"""Rows without their least important channels (ThinK, arXiv 2407.21018)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvbench.cache.codecs.base import Codec, Rows, Stored, product
from kvbench.cache.codecs.quant import pack, unpack
from kvbench.cache.codecs.sparse import fill


@dataclass(frozen=True, eq=False)
class Channels(Codec):
    """`keep` channels per KV head: those with the largest `energy` x mean square over the stored rows.

    `energy` is what the channel weighs in a query; it is read once, when the rows are stored. Which channels a KV head
    keeps is held as one bit a channel.
    """

    keep: int
    energy: Float[Tensor, "kv_heads dim"]

    def fixed_bytes(self, kv_heads: int, dim: int, dtype: torch.dtype) -> int:
        return kv_heads * dim // 8

    def group_bytes(self, dim: int, dtype: torch.dtype) -> tuple[int, int]:
        return self.keep * dtype.itemsize, 0

    def fit(self, x: Float[Tensor, "rows dim"], rows: Rows) -> Stored:
        norm = rows.layout.pad(x).float().square().sum(1)
        kept = (self.energy * norm).topk(self.keep, dim=-1).indices
        return {"channels": pack(torch.zeros_like(norm, dtype=torch.uint8).scatter(-1, kept, 1), 1)}

    def encode(self, x: Float[Tensor, "rows dim"], rows: Rows, fixed: Stored) -> Stored:
        return {"x": x[self._mask(rows, fixed)].view(len(x), self.keep)}

    def decode(self, stored: Stored, rows: Rows, fixed: Stored, like: torch.dtype) -> Float[Tensor, "rows dim"]:
        return fill(self._mask(rows, fixed), stored["x"].to(like))

    def dot(
        self, query: Float[Tensor, "kv_heads new dim"], stored: Stored, rows: Rows, fixed: Stored
    ) -> Float[Tensor, "kv_heads new width"]:
        """Of the queries only the kept channels count."""
        kept = unpack(fixed["channels"], 1).argsort(dim=-1, descending=True, stable=True)[:, : self.keep]
        return product(query.take_along_dim(kept[:, None], -1), rows.layout.pad(stored["x"]).mT)

    def _mask(self, rows: Rows, fixed: Stored) -> Bool[Tensor, "rows dim"]:
        channels = fixed["channels"]
        return unpack(channels, 1).bool()[rows.layout.heads(channels.device)]
