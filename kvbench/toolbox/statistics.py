"""Statistics that several methods share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kvbench.cache.attention import attention_weights, causal_blocks, causal_mask
from kvbench.prefill import Observed, Seen, Statistic, look_ahead

OVERLAP = 8  # tokens that lead into a chunk of a repeated context
AT_ONCE = 256  # queries, or tokens: bounds what is built of them


@dataclass(frozen=True)
class WindowAttention(Statistic):
    """Mean attention that the context's last `window` queries pay to each token: (heads, tokens), float32, per layer.

    Softmax over all tokens, causal inside the window. A context shorter than the window is all window.
    """

    window: int

    def observe(self, state: Tensor | None, seen: Observed) -> Float[Tensor, "heads tokens"]:
        first = max(seen.total - self.window, 0)  # position of the window's first query
        end = seen.start + seen.query.shape[1]
        tokens = seen.total if end == seen.total else end
        total = torch.zeros(len(seen.query), seen.total, device=seen.query.device) if state is None else state
        if end <= first:
            return total
        query = seen.query[:, max(first - seen.start, 0) :]
        mask = causal_mask(query.shape[1], tokens, query.device)
        weights = attention_weights(query, seen.key, seen.scale, mask).sum(1) / min(self.window, seen.total)
        total[:, :tokens] += weights
        return total


@dataclass(frozen=True)
class ColumnSums(Statistic):
    """Attention that all queries of the context together pay to each token: (heads, tokens), float32, per layer.

    Raw sums: a token is seen by itself and all later ones, so early tokens have had more chances.
    """

    def observe(self, state: Tensor | None, seen: Observed) -> Float[Tensor, "heads tokens"]:
        total = torch.zeros(len(seen.query), seen.total, device=seen.query.device) if state is None else state
        for weights in causal_blocks(seen.query, seen.key, seen.scale):
            total[:, : weights.shape[2]] += weights.sum(1)
        return total


@dataclass(frozen=True)
class WindowMoments(Statistic):
    """How the context's last `window` queries attend to the tokens before them, query head by query head, per layer.

    (3, heads, tokens), float32: mean and unbiased variance over those queries (causal inside the window), and the sum
    of their -A log A. Softmax over all tokens. A context shorter than the window is all window.
    """

    window: int

    def observe(self, state: Tensor | None, seen: Observed) -> Float[Tensor, "3 heads tokens"]:
        first = max(seen.total - self.window, 0)  # position of the window's first query
        start = max(seen.start, first)
        end = seen.start + seen.query.shape[1]
        if state is None:
            state = torch.zeros(3, len(seen.query), seen.total, device=seen.query.device)
        if end <= first:
            return state
        query = seen.query[:, start - seen.start :]
        weights = attention_weights(query, seen.key, seen.scale, causal_mask(end - start, end, query.device))
        weights = torch.nn.functional.pad(weights, (0, seen.total - end))
        before, new = start - first, end - start
        mean, variance, entropy = state
        squares = variance * max(before - 1, 1)
        step = weights.mean(1) - mean
        squares = squares + (weights - weights.mean(1, keepdim=True)).square().sum(1)
        squares = squares + step.square() * (before * new / (before + new))
        mean = mean + step * (new / (before + new))
        entropy = entropy - torch.xlogy(weights, weights).sum(1)
        return torch.stack([mean, squares / max(before + new - 1, 1), entropy])


@dataclass(frozen=True)
class Reconstruction(Statistic):
    """The most attention a token gets while the context is repeated: (kv_heads, tokens), float32, per layer.

    The context is fed again after itself, `chunk` tokens at a time, and forgotten. The softmax of a chunk's queries is
    over the first `sinks` tokens, the chunk's own place in the context and, causally, what is being fed; the maximum
    over those queries and the query heads of a KV head.
    """

    chunk: int
    sinks: int

    def finish(self, values: tuple[Any, ...], seen: Seen) -> tuple[Tensor, ...]:
        ids = seen.token_ids
        parts = [
            look_ahead(seen, ids[max(start - OVERLAP, 0) : start + self.chunk], observe=partial(self._most, start))
            for start in range(0, len(ids), self.chunk)
        ]
        return tuple(torch.cat(layer, 1) for layer in zip(*parts, strict=True))

    def _most(self, start: int, ahead: Observed) -> Float[Tensor, "kv_heads chunk"]:
        sinks, end = min(self.sinks, start), min(start + self.chunk, ahead.start)
        key = torch.cat([ahead.key[:, :sinks], ahead.key[:, start:end], ahead.key[:, ahead.start :]], 1)
        place = slice(sinks, sinks + end - start)
        most = [weights[..., place].amax(1) for weights in causal_blocks(ahead.query, key, ahead.scale)]
        return torch.stack(most).amax(0).unflatten(0, (key.shape[0], -1)).amax(1)


@dataclass(frozen=True)
class OutputNorms(Statistic):
    """L1 norm of what a token's value adds to the layer's output at full attention: (kv_heads, tokens), per layer.

    The value goes through the output projection of each query head; the mean over the query heads of its KV head.
    """

    def finish(self, values: tuple[Any, ...], seen: Seen) -> tuple[Tensor, ...]:
        return tuple(
            output_norms(x.value, seen.network.output_projection(i).float()) for i, x in enumerate(seen.layers)
        )


def output_norms(
    value: Float[Tensor, "kv_heads tokens dim"], projection: Float[Tensor, "heads dim hidden"]
) -> Float[Tensor, "kv_heads tokens"]:
    grouped = projection.unflatten(0, (value.shape[0], -1))
    parts = [(part.float()[:, None] @ grouped).abs().sum(-1).mean(1) for part in value.split(AT_ONCE, 1)]
    return torch.cat(parts, 1)
