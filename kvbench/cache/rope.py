"""Rotary position embeddings undone, and done anew."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Rope = Callable[[Tensor], tuple[Tensor, Tensor]]  # (cos, sin) of the rotary embedding at any positions


def unrotate(
    key: Float[Tensor, "... dim"], cos: Float[Tensor, "... dim"], sin: Float[Tensor, "... dim"]
) -> Float[Tensor, "... dim"]:
    """A key as it was before its rotary embedding, in float32: the inverse of `k * cos + rotate_half(k) * sin`."""
    size = cos.square() + sin.square()
    return turn_back(key.float(), cos / size, sin / size)


def turn_back(
    key: Float[Tensor, "... dim"], cos: Float[Tensor, "... dim"], sin: Float[Tensor, "... dim"]
) -> Float[Tensor, "... dim"]:
    """`unrotate` with a cosine and a sine that were divided by the sum of their squares."""
    first, second = key.chunk(2, dim=-1)
    return key * cos + torch.cat([second, -first], dim=-1) * sin


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
