"""Scalar quantisation of randomly rotated directions (TurboQuant, arXiv 2504.19874)."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from kvbench.cache.codecs.base import Codec, Rows, Stored, product
from kvbench.cache.codecs.quant import pack, unpack


@dataclass(frozen=True, eq=False)
class Rotated(Codec):
    """x = |x| R' c: each coordinate of the rotated unit vector R x / |x| is the nearest of 2**bits centroids c.

    The rotation R and the centroids are the same for every row of a model; a row holds its codes and a float16 norm.
    """

    bits: int
    rotation: Float[Tensor, "dim dim"]
    centroids: Float[Tensor, " levels"]

    @property
    def shared(self) -> tuple[Tensor, ...]:
        return (self.rotation, self.centroids)

    def group_bytes(self, dim: int, dtype: torch.dtype) -> tuple[int, int]:
        return dim * self.bits // 8, 2

    def encode(self, x: Float[Tensor, "rows dim"], rows: Rows, fixed: Stored) -> Stored:
        x = x.float()
        norm = x.norm(dim=-1, keepdim=True)
        turned = x / norm.clamp(min=1e-30) @ self.rotation.mT
        codes = torch.bucketize(turned, (self.centroids[1:] + self.centroids[:-1]) / 2)
        norm = norm[:, 0].clamp(max=torch.finfo(torch.float16).max).half()
        return {"codes": pack(codes.to(torch.uint8), self.bits), "norm": norm}

    def _directions(self, codes: UInt8[Tensor, "rows bytes"]) -> Float[Tensor, "rows dim"]:
        """The rows as they stand after the rotation, at unit length."""
        table = self.centroids[:, None]
        if self.bits == 3:
            codes = unpack(codes, 3)
        else:  # a whole byte at once
            every = torch.arange(256, dtype=torch.uint8, device=codes.device)
            table = self.centroids[unpack(every[:, None], self.bits).int()]
        return table.index_select(0, codes.flatten().int()).view(len(codes), -1)

    def _turned(self, stored: Stored) -> Float[Tensor, "rows dim"]:
        return self._directions(stored["codes"]) * stored["norm"].float()[:, None]

    def decode(self, stored: Stored, rows: Rows, fixed: Stored, like: torch.dtype) -> Float[Tensor, "rows dim"]:
        return (self._turned(stored) @ self.rotation).to(like)

    def dot(
        self, query: Float[Tensor, "kv_heads new dim"], stored: Stored, rows: Rows, fixed: Stored
    ) -> Float[Tensor, "kv_heads new width"]:
        """The query is rotated, not the rows, and their norms come last."""
        found = product(query @ self.rotation.mT, rows.layout.pad(self._directions(stored["codes"])).mT)
        return found * self._norm(stored, rows)

    def mix(
        self, weights: Float[Tensor, "kv_heads new width"], stored: Stored, rows: Rows, fixed: Stored
    ) -> Float[Tensor, "kv_heads new dim"]:
        """The mixture is rotated back, not its rows."""
        weights = weights * self._norm(stored, rows)
        return product(weights, rows.layout.pad(self._directions(stored["codes"]))) @ self.rotation

    def _norm(self, stored: Stored, rows: Rows) -> Float[Tensor, "kv_heads 1 width"]:
        return rows.layout.pad(stored["norm"].float())[:, None]


def random_rotation(dim: int, seed: int) -> Float[Tensor, "dim dim"]:
    """An orthogonal matrix drawn uniformly, the same on any device."""
    draw = torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    q, r = torch.linalg.qr(draw)
    return (q * r.diagonal().sign()).float()


@functools.cache
def lloyd_max(bits: int, dim: int) -> Float[Tensor, " levels"]:
    """The 2**bits points with the least mean square error for a coordinate of a random unit vector.

    Its density is proportional to (1 - x^2)^((dim - 3) / 2). Lloyd's iteration on a grid, from equally likely cells.
    """
    edges = torch.linspace(-1, 1, 2**16 + 1, dtype=torch.float64)
    x = (edges[1:] + edges[:-1]) / 2
    mass = (1 - x.square()) ** ((dim - 3) / 2)
    below = torch.nn.functional.pad(torch.stack([mass, mass * x]).cumsum(1), (1, 0))  # of mass, and of its moment
    cuts = torch.searchsorted(below[0], below[0, -1] * torch.arange(2**bits + 1) / 2**bits).clamp(max=len(x))
    for _ in range(1000):
        total, moment = below[:, cuts].diff(dim=1)
        points = moment / total
        inner = torch.searchsorted(x, (points[1:] + points[:-1]) / 2)
        moved = torch.cat([cuts[:1], inner, cuts[-1:]])
        if torch.equal(moved, cuts):
            break
        cuts = moved
    return points.float()
