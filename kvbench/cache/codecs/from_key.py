"""Values that are not stored but estimated from their keys by a linear map (VECTOR, arXiv 2605.23258)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvbench.cache.codecs.base import Codec, Rows, Stored
from kvbench.cache.layout import Layout, look_up
from kvbench.cache.rope import turn_back


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
    def needs_key(self) -> bool:
        return True

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
        layout = rows.layout
        key = turn_back(layout.pad(rows.key).float(), *self._angles(rows))
        if not self.all_heads:
            return key
        if not layout.shared:
            raise ValueError("a map over all heads needs tokens that every head holds")
        return key.transpose(0, 1).flatten(1)[None]

    def _weights(self, rows: Rows) -> tuple[Float[Tensor, "kv_heads some dim"], Float[Tensor, "kv_heads rest dim"]]:
        """The rows of W that meet keys, and those that meet embeddings, in float32."""
        assert rows.key is not None
        keys = rows.key.shape[-1] * (len(rows.layout.counts) if self.all_heads else 1)
        weight = self.weight.float()
        return weight[:, :keys], weight[:, keys:]

    def _token_term(self, rows: Rows, weight: Tensor) -> Float[Tensor, "kv_heads width dim"]:
        """What the tokens' embeddings add to the estimates: computed once for each distinct token."""
        features, which = self._tokens(rows)
        terms = _for_all_heads(features, weight)
        if len(which) == 1:
            return terms[:, which[0]]
        return terms[torch.arange(len(terms), device=terms.device)[:, None], which]

    def predict(self, rows: Rows) -> Float[Tensor, "kv_heads width dim"]:
        """The estimate without the context's intercept, in float32."""
        key, (by_key, by_token) = self._keys(rows), self._weights(rows)
        value = self.bias.float()[:, None] + (_for_all_heads(key[0], by_key) if len(key) == 1 else key @ by_key)
        return value if self.embeddings is None else value + self._token_term(rows, by_token)

    def fit(self, x: Float[Tensor, "rows dim"], rows: Rows) -> Stored:
        if not self.intercept:
            return {}
        return {"intercept": self._mean(rows.layout.pad(x).float() - self.predict(rows), rows.layout).to(x.dtype)}

    def _mean(self, error: Float[Tensor, "kv_heads width dim"], layout: Layout) -> Float[Tensor, "kv_heads dim"]:
        if layout.uniform:
            return error.mean(1)
        mask = layout.mask(error.device)[..., None]
        return (error * mask).sum(1) / mask.sum(1).clamp(min=1)

    def squared_error(self, x: Float[Tensor, "rows dim"], rows: Rows) -> Float[Tensor, " rows"]:
        error = rows.layout.pad(x).float() - self.predict(rows)
        if self.intercept:
            error = error - self._mean(error, rows.layout)[:, None]
        return rows.layout.flatten(error.square().sum(-1))

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
        by_key, by_token = self._weights(rows)
        mixed = self._mixed_keys(weights, rows) @ by_key
        mixed += weights.sum(-1, keepdim=True) * (self.bias.float() + self._shift(fixed))[:, None]
        if self.embeddings is not None:
            mixed += self._mixed_tokens(weights, rows) @ by_token
        return mixed

    def _mixed_keys(
        self, weights: Float[Tensor, "kv_heads new width"], rows: Rows
    ) -> Float[Tensor, "kv_heads new features"]:
        """weights @ the keys before their rotation; the rotation's two halves are put together afterwards."""
        assert rows.key is not None
        layout, kv_heads = rows.layout, len(weights)
        if self.all_heads:
            if not layout.shared:
                raise ValueError("a map over all heads needs tokens that every head holds")
            weights = weights.flatten(0, 1)[None].expand(kv_heads, -1, -1)
        key = layout.pad(rows.key)
        cos, sin = ((weights @ (key * x)).chunk(2, -1) for x in self._angles(rows))  # halves of a key share angles
        mixed = torch.cat([cos[0] + sin[1], cos[1] - sin[0]], -1)
        return mixed.transpose(0, 1).flatten(1).unflatten(0, (kv_heads, -1)) if self.all_heads else mixed

    def _angles(self, rows: Rows) -> list[Float[Tensor, "heads width dim"]]:
        """(cos, sin) of the rows' positions, divided by their sum of squares."""

        def make(position: Tensor) -> tuple[Tensor, ...]:
            cos, sin = self.rope(position)
            size = cos.square() + sin.square()
            return cos / size, sin / size

        assert rows.position is not None
        layout, context = rows.layout, rows.context
        position = rows.position[: layout.width] if layout.shared else rows.position
        if context is None:
            found = make(position)
        else:
            table = context.once(("rotated back", self.rope), lambda: make(context.every_position()))
            found = tuple(x.index_select(0, position) for x in table)
        return [x[None] if layout.shared else layout.pad(x) for x in found]

    def _mixed_tokens(
        self, weights: Float[Tensor, "kv_heads new width"], rows: Rows
    ) -> Float[Tensor, "kv_heads new hidden"]:
        """weights @ the tokens' features: weights are added up for each distinct token first."""
        features, which = self._tokens(rows)
        sums = weights.new_zeros(*weights.shape[:2], len(features))
        return sums.scatter_add_(-1, which[:, None].expand_as(weights), weights) @ features

    def _tokens(self, rows: Rows) -> tuple[Float[Tensor, "distinct hidden"], Int[Tensor, "heads width"]]:
        """The features of the distinct tokens, and which of them each row is of: for each KV head, or once."""
        assert self.embeddings is not None
        layout, context, embeddings = rows.layout, rows.context, self.embeddings

        def make(token: Tensor) -> tuple[Tensor, Tensor]:
            distinct, which = token.unique(return_inverse=True)
            return token_features(embeddings, distinct), which

        if context is None:
            assert rows.token is not None
            features, which = make(rows.token)
        else:
            assert rows.position is not None
            features, which = context.once(("tokens", id(embeddings)), lambda: make(context.token_ids))
            which = which.index_select(0, rows.position[: layout.width] if layout.shared else rows.position)
        return features, which[None, : layout.width] if layout.shared else layout.pad(which)


def _for_all_heads(
    x: Float[Tensor, "width some"], weight: Float[Tensor, "kv_heads some dim"]
) -> Float[Tensor, "kv_heads width dim"]:
    """x @ weight[g] for every KV head g, as one product."""
    return (x @ weight.transpose(0, 1).flatten(1)).unflatten(-1, (len(weight), -1)).transpose(0, 1)


def token_features(
    embeddings: Float[Tensor, "vocabulary hidden"], token: Int[Tensor, ...]
) -> Float[Tensor, "... hidden"]:
    """Input embeddings of tokens, normalised to a root mean square of 1, in float32."""
    x = look_up(embeddings, token).float()
    return x * (x.square().mean(-1, keepdim=True) + 1e-12).rsqrt()
