"""EpiCache."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from kvbench.budget import Allowance
from kvbench.cache.attention import attention_weights
from kvbench.cache.fork import Edit, Event, Fork
from kvbench.cache.packed import CompressedCache
from kvbench.decode import feed
from kvbench.errors import UsageError
from kvbench.method import Family, Method, Trust
from kvbench.plan import EVICTED, EXACT
from kvbench.prefill import Reader

AT_ONCE = 64  # queries: bounds what is built of them


@dataclass(frozen=True)
class EpiCache(Method):
    """Read block by block under a cap on what is held (EpiCache, Kim et al., arXiv 2509.17396).

    After each block of `block` tokens the most typical passages of the context are fed on trial; a row counts for the
    most attention that any of their queries pays to it, among the rows held, in any query head of its KV head. The best
    rows of a layer stay, over all its KV heads together; nothing is protected. Typical are the `medoids` passages of
    `window` tokens whose mean token embedding is nearest to the centroid of all. Positions are the original ones.
    Differs: one episode for a whole context (so no router), layers share alike (p = 0), the passages are fed without an
    instruction; a block is at most an eighth of the context, a passage a sixty-fourth. Passages are chosen before
    reading begins: the text, not its cache, has to be there as a whole.
    """

    family: ClassVar[Family] = Family.scorer
    trust: ClassVar[Trust] = Trust.reconstructed
    own_prefill: ClassVar[bool] = True

    block: int = 2048
    medoids: int = 8
    window: int = 128

    def __post_init__(self) -> None:
        if self.block < 1 or self.medoids < 1 or self.window < 1:
            raise UsageError(
                f"method.block={self.block} method.medoids={self.medoids} method.window={self.window}: all at least 1"
            )

    def prefill(self, reader: Reader, budget: Allowance) -> CompressedCache:
        rows, together = self.cap(reader, budget)
        text = self.typical(reader)
        fork = Fork(reader.empty(), Method())
        for block in reader.token_ids.split(min(self.block, -(-len(reader.token_ids) // 8))):
            feed(reader.network, [fork], block[None], last_only=True)
            reader.holds(sum(layer.held for layer in fork.layers))
            if fork.next_position > rows:
                scores = self.scratch(reader, fork, text)
                for layer, paid in zip(fork.layers, scores, strict=True):
                    layer.edit(Edit((EXACT,), best(paid, rows, together)))
        return fork.freeze()

    def cap(self, reader: Reader, budget: Allowance) -> tuple[int, bool]:
        """Rows per KV head on average, and whether the heads of a layer compete: then their counts are paid for."""
        rows, network = reader.rows(budget), reader.network
        if rows == len(reader.token_ids):
            return rows, False
        competing = (budget.limit - budget.charged(0, 4 * network.kv_heads * network.layers)) // network.row_bytes()
        return (competing, True) if competing else (rows, False)

    def typical(self, reader: Reader) -> Int[Tensor, " text"]:
        """The passages nearest to the centroid, in their order."""
        ids = reader.token_ids
        window = min(self.window, max(len(ids) // 64, 1))
        passages = ids[: len(ids) // window * window].unflatten(0, (-1, window))
        means = normalize(reader.network.embed(passages.flatten()).float().unflatten(0, passages.shape).mean(1), dim=-1)
        near = means @ normalize(means.mean(0), dim=0)
        return passages[near.topk(min(self.medoids, len(near))).indices.sort().values].flatten()

    def scratch(self, reader: Reader, fork: Fork, text: Int[Tensor, " text"]) -> list[Float[Tensor, "kv_heads slots"]]:
        """What the passages, fed after the rows held and then forgotten, pay to each slot."""
        trial = fork.fork()
        found: dict[int, Tensor] = {}

        def observe(event: Event) -> None:
            most = most_paid(event, fork.layers[event.layer].length)
            found[event.layer] = found.get(event.layer, most).maximum(most)

        trial.observer = observe
        feed(reader.network, [trial], text[None], last_only=True)
        reader.holds(sum(layer.held for layer in trial.layers))
        return [found[i] for i in range(len(fork.layers))]


def most_paid(event: Event, slots: int) -> Float[Tensor, "kv_heads slots"]:
    """The most attention that a new token pays to each of the first slots, among these alone; -1 in empty ones."""
    key = event.key[:, :slots]
    # Every new token sees all that came before; what carries a bias of minus infinity is no row.
    bias = event.mask[:, :1, :slots] if event.mask is not None and event.mask.is_floating_point() else None
    weights = [attention_weights(part, key, event.scale, bias).amax(1) for part in event.query.split(AT_ONCE, 1)]
    most = torch.stack(weights).amax(0).unflatten(0, (len(key), -1)).amax(1)
    return most if bias is None else most.masked_fill(bias[:: len(bias) // len(key), 0].isneginf(), -1)


def best(scores: Float[Tensor, "kv_heads slots"], rows: int, together: bool) -> Tensor:
    """The route that keeps the best slots: `rows` per KV head, or as many in all as that makes."""
    every = scores.flatten()[None] if together else scores
    keep = rows * (len(scores) if together else 1)
    route = torch.full_like(every, EVICTED, dtype=torch.int8).scatter(1, every.topk(keep).indices, 0)
    return route.view(scores.shape)
