"""Rotary position embeddings undone, and done anew."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Rope = Callable[[Tensor], tuple[Tensor, Tensor]]  # (cos, sin) of the rotary embedding at any positions


class Angles:
    """A rotary embedding at positions below `end`, worked out once on each device that asks."""

    def __init__(self, rope: Rope, end: int) -> None:
        self._rope, self._end = rope, end
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __call__(self, position: Int[Tensor, ...]) -> tuple[Tensor, Tensor]:
        device = position.device
        if device not in self._tables:
            self._tables[device] = self._rope(torch.arange(self._end, device=device))
        cos, sin = self._tables[device]
        return cos[position], sin[position]


def unrotate(
    key: Float[Tensor, "... dim"], cos: Float[Tensor, "... dim"], sin: Float[Tensor, "... dim"]
) -> Float[Tensor, "... dim"]:
    """A key as it was before its rotary embedding, in float32: the inverse of `k * cos + rotate_half(k) * sin`."""
    key = key.float()
    first, second = key.chunk(2, dim=-1)
    back = key * cos + torch.cat([second, -first], dim=-1) * sin
    return back / (cos.square() + sin.square())


def rotate(key: Float[Tensor, "kv_heads slots dim"], by: Int[Tensor, "kv_heads slots"], rope: Rope) -> Tensor:
    """Keys moved by so many positions, in float32. The scale that a model may give its rotation is in them already."""
    cos, sin = (x.unflatten(0, by.shape) for x in rope(by.flatten()))
    scale = (cos.square() + sin.square()).sqrt()
    first, second = key.float().chunk(2, dim=-1)
    return key.float() * (cos / scale) + torch.cat([-second, first], dim=-1) * (sin / scale)


def renumber(
    key: Float[Tensor, "kv_heads slots dim"],
    position: Int[Tensor, "kv_heads slots"],
    read: Bool[Tensor, "heads new slots"] | None,
    rope: Rope,
) -> Float[Tensor, "kv_heads slots dim"]:
    """Keys as if the rows that are read stood next to each other, up to the newest one, which stays where it is.

    That is the same to attention as numbering them from 0, queries included: only distances count. `read` is for the KV
    heads or for all of them, and for one new token.
    """
    read = torch.ones_like(position, dtype=torch.bool) if read is None else read[:, -1]
    behind = read.flip(1).cumsum(1).flip(1) - 1  # rows that are read after each
    return rotate(key, position[:, -1:] - behind - position, rope).to(key.dtype)
