"""Rows in 8-bit floating point with one scale each (as ARKV quantises, arXiv 2603.08727)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kvbench.cache.codecs.base import Codec, Rows, Stored

LARGEST = 448.0  # of e4m3


@dataclass(frozen=True)
class Fp8(Codec):
    """x = scale * c, c in e4m3 (3 bits of mantissa) and the scale, in float32, the row's largest magnitude / 448."""

    def group_bytes(self, dim: int, dtype: torch.dtype) -> tuple[int, int]:
        return dim, 4

    def encode(self, x: Float[Tensor, "rows dim"], rows: Rows, fixed: Stored) -> Stored:
        x = x.float()
        scale = (x.abs().amax(-1) / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
        codes = (x / scale[:, None]).to(torch.float8_e4m3fn)
        return {"codes": codes.view(torch.uint8), "scale": scale}  # as bytes: those can be indexed on any device

    def decode(self, stored: Stored, rows: Rows, fixed: Stored, like: torch.dtype) -> Float[Tensor, "rows dim"]:
        return (stored["codes"].view(torch.float8_e4m3fn).float() * stored["scale"][:, None]).to(like)
