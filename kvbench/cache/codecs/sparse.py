"""The largest entries of each row and a bitmap of where they stand (Mustafar, arXiv 2505.22913)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvbench.cache.codecs.base import Codec, Rows, Stored
from kvbench.cache.codecs.quant import pack, unpack


@dataclass(frozen=True)
class Sparse(Codec):
    """The `keep` entries of largest magnitude, in the model's dtype, bit by bit as they were; the others are zero.

    Exactly `keep` of them, however many are equal, so a row's bytes are known before it is seen.
    """

    keep: int

    def group_bytes(self, dim: int, dtype: torch.dtype) -> tuple[int, int]:
        return self.keep * dtype.itemsize, dim // 8

    def encode(self, x: Float[Tensor, "rows dim"], rows: Rows, fixed: Stored) -> Stored:
        kept = x.abs().topk(self.keep, dim=-1).indices.sort(dim=-1).values
        bitmap = torch.zeros_like(x, dtype=torch.uint8).scatter(-1, kept, 1)
        return {"bitmap": pack(bitmap, 1), "values": x.gather(-1, kept)}

    def decode(self, stored: Stored, rows: Rows, fixed: Stored, like: torch.dtype) -> Float[Tensor, "rows dim"]:
        return fill(unpack(stored["bitmap"], 1).bool(), stored["values"].to(like))


def fill(mask: Bool[Tensor, "rows dim"], values: Float[Tensor, "rows keep"]) -> Float[Tensor, "rows dim"]:
    """Rows with `values` where `mask` holds, in order, and zeros elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)
