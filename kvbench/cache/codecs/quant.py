"""Asymmetric integer quantisation along a row or along a channel, packed into bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kvbench.cache.codecs.base import Codec, Rows, Stored


@dataclass(frozen=True)
class Quant(Codec):
    """`bits`-bit codes with a 16-bit minimum and step per `channels` channels of a row (0: the whole row).

    With `tokens` above 1 a block is one channel of that many rows of a KV head instead, which must come in such groups.
    x = code * step + minimum. Step and minimum are float16 (bfloat16 would cost 3 bits of their precision); values
    beyond float16's range are not expected in a cache and are clamped.
    """

    bits: int = 4
    channels: int = 0
    tokens: int = 1

    @property
    def group(self) -> int:
        return self.tokens

    def _blocks(self, dim: int) -> tuple[int, int]:
        """(blocks in a group of rows, values in a block)."""
        width = self.tokens if self.tokens > 1 else min(self.channels or dim, dim)
        return dim * self.tokens // width, width

    def group_bytes(self, dim: int, dtype: torch.dtype) -> tuple[int, int]:
        return dim * self.tokens * self.bits // 8, self._blocks(dim)[0] * 4

    def encode(self, x: Float[Tensor, "rows dim"], rows: Rows, fixed: Stored) -> Stored:
        x = x.float()
        blocks = x.unflatten(0, (-1, self.tokens)).mT if self.tokens > 1 else x.unflatten(-1, self._blocks(x.shape[-1]))
        low, high = blocks.aminmax(dim=-1, keepdim=True)
        top = torch.finfo(torch.float16).max
        low16 = low.clamp(-top, top).half()
        step = ((high - low16.float()) / (2**self.bits - 1)).clamp(min=2.0**-24, max=top).half()
        codes = ((blocks - low16.float()) / step.float()).round().clamp(0, 2**self.bits - 1)
        return {"codes": pack(codes.flatten(-2).to(torch.uint8), self.bits), "low": low16[..., 0], "step": step[..., 0]}

    def decode(self, stored: Stored, rows: Rows, fixed: Stored, like: torch.dtype) -> Float[Tensor, "rows dim"]:
        codes = unpack(stored["codes"], self.bits)
        blocks = codes.unflatten(-1, (stored["low"].shape[-1], -1)).float()
        x = blocks * stored["step"][..., None].float() + stored["low"][..., None].float()
        return (x.mT.flatten(0, 1) if self.tokens > 1 else x.flatten(-2)).to(like)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes below 2**bits in as many bits each, along the last axis (bits: 1, 2, 3, 4 or 8)."""
    if bits == 3:  # the lower two bits of every code, then the upper one
        return torch.cat([pack(codes & 3, 2), pack(codes >> 2, 1)], -1)
    per_byte = 8 // bits
    shifts = torch.arange(per_byte, device=codes.device, dtype=torch.uint8) * bits
    return (codes.unflatten(-1, (-1, per_byte)) << shifts).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The reverse of `pack`."""
    if bits == 3:
        lower = packed.shape[-1] * 2 // 3
        return unpack(packed[..., :lower], 2) | unpack(packed[..., lower:], 1) << 2
    shifts = torch.arange(8 // bits, device=packed.device, dtype=torch.uint8) * bits
    return ((packed[..., None] >> shifts) & (2**bits - 1)).flatten(-2)
