"""Values that are not stored but estimated from their keys by a linear map (VECTOR, arXiv 2605.23258)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvbench.cache.codecs.base import Codec, Rows, Stored
from kvbench.cache.rope import unrotate


@dataclass(frozen=True, eq=False)
class FromKey(Codec):
    """v = x W + b, with x the key before its rotary embedding and, where `embeddings` is given, the token's embedding.

    W and b are an artefact of the model, shared by all contexts. `intercept` adds what is held per context: the mean
    error of the stored rows, one vector a KV head. `all_heads`: x has the keys of every KV head of the token; the tier
    must then hold the same tokens in every head.
    """

    weight: Float[Tensor, "kv_heads features dim"]
    bias: Float[Tensor, "kv_heads dim"]
    rope: Callable[[Int[Tensor, ...]], tuple[Tensor, Tensor]]
    embeddings: Float[Tensor, "vocabulary hidden"] | None = None
    intercept: bool = True
    all_heads: bool = False

    @property
    def needs_position(self) -> bool:
        return True

    @property
    def needs_token(self) -> bool:
        return self.embeddings is not None

    @property
    def shared(self) -> tuple[Tensor, ...]:
        return (self.weight, self.bias)

    def fixed_bytes(self, kv_heads: int, dim: int, dtype: torch.dtype) -> int:
        return kv_heads * dim * dtype.itemsize if self.intercept else 0

    def group_bytes(self, dim: int, dtype: torch.dtype) -> tuple[int, int]:
        return 0, 0

    def _keys(self, rows: Rows) -> Float[Tensor, "heads width features"]:
        """The part of x that comes from keys, in float32: for each KV head, or once for all of them."""
        assert rows.key is not None
        assert rows.position is not None
        layout = rows.layout
        if layout.shared:  # the same positions in every head
            key = unrotate(layout.pad(rows.key), *self.rope(rows.position[: layout.width]))
        else:
            key = layout.pad(unrotate(rows.key, *self.rope(rows.position)))
        if not self.all_heads:
            return key
        if not layout.shared:
            raise ValueError("a map over all heads needs tokens that every head holds")
        return key.transpose(0, 1).flatten(1)[None]

    def _tokens(self, rows: Rows) -> Float[Tensor, "heads width hidden"]:
        """The part of x that comes from tokens, in float32: for each KV head, or once where they hold the same."""
        assert self.embeddings is not None
        assert rows.token is not None
        layout = rows.layout
        token = rows.token[None, : layout.width] if layout.shared else layout.pad(rows.token[:, None])[..., 0]
        return token_features(self.embeddings, token)

    def _parts(self, rows: Rows) -> list[tuple[Float[Tensor, "heads width some"], Float[Tensor, "kv_heads some dim"]]]:
        """x in its parts, each with the rows of W that it meets."""
        key = self._keys(rows)
        parts = [(key, self.weight[:, : key.shape[-1]].float())]
        if self.embeddings is not None:
            parts.append((self._tokens(rows), self.weight[:, key.shape[-1] :].float()))
        return parts

    def predict(self, rows: Rows) -> Float[Tensor, "kv_heads width dim"]:
        """The estimate without the context's intercept, in float32."""
        value = self.bias.float()[:, None]
        for x, weight in self._parts(rows):
            value = value + (_for_all_heads(x[0], weight) if len(x) == 1 else x @ weight)
        return value

    def fit(self, x: Float[Tensor, "rows dim"], rows: Rows) -> Stored:
        if not self.intercept:
            return {}
        mask = rows.layout.mask(x.device)[..., None]
        error = (rows.layout.pad(x).float() - self.predict(rows)) * mask
        return {"intercept": (error.sum(1) / mask.sum(1).clamp(min=1)).to(x.dtype)}

    def encode(self, x: Float[Tensor, "rows dim"], rows: Rows, fixed: Stored) -> Stored:
        return {}

    def _shift(self, fixed: Stored) -> Float[Tensor, "kv_heads dim"] | float:
        return fixed["intercept"].float() if self.intercept else 0.0

    def decode(self, stored: Stored, rows: Rows, fixed: Stored, like: torch.dtype) -> Float[Tensor, "rows dim"]:
        shift = self._shift(fixed)
        value = self.predict(rows) + (shift[:, None] if isinstance(shift, Tensor) else shift)
        return rows.layout.flatten(value).to(like)

    def mix(
        self, weights: Float[Tensor, "kv_heads new width"], stored: Stored, rows: Rows, fixed: Stored
    ) -> Float[Tensor, "kv_heads new dim"]:
        """(weights x) W + (sum of weights) b: no value is built."""
        constant = self.bias.float() + self._shift(fixed)
        mixed = weights.sum(-1, keepdim=True) * constant[:, None]
        for x, weight in self._parts(rows):
            mixed = mixed + weights @ x @ weight
        return mixed


def _for_all_heads(
    x: Float[Tensor, "width some"], weight: Float[Tensor, "kv_heads some dim"]
) -> Float[Tensor, "kv_heads width dim"]:
    """x @ weight[g] for every KV head g, as one product."""
    return (x @ weight.transpose(0, 1).flatten(1)).unflatten(-1, (len(weight), -1)).transpose(0, 1)


def token_features(
    embeddings: Float[Tensor, "vocabulary hidden"], token: Int[Tensor, ...]
) -> Float[Tensor, "... hidden"]:
    """Input embeddings of tokens, normalised to a root mean square of 1, in float32."""
    x = embeddings[token].float()
    return x * (x.square().mean(-1, keepdim=True) + 1e-12).rsqrt()
