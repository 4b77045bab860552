"""Linear maps from a token's key (and embedding) to its value, fitted once per model by ridge regression."""

from __future__ import annotations

import enum
import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvbench.artefact import Calibration
from kvbench.cache.codecs.from_key import token_features
from kvbench.cache.rope import unrotate
from kvbench.corpora import documents
from kvbench.errors import UsageError
from kvbench.measure.progress import Progress
from kvbench.prefill import Seen, read_exactly

if TYPE_CHECKING:
    from kvbench.model import Model

SINKS = 4  # the first tokens of a sequence are attention sinks with values of their own kind: left out of the fit


class Features(enum.Enum):
    """What a value is estimated from: the key before its rotary embedding, or also the token's input embedding."""

    key = 0
    key_token = 1


class Maps(enum.Enum):
    """One map per KV head from its own key, or one per layer that reads the keys of all heads."""

    head = 0
    layer = 1


VARIANTS = [(features, maps) for features in Features for maps in Maps]


@dataclass(frozen=True)
class ValueMaps(Calibration):
    """Every variant of the maps is fitted in one pass: `<features>.<maps>.<layer>.{weight,bias}`.

    Sums are accumulated in float64 over `tokens` tokens in sequences of `sequence`, taken in turn from `texts`. R² is
    of maps fitted without a fifth of the sequences, on that fifth; those that are kept are fitted to all. The ridge is
    relative to the mean variance of the features. Each `draw` takes the documents of a text in another order: 0 in
    their own.
    """

    texts: tuple[str, ...]
    tokens: int = 32768
    sequence: int = 512
    ridge: float = 1e-2
    draw: int = 0

    def fit(self, model: Model) -> tuple[dict[str, Tensor], dict[str, Any]]:
        network = model.network
        grams = [_Grams(model), _Grams(model)]
        digest = hashlib.sha256()
        count = max(self.tokens // self.sequence, 2)
        fold = min(5, count)
        with torch.inference_mode(), Progress(f"fitting value maps of {model.config.name}", count) as bar:
            for i, ids in zip(range(count), sequences(model, self.texts, self.sequence, self.draw), strict=False):
                digest.update(ids.cpu().numpy().tobytes())
                grams[i % fold == fold - 1].add(read_exactly(network, ids))
                bar.advance()
        tensors: dict[str, Tensor] = {}
        scores: dict[str, list[list[float]]] = {}
        for features, maps in VARIANTS:
            name = f"{features.name}.{maps.name}"
            scores[name] = []
            for layer in range(network.layers):
                r2 = grams[1].r2(layer, features, maps, *grams[0].solve(layer, features, maps, self.ridge))
                scores[name].append([round(x, 4) for x in r2.tolist()])
        grams[0].join(grams[1])
        for features, maps in VARIANTS:
            for layer in range(network.layers):
                weight, bias = grams[0].solve(layer, features, maps, self.ridge)
                tensors[f"{features.name}.{maps.name}.{layer}.weight"] = weight.bfloat16()
                tensors[f"{features.name}.{maps.name}.{layer}.bias"] = bias.bfloat16()
        return tensors, {"text_sha256": digest.hexdigest(), "held_out_r2": scores}


def sequences(model: Model, texts: Sequence[str], length: int, draw: int = 0) -> Iterator[Int[Tensor, " length"]]:
    """Sequences of the texts' calibration side, one text after the other in turn; ends with the shortest text."""
    for parts in zip(*(_stream(model, source, length, draw) for source in texts), strict=False):
        yield from parts


def _stream(model: Model, source: str, length: int, draw: int) -> Iterator[Tensor]:
    """`source` in the model's tokens, a sequence at a time, each with the model's usual first tokens."""
    start = model.writer.head[:1]
    rest: list[int] = []
    every = documents(source, "calibration")
    for document in random.Random(f"{source}-{draw}").sample(every, len(every)) if draw else every:
        rest += model.writer.encode(document)
        while len(rest) >= length - 1:
            yield torch.tensor([*start, *rest[: length - len(start)]], device=model.network.device)
            rest = rest[length - len(start) :]


class _Grams:
    """Sums over tokens of z zᵀ, z = (1, embedding, keys of all heads, values of all heads), layer by layer."""

    def __init__(self, model: Model) -> None:
        network = model.network
        self.network = network
        self.hidden = network.embeddings.shape[1]
        self.width = network.kv_heads * network.dim
        size = 1 + self.hidden
        make = lambda *shape: torch.zeros(*shape, dtype=torch.float64, device=network.device)  # noqa: E731
        self.token = make(size, size)  # the same in every layer
        self.cross = make(network.layers, size, 2 * self.width)
        self.cache = make(network.layers, 2 * self.width, 2 * self.width)

    def add(self, seen: Seen) -> None:
        token = token_features(self.network.embeddings, seen.token_ids[SINKS:])
        token = torch.cat([torch.ones_like(token[:, :1]), token], 1)
        self.token += (token.mT @ token).double()
        for layer, x in enumerate(seen.layers):
            key = unrotate(x.key, *self.network.rope(x.position))
            both = torch.cat([key, x.value.float()])[:, SINKS:].transpose(0, 1).flatten(1).to(token.device)
            self.cross[layer] += (token.mT @ both).double()
            self.cache[layer] += (both.mT @ both).double()

    def join(self, other: _Grams) -> None:
        self.token += other.token
        self.cross += other.cross
        self.cache += other.cache

    def _moments(self, layer: int) -> Float[Tensor, "all all"]:
        """Means of z zᵀ."""
        if self.token[0, 0] == 0:
            raise UsageError("the calibration texts are too short: give more text or a smaller calibration length")
        top = torch.cat([self.token, self.cross[layer]], 1)
        bottom = torch.cat([self.cross[layer].mT, self.cache[layer]], 1)
        return torch.cat([top, bottom]) / self.token[0, 0]

    def _index(self, features: Features, maps: Maps, head: int) -> tuple[Tensor, Tensor]:
        """Where the features and the values of a head lie in z."""
        dim, keys = self.network.dim, 1 + self.hidden
        own = torch.arange(keys + head * dim, keys + (head + 1) * dim)
        x = own if maps is Maps.head else torch.arange(keys, keys + self.width)
        if features is Features.key_token:
            x = torch.cat([x, torch.arange(1, keys)])
        return x, own + self.width

    def solve(self, layer: int, features: Features, maps: Maps, ridge: float) -> tuple[Tensor, Tensor]:
        """(weight (kv_heads, features, dim), bias (kv_heads, dim)) of the ridge regression, in float64."""
        moments = self._moments(layer)
        mean = moments[0]
        covariance = moments - mean[:, None] * mean
        weights, biases = [], []
        for head in range(self.network.kv_heads):
            x, y = self._index(features, maps, head)
            own = covariance[x][:, x]
            own = own + torch.eye(len(x), dtype=own.dtype, device=own.device) * own.diagonal().mean() * ridge
            weights.append(torch.linalg.solve(own, covariance[x][:, y]))
            biases.append(mean[y] - mean[x] @ weights[-1])
        return torch.stack(weights), torch.stack(biases)

    def r2(
        self, layer: int, features: Features, maps: Maps, weight: Tensor, bias: Tensor
    ) -> Float[Tensor, " kv_heads"]:
        """Share of the values' variance that the maps explain on these tokens."""
        moments = self._moments(layer)
        found = []
        for head in range(self.network.kv_heads):
            x, y = self._index(features, maps, head)
            z = torch.cat([torch.zeros(1, dtype=torch.long), x])
            full = torch.cat([bias[head][None], weight[head]])
            explained = 2 * (full * moments[z][:, y]).sum() - (full * (moments[z][:, z] @ full)).sum()
            error = moments[y, y].sum() - explained
            spread = moments[y, y].sum() - moments[0, y].square().sum()
            found.append(1 - error / spread)
        return torch.stack(found)
