"""KVzip."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvbench.cache.attention import attention_weights, causal_mask
from kvbench.errors import UsageError
from kvbench.method import Family, Method, Scale, Trust
from kvbench.prefill import Observed, Seen, Statistic, look_ahead

OVERLAP = 8  # tokens of the chunk before that lead into each chunk
QUERIES = 256  # at a time: bounds the attention matrix


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
        mask = causal_mask(ahead.query.shape[1], key.shape[1], key.device)
        blocks = zip(ahead.query.split(QUERIES, 1), mask.split(QUERIES), strict=True)
        most = [attention_weights(q, key, ahead.scale, m)[..., place].amax(1) for q, m in blocks]
        return torch.stack(most).amax(0).unflatten(0, (key.shape[0], -1)).amax(1)


@dataclass(frozen=True)
class KVzip(Method):
    """Keep what the model looks at when it repeats its context (KVzip, Kim et al., arXiv 2505.23416).

    One threshold for all layers and KV heads: each gets as many rows as its scores earn, one at least, and the first
    `sinks` tokens stay everywhere. Differs: no instruction to repeat goes before the repetition, only the last tokens
    of the chunk before; the template's head is scored like the rest of the context. Costs about two more prefills.
    """

    family: ClassVar[Family] = Family.scorer
    trust: ClassVar[Trust] = Trust.paper
    scale: ClassVar[Scale] = Scale.mass

    chunk: int = 2048
    sinks: int = 4

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise UsageError(f"method.chunk={self.chunk} is not at least 1")

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset({Reconstruction(self.chunk, self.sinks)})

    @property
    def protect(self) -> tuple[int, int]:
        return (self.sinks, 0)

    def scores(self, seen: Seen, layer: int) -> Float[Tensor, "kv_heads tokens"]:
        return seen.statistics[Reconstruction(self.chunk, self.sinks)][layer]

    def allocate(
        self, seen: Seen, scores: Sequence[Float[Tensor, "kv_heads tokens"]], rows: int
    ) -> Int[Tensor, "layers kv_heads"]:
        every = torch.stack(list(scores))
        heads = every.shape[0] * every.shape[1]
        first = min(self.sinks, rows // (2 * heads))
        free = every[..., first:].flatten(0, 1)
        free = free.scatter(1, free.argmax(1, keepdim=True), torch.inf)  # one of each head, whatever it scores
        best = free.flatten().topk(min(rows - first * heads, free.numel())).indices
        return first + torch.bincount(best // free.shape[1], minlength=heads).view(every.shape[:2])
