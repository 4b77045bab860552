"""Asymmetric integer quantisation along a row or along a channel, packed into bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from kvbench.cache.codecs.base import Codec, Rows, Stored
from kvbench.cache.layout import Layout


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
        codes, low, step = self._codes(x)
        return {"codes": pack(codes.flatten(-2).to(torch.uint8), self.bits), "low": low, "step": step}

    def _codes(self, x: Float[Tensor, "rows dim"]) -> tuple[Tensor, Tensor, Tensor]:
        """(codes by block, as whole numbers in float32; minimum and step of each block)."""
        x = x.float()
        blocks = x.unflatten(0, (-1, self.tokens)).mT if self.tokens > 1 else x.unflatten(-1, self._blocks(x.shape[-1]))
        low, step = self._range(blocks)
        codes = ((blocks - low[..., None].float()) / step[..., None].float()).round().clamp(0, 2**self.bits - 1)
        return codes, low, step

    def _range(self, blocks: Float[Tensor, "... width"]) -> tuple[Float[Tensor, ...], Float[Tensor, ...]]:
        """(minimum, step) of each block."""
        low, high = blocks.aminmax(dim=-1)
        top = torch.finfo(torch.float16).max
        low = low.clamp(-top, top).half()
        return low, ((high - low.float()) / (2**self.bits - 1)).clamp(min=2.0**-24, max=top).half()

    def decode(self, stored: Stored, rows: Rows, fixed: Stored, like: torch.dtype) -> Float[Tensor, "rows dim"]:
        codes = unpack(stored["codes"], self.bits).unflatten(-1, (stored["low"].shape[-1], -1))
        x = codes.float() * stored["step"][..., None].float() + stored["low"][..., None].float()
        return (x.mT.flatten(0, 1) if self.tokens > 1 else x.flatten(-2)).to(like)

    def squared_error(self, x: Float[Tensor, "rows dim"], rows: Rows) -> Float[Tensor, " rows"]:
        if self.tokens > 1:
            return super().squared_error(x, rows)
        return self.expected(x).sum(-1) * self._blocks(x.shape[-1])[1]

    def expected(self, x: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows blocks"]:
        """The squared error to expect of a value in each block of channels.

        Rounding is even within a step; a block's least and greatest value are on one.
        """
        blocks = x.float().unflatten(-1, self._blocks(x.shape[-1]))
        return self._range(blocks)[1].float().square() / 12 * (1 - 2 / max(blocks.shape[-1], 2))

    def dot(
        self, query: Float[Tensor, "kv_heads new dim"], stored: Stored, rows: Rows, fixed: Stored
    ) -> Float[Tensor, "kv_heads new width"]:
        """The codes' products, scaled afterwards; where blocks are channels the query is scaled, group by group."""
        if self.tokens > 1:
            aligned = self.bits != 3 and self.tokens * self.bits % 8 == 0  # a channel's codes fill whole bytes
            return (self._dot_of_channels if aligned else super().dot)(query, stored, rows, fixed)
        codes, low, step = self._padded(stored, rows)
        blocks = step.shape[1]
        each = query if blocks == 1 else _apart(query, blocks)
        found = torch.stack([each[..., at] @ plane.float().mT for plane, at in planes(codes, self.bits)]).sum(0)
        scaled = (found.unflatten(1, (blocks, -1)) * step[:, :, None]).sum(1)
        return scaled + query.unflatten(-1, (blocks, -1)).sum(-1) @ low

    def _dot_of_channels(
        self, query: Float[Tensor, "kv_heads new dim"], stored: Stored, rows: Rows, fixed: Stored
    ) -> Float[Tensor, "kv_heads new width"]:
        groups = Layout(tuple(count // self.tokens for count in rows.layout.counts))
        codes, low, step = (groups.pad(stored[name]) for name in ("codes", "low", "step"))
        scaled = query[:, None] * step.float()[:, :, None]
        found = query.new_zeros(*scaled.shape[:3], self.tokens)
        for plane, at in planes(codes.unflatten(-1, (query.shape[-1], -1)), self.bits):
            found[..., at] += scaled @ plane.float()
        found += (low.float() @ query.mT)[..., None]
        return found.transpose(1, 2).flatten(2)

    def mix(
        self, weights: Float[Tensor, "kv_heads new width"], stored: Stored, rows: Rows, fixed: Stored
    ) -> Float[Tensor, "kv_heads new dim"]:
        """(weights * step) @ codes + weights @ low."""
        if self.tokens > 1:
            return super().mix(weights, stored, rows, fixed)
        codes, low, step = self._padded(stored, rows)
        blocks, new = step.shape[1], weights.shape[1]
        scaled = (weights[:, None] * step[:, :, None]).flatten(1, 2)
        mixed = weights.new_zeros(len(weights), blocks * new, codes.shape[-1] * 8 // self.bits)
        for plane, at in planes(codes, self.bits):
            mixed[..., at] += scaled @ plane.float()
        # Of what each block's steps have weighed, its own channels.
        own = mixed.unflatten(1, (blocks, new)).unflatten(-1, (blocks, -1)).diagonal(dim1=1, dim2=3)
        return (own.mT + (weights @ low.mT)[..., None]).flatten(2)

    def _padded(
        self, stored: Stored, rows: Rows
    ) -> tuple[
        UInt8[Tensor, "kv_heads width bytes"],
        Float[Tensor, "kv_heads blocks width"],
        Float[Tensor, "kv_heads blocks width"],
    ]:
        codes, low, step = (rows.layout.pad(stored[name]) for name in ("codes", "low", "step"))
        return codes, low.mT.contiguous().float(), step.mT.contiguous().float()


def _apart(query: Float[Tensor, "kv_heads new dim"], blocks: int) -> Float[Tensor, "kv_heads many dim"]:
    """The query once for each block of channels, and zero elsewhere."""
    own = torch.eye(blocks, device=query.device).repeat_interleave(query.shape[-1] // blocks, 1)
    return (query[:, None] * own[:, None]).flatten(1, 2)


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


def planes(packed: Tensor, bits: int) -> Iterator[tuple[Tensor, slice]]:
    """What was packed as parts that are a shift and a mask each, with their places; where these meet, parts add up."""
    if bits == 3:
        lower = packed.shape[-1] * 2 // 3
        yield from planes(packed[..., :lower], 2)
        yield from ((plane << 2, at) for plane, at in planes(packed[..., lower:], 1))
        return
    per_byte = 8 // bits
    for i in range(per_byte):
        shifted = packed >> i * bits if i else packed
        yield shifted & (2**bits - 1) if i < per_byte - 1 else shifted, slice(i, None, per_byte)
