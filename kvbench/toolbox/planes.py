"""Rotary planes of a query head that agree with it on the best tokens, fitted once per model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from kvbench.artefact import Calibration
from kvbench.cache.attention import causal_mask
from kvbench.corpora import documents
from kvbench.errors import UsageError
from kvbench.measure.progress import Progress
from kvbench.prefill import Observed, look_ahead, read_exactly

if TYPE_CHECKING:
    from kvbench.model import Model


@dataclass(frozen=True)
class PlaneAgreement(Calibration):
    """How many of a query head's `best` tokens each plane alone finds: `agreement` (layers, heads, planes), 0 to 1.

    A plane is the pair of dimensions (i, i + dim/2) that the rotary embedding turns together. Means over `steps`
    queries that go on after `tokens` of a text.
    """

    best: int = 256
    texts: tuple[str, ...] = ("essays", "squad")
    sequences: int = 4  # of each text
    tokens: int = 2048
    steps: int = 16

    def fit(self, model: Model) -> tuple[dict[str, Tensor], dict[str, Any]]:
        network = model.network
        total = torch.zeros(network.layers, network.heads, network.dim // 2, device=network.device)
        count = len(self.texts) * self.sequences
        with torch.inference_mode(), Progress(f"finding dominant planes of {model.config.name}", count) as bar:
            for source in self.texts:
                found = 0
                for ids in islice(self._sequences(model, source), self.sequences):
                    seen = read_exactly(network, ids[: self.tokens])
                    shares = look_ahead(seen, ids[self.tokens :], observe=partial(agreement, self.best))
                    total += torch.stack(network.gather(shares))
                    found += 1
                    bar.advance()
                if found < self.sequences:
                    raise UsageError(f"{source} is too short to calibrate on")
        return {"agreement": total / count}, {}

    def _sequences(self, model: Model, source: str) -> Iterator[Tensor]:
        """Beginnings of documents, run together until they are long enough."""
        length, start = self.tokens + self.steps, model.writer.head[:1]
        ids = list(start)
        for document in documents(source, "calibration"):
            ids += model.writer.encode(document[: 16 * length])
            if len(ids) >= length:
                yield torch.tensor(ids[:length], device=model.network.device)
                ids = list(start)


def agreement(best: int, ahead: Observed) -> Float[Tensor, "heads planes"]:
    """Share of the `best` tokens by their logits that are also the best ones by each plane's part of the logits."""
    group, half = len(ahead.query) // len(ahead.key), ahead.key.shape[2] // 2
    query = ahead.query.float().unflatten(-1, (2, half))  # (heads, new, 2, planes)
    key = ahead.key.float().repeat_interleave(group, 0).unflatten(-1, (2, half))
    unseen = ~causal_mask(query.shape[1], ahead.total, query.device)
    logits = torch.einsum("hncp,htcp->hnt", query, key).masked_fill(unseen, -torch.inf)
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, logits.topk(best).indices, True)
    shares = []
    for plane in range(half):
        part = (query[..., plane] @ key[..., plane].mT).masked_fill(unseen, -torch.inf)
        shares.append(chosen.gather(-1, part.topk(best).indices).float().mean((1, 2)))
    return torch.stack(shares, -1)
