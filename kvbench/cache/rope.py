"""Rotary position embeddings undone."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def unrotate(
    key: Float[Tensor, "... dim"], cos: Float[Tensor, "... dim"], sin: Float[Tensor, "... dim"]
) -> Float[Tensor, "... dim"]:
    """A key as it was before its rotary embedding, in float32: the inverse of `k * cos + rotate_half(k) * sin`."""
    key = key.float()
    first, second = key.chunk(2, dim=-1)
    back = key * cos + torch.cat([second, -first], dim=-1) * sin
    return back / (cos.square() + sin.square())
