"""Rows quantised after each channel was scaled, and scaled back when they are read (MiKV, arXiv 2402.18096)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kvbench.cache.codecs.base import Codec, Rows, Stored
from kvbench.cache.codecs.quant import Quant


@dataclass(frozen=True, eq=False)
class Balanced(Codec):
    """`inner` over x * balance. The balance, one number a channel and KV head, is held with the context in float16."""

    inner: Quant
    balance: Float[Tensor, "kv_heads dim"]

    def group_bytes(self, dim: int, dtype: torch.dtype) -> tuple[int, int]:
        return self.inner.group_bytes(dim, dtype)

    def fixed_bytes(self, kv_heads: int, dim: int, dtype: torch.dtype) -> int:
        return kv_heads * dim * 2

    def fit(self, x: Float[Tensor, "rows dim"], rows: Rows) -> Stored:
        return {"balance": self.balance.clamp(2.0**-14, 2.0**15).half()}

    def _balance(self, rows: Rows, fixed: Stored) -> Float[Tensor, "rows dim"]:
        return fixed["balance"].float()[rows.layout.heads(fixed["balance"].device)]

    def encode(self, x: Float[Tensor, "rows dim"], rows: Rows, fixed: Stored) -> Stored:
        return self.inner.encode(x.float() * self._balance(rows, fixed), rows, {})

    def decode(self, stored: Stored, rows: Rows, fixed: Stored, like: torch.dtype) -> Float[Tensor, "rows dim"]:
        return (self.inner.decode(stored, rows, {}, torch.float32) / self._balance(rows, fixed)).to(like)

    def dot(
        self, query: Float[Tensor, "kv_heads new dim"], stored: Stored, rows: Rows, fixed: Stored
    ) -> Float[Tensor, "kv_heads new width"]:
        """The queries are scaled, not the rows."""
        return self.inner.dot(query / fixed["balance"].float()[:, None], stored, rows, {})

    def mix(
        self, weights: Float[Tensor, "kv_heads new width"], stored: Stored, rows: Rows, fixed: Stored
    ) -> Float[Tensor, "kv_heads new dim"]:
        return self.inner.mix(weights, stored, rows, {}) / fixed["balance"].float()[:, None]
