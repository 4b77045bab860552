"""Rows as they are, in the model's dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kvbench.cache.codecs.base import Codec, Rows, Stored, product


@dataclass(frozen=True)
class Exact(Codec):
    """Lossless."""

    def group_bytes(self, dim: int, dtype: torch.dtype) -> tuple[int, int]:
        return dim * dtype.itemsize, 0

    def encode(self, x: Float[Tensor, "rows dim"], rows: Rows, fixed: Stored) -> Stored:
        return {"x": x}

    def decode(self, stored: Stored, rows: Rows, fixed: Stored, like: torch.dtype) -> Float[Tensor, "rows dim"]:
        return stored["x"].to(like)

    def squared_error(self, x: Float[Tensor, "rows dim"], rows: Rows) -> Float[Tensor, " rows"]:
        return x.new_zeros(len(x), dtype=torch.float32)

    def dot(
        self, query: Float[Tensor, "kv_heads new dim"], stored: Stored, rows: Rows, fixed: Stored
    ) -> Float[Tensor, "kv_heads new width"]:
        return product(query, rows.layout.pad(stored["x"]).mT)

    def mix(
        self, weights: Float[Tensor, "kv_heads new width"], stored: Stored, rows: Rows, fixed: Stored
    ) -> Float[Tensor, "kv_heads new dim"]:
        return product(weights, rows.layout.pad(stored["x"]))
