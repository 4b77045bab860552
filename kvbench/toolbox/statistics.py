"""Statistics that several methods share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kvbench.cache.attention import attention_weights, causal_mask
from kvbench.prefill import Observed, Statistic


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
        end = seen.start
        for query in seen.query.split(256, dim=1):
            end += query.shape[1]
            mask = causal_mask(query.shape[1], end, query.device)
            total[:, :end] += attention_weights(query, seen.key[:, :end], seen.scale, mask).sum(1)
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
