"""Feeding tokens to forks of compressed caches: one, or several in one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvbench.cache.fork import Fork, ForkLayer

if TYPE_CHECKING:
    from kvbench.cache.hf import Network

BLOCK = 512  # tokens fed at once: bounds the attention mask of a long question


@dataclass(frozen=True)
class _Rows:
    """One layer of a batch: the linear layers see the batch, attention goes row by row, each over its own cache."""

    rows: Sequence[ForkLayer]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        parts = [row.attend(query[i], key[i], value[i], scale) for i, row in enumerate(self.rows)]
        return parts[0][None] if len(parts) == 1 else torch.stack(parts)


def feed(
    network: Network, forks: Sequence[Fork], ids: Int[Tensor, "batch new"], last_only: bool = False
) -> Float[Tensor, "batch kept vocabulary"]:
    """Appends `ids[i]` to fork i and returns the logits of all new tokens, or of the last one.

    Forks of one method; a method that acts while decoding gets the tokens one by one, as it would decode them.
    """
    block = 1 if any(fork.method.steps for fork in forks) else BLOCK
    kept = []
    for part in ids.split(block, dim=1):
        offset = torch.arange(part.shape[1], device=ids.device)
        position = torch.stack([fork.next_position + offset for fork in forks])
        layers = [_Rows([fork.layers[i] for fork in forks]) for i in range(network.layers)]
        kept.append(network.hidden(part, position, layers))
        for fork, row in zip(forks, part, strict=True):
            fork.advance(row)
    hidden = kept[-1][:, -1:] if last_only else torch.cat(kept, 1)
    return network.logits(hidden)


def greedy(
    network: Network,
    fork: Fork,
    logits: Float[Tensor, " vocabulary"],
    ended: Callable[[Sequence[int]], bool],
    max_new_tokens: int,
) -> list[int]:
    """The greedy answer that `logits` (of the prompt's last token) begins, up to the token that ended it."""
    answer = [int(logits.argmax())]
    while not ended(answer) and len(answer) < max_new_tokens:
        token = torch.tensor([[answer[-1]]], device=logits.device)
        answer.append(int(feed(network, [fork], token, last_only=True)[0, -1].argmax()))
    return answer
