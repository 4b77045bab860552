"""Rows projected on a few directions that several KV heads share (Palu, arXiv 2407.21118)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvbench.cache.codecs.base import Codec, Rows, Stored, product
from kvbench.cache.rope import unrotate


@dataclass(frozen=True, eq=False)
class LowRank(Codec):
    """x = h B': the rows of one token in a group of KV heads, side by side, by their coordinates h along a basis B.

    B is an artefact of the model, orthonormal, `rank` directions for each head of the group; h lies in equal parts with
    the rows of the heads, which must hold the same tokens. With `rope` the rows are keys, projected as they were before
    their rotary embedding and rotated again when they are rebuilt.
    """

    basis: Float[Tensor, "groups features directions"]
    rank: int
    rope: Callable[[Int[Tensor, ...]], tuple[Tensor, Tensor]] | None = None

    @property
    def needs_position(self) -> bool:
        return self.rope is not None

    @property
    def shared(self) -> tuple[Tensor, ...]:
        return (self.basis,)

    def group_bytes(self, dim: int, dtype: torch.dtype) -> tuple[int, int]:
        return self.rank * dtype.itemsize, 0

    def encode(self, x: Float[Tensor, "rows dim"], rows: Rows, fixed: Stored) -> Stored:
        layout = rows.layout
        if not layout.shared:
            raise ValueError("a basis of several heads needs tokens that every head holds")
        wide = layout.pad(x.float())
        if self.rope is not None:
            wide = unrotate(wide, *self._angles(rows))
        return {"h": self._apart(self._together(wide) @ self.basis, rows).to(x.dtype)}

    def decode(self, stored: Stored, rows: Rows, fixed: Stored, like: torch.dtype) -> Float[Tensor, "rows dim"]:
        x = self._apart(self._together(rows.layout.pad(stored["h"].float())) @ self.basis.mT, rows)
        if self.rope is not None:
            x = rotate(rows.layout.pad(x), *self._angles(rows)).flatten(0, 1)
        return x.to(like)

    def mix(
        self, weights: Float[Tensor, "kv_heads new width"], stored: Stored, rows: Rows, fixed: Stored
    ) -> Float[Tensor, "kv_heads new dim"]:
        """(weights h) B': only the mixture is rebuilt, each head from its own part of B."""
        if self.rope is not None:
            return super().mix(weights, stored, rows, fixed)
        groups, size, new = len(self.basis), len(weights) // len(self.basis), weights.shape[1]
        h = rows.layout.pad(stored["h"])  # each head's weights meet the parts of h of every head in its group
        wide = weights.unflatten(0, (groups, 1, size)).flatten(2, 3).expand(-1, size, -1, -1).flatten(0, 1)
        mixed = product(wide, h).unflatten(0, (groups, size)).unflatten(2, (size, new))
        mixed = mixed.permute(0, 2, 3, 1, 4).flatten(3)  # groups, heads, new, directions
        return (mixed @ self.basis.unflatten(1, (size, -1)).mT).flatten(0, 1)

    def _angles(self, rows: Rows) -> tuple[Tensor, Tensor]:
        assert self.rope is not None
        assert rows.position is not None
        rope, position, context = self.rope, rows.position[: rows.layout.width], rows.context
        if context is None:
            return rope(position)
        cos, sin = context.once(("rotated", rope), lambda: rope(context.every_position()))
        return cos[position], sin[position]

    def _together(self, x: Float[Tensor, "kv_heads width some"]) -> Float[Tensor, "groups width many"]:
        return x.unflatten(0, (len(self.basis), -1)).transpose(1, 2).flatten(2)

    def _apart(self, x: Float[Tensor, "groups width many"], rows: Rows) -> Float[Tensor, "rows some"]:
        """The reverse of `_together`, as rows."""
        size = len(rows.layout.counts) // len(self.basis)
        return x.unflatten(-1, (size, -1)).transpose(1, 2).flatten(0, 2)


def rotate(x: Float[Tensor, "... dim"], cos: Float[Tensor, "... dim"], sin: Float[Tensor, "... dim"]) -> Tensor:
    """The rotary embedding: the inverse of `unrotate`."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
