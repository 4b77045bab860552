"""Asymmetric integer quantisation of each row, packed into bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kvbench.cache.codecs.base import Codec, Rows, Stored


@dataclass(frozen=True)
class Quant(Codec):
    """`bits`-bit codes with a 16-bit minimum and step per `channels` channels of a row (0: the whole row).

    x = code * step + minimum. Step and minimum are float16 (bfloat16 would cost 3 bits of their precision); values
    beyond float16's range are not expected in a cache and are clamped.
    """

    bits: int = 4
    channels: int = 0

    def _blocks(self, dim: int) -> tuple[int, int]:
        width = min(self.channels or dim, dim)
        return dim // width, width

    def group_bytes(self, dim: int, dtype: torch.dtype) -> tuple[int, int]:
        return dim * self.bits // 8, self._blocks(dim)[0] * 4

    def encode(self, x: Float[Tensor, "rows dim"], rows: Rows, fixed: Stored) -> Stored:
        blocks = x.float().unflatten(-1, self._blocks(x.shape[-1]))
        low, high = blocks.aminmax(dim=-1, keepdim=True)
        top = torch.finfo(torch.float16).max
        low16 = low.clamp(-top, top).half()
        step = ((high - low16.float()) / (2**self.bits - 1)).clamp(min=2.0**-24, max=top).half()
        codes = ((blocks - low16.float()) / step.float()).round().clamp(0, 2**self.bits - 1)
        return {"codes": pack(codes.flatten(-2).to(torch.uint8), self.bits), "low": low16[..., 0], "step": step[..., 0]}

    def decode(self, stored: Stored, rows: Rows, fixed: Stored, like: torch.dtype) -> Float[Tensor, "rows dim"]:
        codes = unpack(stored["codes"], self.bits)
        blocks = codes.unflatten(-1, self._blocks(codes.shape[-1])).float()
        return (blocks * stored["step"][..., None].float() + stored["low"][..., None].float()).flatten(-2).to(like)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes below 2**bits, `8 // bits` to a byte, along the last axis (bits: 1, 2, 4 or 8)."""
    per_byte = 8 // bits
    shifts = torch.arange(per_byte, device=codes.device, dtype=torch.uint8) * bits
    return (codes.unflatten(-1, (-1, per_byte)) << shifts).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The reverse of `pack`."""
    shifts = torch.arange(8 // bits, device=packed.device, dtype=torch.uint8) * bits
    return ((packed[..., None] >> shifts) & (2**bits - 1)).flatten(-2)
