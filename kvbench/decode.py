"""Feeding tokens to forks of compressed caches: one, or several in one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvbench.cache.fork import Fork, ForkLayer, Usage

if TYPE_CHECKING:
    from kvbench.cache.hf import Network

BLOCK = 512  # tokens fed at once: bounds the attention mask of a long question


@dataclass(frozen=True)
class _Rows:
    """One layer of a batch: the linear layers see the batch, attention goes row by row, each over its own cache.

    A batch may have more rows than there are caches: idle ones, for which nothing is attended.
    """

    rows: Sequence[ForkLayer]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        parts = [row.attend(query[i], key[i], value[i], scale) for i, row in enumerate(self.rows)]
        if len(query) == 1:
            return parts[0][None]
        return torch.stack(parts + [torch.zeros_like(parts[0])] * (len(query) - len(parts)))


def feed(
    network: Network,
    forks: Sequence[Fork],
    ids: Int[Tensor, "batch new"],
    last_only: bool = False,
    rows: int = 1,
) -> Float[Tensor, "batch kept vocabulary"]:
    """Appends `ids[i]` to fork i and returns the logits of all new tokens, or of the last one.

    A method that acts while decoding gets the tokens one by one, as it would decode them. The linear layers see at
    least `rows` rows, the idle ones of which are dropped; see `rows_together`.
    """
    block = 1 if any(fork.one_by_one for fork in forks) else BLOCK
    idle = max(rows - len(forks), 0)
    kept = []
    for part in ids.split(block, dim=1):
        offset = torch.arange(part.shape[1], device=ids.device)
        position = torch.stack([fork.next_position + offset for fork in forks] + [offset] * idle)
        layers = [_Rows([fork.layers[i] for fork in forks]) for i in range(network.layers)]
        for fork, row in zip(forks, part, strict=True):
            fork.incoming = row
        kept.append(network.hidden(torch.nn.functional.pad(part, (0, 0, 0, idle)), position, layers))
        for fork, row in zip(forks, part, strict=True):
            fork.advance(row)
    hidden = kept[-1][:, -1:] if last_only else torch.cat(kept, 1)
    return network.logits(hidden)[: len(forks)]


@dataclass(frozen=True)
class Branch:
    """A continuation that was looked at: for each of its tokens the logits, and what the cache used to make them."""

    logits: Float[Tensor, "tokens vocabulary"]
    usage: Usage


def follow(
    network: Network, fork: Fork, ids: Int[Tensor, " new"], branches: Sequence[Sequence[int]]
) -> tuple[Float[Tensor, " vocabulary"], list[Branch]]:
    """Appends `ids` to a fork, and looks at several continuations without appending them.

    Returns the logits after `ids`, and each branch, teacher-forced. All of it is one pass where the method lets it: the
    branches follow `ids` side by side and don't see each other.
    """
    fed = [branch[:-1] for branch in branches]
    extra = sum(map(len, fed))
    if fork.one_by_one or fork.tiered or extra > BLOCK:
        return next(_follow_apart(network, [fork], ids, branches, rows=1))
    if len(ids) > BLOCK:
        feed(network, [fork], ids[None, :-BLOCK], last_only=True)
        ids = ids[-BLOCK:]
    trunk = len(ids)
    every = torch.cat([ids, ids.new_tensor([token for part in fed for token in part])])
    position = [torch.arange(trunk), *(trunk + torch.arange(len(part)) for part in fed)]
    tree = torch.zeros(len(every), len(every), dtype=torch.bool)
    starts = [trunk]
    for part in fed:
        starts.append(starts[-1] + len(part))
        tree[starts[-2] : starts[-1], starts[-2] : starts[-1]] = True
    tree[:, :trunk] = True
    fork.tree = tree.tril().to(ids.device)
    layers = [_Rows([layer]) for layer in fork.layers]
    hidden = network.hidden(every[None], fork.next_position + torch.cat(position).to(ids.device)[None], layers)[0]
    fork.tree = None
    fork.forget(extra)
    fork.advance(ids)
    logits = network.logits(hidden[trunk - 1 :])
    tail = len(fork.usage)
    return logits[0], [
        Branch(torch.cat([logits[:1], logits[a - trunk + 1 : b - trunk + 1]]), fork.growth(tail - 1, tail + b - a))
        for a, b in pairwise(starts)
    ]


def follow_each(
    network: Network, forks: Sequence[Fork], ids: Int[Tensor, " new"], branches: Sequence[Sequence[int]], rows: int
) -> Iterator[tuple[Float[Tensor, " vocabulary"], list[Branch]]]:
    """`follow` for each fork in turn. Those whose tokens go one by one advance together, in batches of `rows` rows."""
    apart = _follow_apart(network, [fork for fork in forks if fork.one_by_one], ids, branches, rows)
    for fork in forks:
        yield next(apart) if fork.one_by_one else follow(network, fork, ids, branches)


def _follow_apart(
    network: Network, forks: Sequence[Fork], ids: Int[Tensor, " new"], branches: Sequence[Sequence[int]], rows: int
) -> Iterator[tuple[Float[Tensor, " vocabulary"], list[Branch]]]:
    """Each branch fed by itself, to forks of its own: the same tokens for all of `rows` forks at a time."""
    for start in range(0, len(forks), rows):
        part = forks[start : start + rows]
        first = feed(network, part, ids.expand(len(part), -1), last_only=True, rows=rows)[:, -1]
        read = len(part[0].usage) - 1  # the token that `first` comes after
        looked = []
        for branch in branches:
            copies = [fork.fork() for fork in part]
            logits = first[:, None]
            if len(branch) > 1:
                fed = ids.new_tensor(branch[:-1]).expand(len(part), -1)
                logits = torch.cat([logits, feed(network, copies, fed, rows=rows)], 1)
            looked.append([Branch(x, copy.usage[read:]) for x, copy in zip(logits, copies, strict=True)])
        yield from ((first[i], [branch[i] for branch in looked]) for i in range(len(part)))


def greedy(
    network: Network,
    forks: Sequence[Fork],
    logits: Float[Tensor, "batch vocabulary"],
    ended: Callable[[Sequence[int]], bool],
    max_new_tokens: int,
    rows: int = 1,
) -> list[list[int]]:
    """The greedy answers that `logits` (of the prompt's last token) begin, each up to the token that ended it.

    `rows` answers advance at a time, each in a batch of exactly `rows` rows.
    """
    found = [[token] for token in logits.argmax(-1).tolist()]
    going = [i for i, answer in enumerate(found) if not ended(answer)]
    for _ in range(max_new_tokens - 1):
        for start in range(0, len(going), rows):
            part = going[start : start + rows]
            last = torch.tensor([[found[i][-1]] for i in part], device=logits.device)
            step = feed(network, [forks[i] for i in part], last, last_only=True, rows=rows)
            for i, token in zip(part, step[:, -1].argmax(-1).tolist(), strict=True):
                found[i].append(token)
        going = [i for i in going if not ended(found[i])]
    return found


class _NoCache:
    """Attention that passes the queries on: what is left of a model are its linear layers."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        return query


@torch.inference_mode()
def rows_together(network: Network, rows: int) -> int:
    """How many answers may advance in one batch here without changing a bit of any: `rows`, or 1.

    Matrix products of different heights round differently on most machines, so an answer alone decodes in a batch of
    `rows` too, idle rows beside it. What has to hold, and is tried here, is that a row's logits depend neither on its
    place nor on the other rows.
    """
    ids = (torch.arange(rows, device=network.device) * 97 + 11)[:, None] % network.vocabulary

    def logits(batch: Tensor) -> Tensor:
        position = torch.arange(len(batch), device=batch.device)[:, None]
        return network.logits(network.hidden(batch, torch.zeros_like(position), [_NoCache()] * network.layers))

    together = logits(ids)
    for i in {0, rows // 2, rows - 1}:
        alone = torch.zeros_like(ids)
        alone[0] = ids[i]
        if not torch.equal(logits(alone)[0], together[i]):
            return 1
    return rows
