"""KV heads that look far back, fitted once per model: those that copy, and those whose output needs all tokens."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvbench.artefact import Calibration
from kvbench.cache.attention import attention_weights, causal_mask
from kvbench.corpora import documents
from kvbench.errors import UsageError
from kvbench.measure.progress import Progress
from kvbench.prefill import Observed, look_ahead, read_exactly

if TYPE_CHECKING:
    from kvbench.cache.hf import Network
    from kvbench.model import Model

QUERIES = 256  # at a time: bounds the attention matrix
ECHO, INDUCTION = 1, 14  # percent of all heads in RazorAttention: here the proportion in which they are taken


@dataclass(frozen=True)
class CopyingHeads(Calibration):
    """RazorAttention's scores, `echo` and `induction` (layers, kv_heads): no text, only `tokens` random ones repeated.

    Mean attention to the earlier copies of a token, and to the tokens right after those; the maximum over the query
    heads of a KV head.
    """

    tokens: int
    repeats: int = 4

    def fit(self, model: Model) -> tuple[dict[str, Tensor], dict[str, Any]]:
        network, start = model.network, model.writer.head[:1]
        period = min(self.tokens, (network.max_positions - len(start)) // self.repeats)
        drawn = torch.randint(network.vocabulary, (period,), generator=torch.Generator().manual_seed(0))
        ids = torch.cat([torch.tensor(start, dtype=torch.long), drawn.repeat(self.repeats)]).to(network.device)
        cut = len(start) + period
        with torch.inference_mode():
            observe = partial(copying, len(start), period)
            found = look_ahead(read_exactly(network, ids[:cut]), ids[cut:], observe=observe)
            scores = torch.stack(network.gather(found))
        echo, induction = scores.unflatten(-1, (network.kv_heads, -1)).amax(-1).unbind(1)
        return {"echo": echo, "induction": induction}, {"period": period}


def copying(first: int, period: int, ahead: Observed) -> Float[Tensor, "2 heads"]:
    """Mean attention of queries to earlier copies of their token, and to those copies' next tokens.

    The tokens from `first` on repeat after every `period`.
    """
    new = ahead.query.shape[1]
    slots = torch.arange(ahead.total, device=ahead.query.device) - first
    back = slots[ahead.start :, None] - slots  # (new, total)
    same = (back > 0) & (back % period == 0) & (slots >= 0)
    after = (back >= 0) & ((back + 1) % period == 0) & (slots >= 1)
    mask = causal_mask(new, ahead.total, ahead.query.device)
    found = torch.zeros(2, ahead.query.shape[0], device=ahead.query.device)
    for i in range(0, new, QUERIES):
        part = slice(i, i + QUERIES)
        weights = attention_weights(ahead.query[:, part], ahead.key, ahead.scale, mask[part])
        found += torch.stack([(weights * chosen[part]).sum((1, 2)) for chosen in (same, after)])
    return found / new


def copying_order(
    echo: Float[Tensor, "layers kv_heads"], induction: Float[Tensor, "layers kv_heads"]
) -> Float[Tensor, "layers kv_heads"]:
    """Importance so that the top heads are, for any number of them, the best by echo and by induction as 1 to 14."""
    ranks = [_rank(echo) / ECHO, _rank(induction) / INDUCTION]
    return -torch.minimum(*ranks).view(echo.shape)


def _rank(scores: Float[Tensor, "layers kv_heads"]) -> Int[Tensor, " heads"]:
    """1 for the best; equal ones in their order."""
    return scores.flatten().argsort(descending=True, stable=True).argsort() + 1


@dataclass(frozen=True)
class RecallingHeads(Calibration):
    """How far a layer's output moves if a KV head sees only sinks and a window: `error` (layers, kv_heads).

    Measured while passages are repeated that were hidden in a text (`passages` of `words` random tokens of that text
    each). Relative to the norm of the layer's output, squared, averaged over the repeating tokens of all sequences.
    """

    sinks: int
    window: int
    texts: tuple[str, ...] = ("essays", "squad")
    sequences: int = 2  # of each text
    tokens: int = 2048
    passages: int = 10
    words: int = 32

    def fit(self, model: Model) -> tuple[dict[str, Tensor], dict[str, Any]]:
        network = model.network
        recalled = self.passages * self.words
        total = torch.zeros(network.layers, network.kv_heads, device=network.device)
        count = len(self.texts) * self.sequences
        observe = partial(streaming_error, network, self.sinks, self.window)
        with torch.inference_mode(), Progress(f"finding retrieval heads of {model.config.name}", count) as bar:
            for ids in itertools.chain.from_iterable(self._sequences(model, text) for text in self.texts):
                ids = ids.to(network.device)
                seen = read_exactly(network, ids[:-recalled])
                total += torch.stack(network.gather(look_ahead(seen, ids[-recalled:], observe=observe)))
                bar.advance()
        return {"error": total / count}, {}

    def _sequences(self, model: Model, source: str) -> list[Tensor]:
        """Texts with passages hidden at even distances, which are all repeated at the end."""
        start, recalled = model.writer.head[:1], self.passages * self.words
        length = self.tokens - 2 * recalled - len(start)
        hay: list[int] = []
        for document in documents(source, "calibration"):
            hay += model.writer.encode(document)
            if len(hay) >= length * self.sequences:
                break
        else:
            raise UsageError(f"{source} is too short to calibrate on")
        draw, found = torch.Generator().manual_seed(0), []
        for text in torch.tensor(hay).split(length)[: self.sequences]:
            passages = text[torch.randint(length, (self.passages, self.words), generator=draw)]
            parts = zip(text.tensor_split(self.passages), passages, strict=True)
            hidden = [x for part in parts for x in part]
            found.append(torch.cat([torch.tensor(start, dtype=torch.long), *hidden, passages.flatten()]))
        return found


def streaming_error(network: Network, sinks: int, window: int, ahead: Observed) -> Float[Tensor, " kv_heads"]:
    """Mean of |Δ|² / |O|²: Δ what a KV head adds to the layer's output O, less what it adds with sinks and a window."""
    kv_heads, device = len(ahead.key), ahead.query.device
    value = ahead.value.float().repeat_interleave(len(ahead.query) // kv_heads, 0)
    projection = network.output_projection(ahead.layer).float()
    slots, mask = torch.arange(ahead.total, device=device), causal_mask(ahead.query.shape[1], ahead.total, device)
    few = mask & ((slots < sinks) | (slots > slots[ahead.start :, None] - window))
    error = torch.zeros(kv_heads, device=device)
    for query, *masks in zip(*(x.split(QUERIES, -2) for x in (ahead.query, mask, few)), strict=True):
        whole, part = (
            (attention_weights(query, ahead.key, ahead.scale, m) @ value @ projection)
            .unflatten(0, (kv_heads, -1))
            .sum(1)
            for m in masks
        )
        norm = whole.sum(0).square().sum(-1)
        error += ((whole - part).square().sum(-1) / norm).sum(-1)
    return error / ahead.query.shape[1]
