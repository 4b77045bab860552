"""Tiers and plans: which token of which layer and KV head is stored how, and what that weighs.

A *tier* is how a token is stored: a codec for its key and one for its value. A *plan* routes every (layer, KV head,
token) to a tier, or to nothing. Methods make plans; `kvbench.cache.packed` turns them into bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

from kvbench.budget import Allowance
from kvbench.cache.codecs.base import Codec
from kvbench.cache.codecs.exact import Exact
from kvbench.cache.layout import Layout, index_dtype
from kvbench.errors import UsageError

if TYPE_CHECKING:
    from kvbench.prefill import Seen

EVICTED = -1


class Infeasible(UsageError):
    """No plan of the method fits the budget; `smallest` is the bytes of the smallest one."""

    def __init__(self, smallest: int, limit: int) -> None:
        super().__init__(f"the smallest plan needs {smallest:,} bytes, the budget allows {limit:,}")
        self.smallest, self.limit = smallest, limit

    def explain(self, method: str, budget: object, full: int) -> None:
        """Says it in the user's words; `full` is what the full cache of the context holds."""
        share = math.ceil(1e4 * self.smallest / full) / 1e4
        self.args = (
            f"budget={budget} ({self.limit:,} bytes here) is below the smallest plan of {method}: "
            f"{self.smallest:,} bytes, budget={share:g}",
        )


@dataclass(frozen=True)
class Tier:
    """How a token is stored. Equal tiers are one tier: a layer holds one slab for each."""

    name: str  # as records show it
    key: Codec
    value: Codec
    host: bool = False  # held in the host's memory; its rows reach the device when a query fetches them

    @property
    def needs_position(self) -> bool:
        return self.key.needs_position or self.value.needs_position

    @property
    def needs_token(self) -> bool:
        return self.key.needs_token or self.value.needs_token

    @property
    def group(self) -> int:
        """Tokens that can only be stored together."""
        return max(self.key.group, self.value.group)

    @property
    def shared(self) -> tuple[Tensor, ...]:
        """Tensors of the model's artefacts that decoding reads: held once per model, reported apart."""
        return self.key.shared + self.value.shared

    def row_bytes(self, dim: int, dtype: torch.dtype) -> tuple[int, int]:
        """(payload, metadata) bytes of one group of tokens in one KV head, their positions left out."""
        key, value = self.key.group_bytes(dim, dtype), self.value.group_bytes(dim, dtype)
        keys, values = self.group // self.key.group, self.group // self.value.group
        return key[0] * keys + value[0] * values, key[1] * keys + value[1] * values


EXACT = Tier("exact", Exact(), Exact())
HOST = Tier("host", Exact(), Exact(), host=True)


@dataclass(frozen=True)
class Made:
    """Rows a method makes itself, as in merging: they follow the context's own rows in a layer's route."""

    key: Float[Tensor, "kv_heads made dim"]
    value: Float[Tensor, "kv_heads made dim"]
    log_multiplicity: Float[Tensor, "kv_heads made"]  # added to the row's logit: log of how many tokens it stands for
    position: Int[Tensor, "kv_heads made"]


@dataclass(frozen=True)
class LayerPlan:
    """The route of one layer: for each KV head and row an index into `tiers`, or EVICTED."""

    tiers: tuple[Tier, ...]
    route: Int8[Tensor, "kv_heads rows"]  # the layer's tokens, then the rows of `made`
    made: Made | None = None
    hold_positions: bool = False  # hold (and pay for) positions though no codec needs them
    state: Any = None  # what the method's `step` and `select` start from; its tensors are held bytes


@dataclass(frozen=True)
class Plan:
    layers: tuple[LayerPlan, ...]


@dataclass(frozen=True)
class Weight:
    """Bytes of a plan. `held` are those on the device, which the budget bounds unless its axis says otherwise."""

    payload: int
    metadata: int
    offloaded: int = 0

    @property
    def held(self) -> int:
        return self.payload + self.metadata


def keep_all(seen: Seen) -> Plan:
    """Every token exact: the full cache."""
    return Plan(tuple(LayerPlan((EXACT,), torch.zeros_like(x.key[..., 0], dtype=torch.int8)) for x in seen.layers))


def weigh(plan: Plan, seen: Seen) -> Weight:
    """What the plan will hold, from its codecs' formulas; `CompressedCache` measures the same on real storages."""
    payload = metadata = offloaded = 0
    tokens_held = False
    position_size = index_dtype(seen.next_position).itemsize
    for layer, x in zip(plan.layers, seen.layers, strict=True):
        kv_heads, _, dim = x.key.shape
        dtype = x.key.dtype
        for tier, layout in zip(layer.tiers, Layout.of_route(layer.route, len(layer.tiers)), strict=True):
            if not layout.rows:
                continue
            tokens_held |= tier.needs_token
            row = tier.row_bytes(dim, dtype)
            fixed = tier.key.fixed_bytes(kv_heads, dim, dtype) + tier.value.fixed_bytes(kv_heads, dim, dtype)
            own = row[0] * layout.rows // tier.group
            about = row[1] * layout.rows // tier.group + fixed
            if tier.needs_position or layer.hold_positions:
                about += position_size * (layout.width if layout.shared else layout.rows)
            if not layout.uniform:
                about += 4 * kv_heads
            if layer.made is not None and bool((layer.route[:, x.key.shape[1] :] == layer.tiers.index(tier)).any()):
                about += 4 * layout.rows
            if tier.host:
                offloaded += own + about
            else:
                payload += own
                metadata += about
        metadata += sum(t.nbytes for t in tensors_in(layer.state))
    if tokens_held:
        metadata += index_dtype(seen.vocabulary).itemsize * len(seen.token_ids)
    return Weight(payload, metadata, offloaded)


def tensors_in(state: Any) -> list[Tensor]:
    """The tensors of a method's state: a tensor, or a (nested) tuple that may hold other values too."""
    if isinstance(state, Tensor):
        return [state]
    return [t for part in state for t in tensors_in(part)] if isinstance(state, tuple) else []


def top_rows(
    scores: Float[Tensor, "kv_heads tokens"], keep: int, protect: tuple[int, int] = (0, 0)
) -> Int8[Tensor, "kv_heads tokens"]:
    """The route that keeps `keep` tokens per KV head in tier 0: the protected first and last ones, then the best.

    Protection is by index, never by a large score, so it holds in any precision. It shrinks to half of `keep`.
    """
    return _top(scores, keep, shrink(protect, keep, scores.shape[-1]))


def _top(
    scores: Float[Tensor, "kv_heads tokens"], keep: int, protected: tuple[int, int]
) -> Int8[Tensor, "kv_heads tokens"]:
    tokens = scores.shape[-1]
    first = min(protected[0], keep)
    last = min(protected[1], keep - first)
    route = torch.full_like(scores, EVICTED, dtype=torch.int8)
    route[:, :first] = 0
    route[:, tokens - last :] = 0
    middle = scores[:, first : tokens - last]
    best = middle.topk(min(keep - first - last, middle.shape[-1]), dim=-1).indices + first
    return route.scatter(1, best, 0)


def best_rows(
    scores: Float[Tensor, "kv_heads tokens"], counts: Sequence[int], protected: Sequence[tuple[int, int]]
) -> Int8[Tensor, "kv_heads tokens"]:
    """The route that keeps `counts` tokens in tier 0, one number per KV head: its protected ones, then the best."""
    heads = list(zip(scores.split(1), counts, protected, strict=True))
    if len({(count, mine) for _, count, mine in heads}) == 1:
        return _top(scores, counts[0], protected[0])
    return torch.cat([_top(head, count, mine) for head, count, mine in heads])


def shrink(protect: tuple[int, int], keep: int, tokens: int) -> tuple[int, int]:
    """(first, last) protected tokens, cut to half of `keep` in all (the last ones first) unless every token is kept."""
    if keep >= tokens:
        return (0, 0)
    first, last = protect
    half = keep // 2
    if first + last > half:
        first = min(first, half)
        last = min(last, half - first)
    return first, last


Scores = Sequence[Float[Tensor, "kv_heads tokens"]]  # one tensor a layer
Allocate = Callable[["Seen", Scores, int], Int[Tensor, "layers kv_heads"]]


def keep_best(
    seen: Seen, scores: Scores, budget: Allowance, allocate: Allocate, protect: tuple[int, int] = (0, 0)
) -> Plan:
    """Each KV head's best tokens, exact, as many as `allocate` gives it.

    Protection shrinks with the mean share, not with a head's own: a head of few rows holds the protected ones first.
    """
    counts = allocated(seen, scores, budget, allocate)
    mean = int(counts.sum()) // counts.numel()
    layers = []
    for s, keep in zip(scores, counts.tolist(), strict=True):
        protected = shrink(protect, mean, s.shape[-1])
        layers.append(LayerPlan((EXACT,), best_rows(s, keep, [protected] * len(keep))))
    return Plan(tuple(layers))


def allocated(seen: Seen, scores: Scores, budget: Allowance, allocate: Allocate) -> Int[Tensor, "layers kv_heads"]:
    """Exact rows for each KV head of each layer, within the budget: where they differ, their counts are paid for.

    Raises Infeasible if there isn't one row for each.
    """
    heads = [x.key.shape[0] for x in seen.layers]
    payload, _ = EXACT.row_bytes(seen.dim, seen.dtype)
    row = budget.charged(payload, 0)

    if budget.limit < row * sum(heads):
        raise Infeasible(row * sum(heads), budget.limit)

    def fill(metadata: int) -> Int[Tensor, "layers kv_heads"]:
        spent = budget.charged(0, metadata)
        if budget.limit - spent < row * sum(heads):
            return equal_shares(seen, budget.limit // row)  # has no counts to pay for
        most = torch.tensor([[x.key.shape[1]] for x in seen.layers])
        rows = (budget.limit - spent) // row
        if rows >= int((most.flatten() * torch.tensor(heads)).sum()):
            return most.expand(-1, heads[0])
        return allocate(seen, seen.network.gather(scores), rows).cpu().minimum(most)

    counts = fill(0)
    uneven = int((counts != counts[:, :1]).any(1).sum())
    return fill(4 * sum(heads)) if uneven else counts


def equal_shares(seen: Seen, rows: int) -> Int[Tensor, "layers kv_heads"]:
    """The same number of rows for every KV head of every layer."""
    layers, kv_heads = len(seen.layers), seen.layers[0].key.shape[0]
    return torch.full((layers, kv_heads), rows // (layers * kv_heads))


def uniform_rows(seen: Seen, budget: Allowance, tier: Tier, per_token: int = 0) -> int:
    """Tokens per layer and KV head that the allowance holds in `tier`: whole groups. Raises Infeasible below one.

    `per_token` are further bytes that a method holds for each of them.
    """
    payload, metadata = tier.row_bytes(seen.dim, seen.dtype)
    metadata += per_token * tier.group
    if tier.needs_position:
        metadata += index_dtype(seen.next_position).itemsize * tier.group
    group = budget.charged(payload, metadata) * sum(x.key.shape[0] for x in seen.layers)
    if budget.limit < group:
        raise Infeasible(group, budget.limit)
    return budget.limit // group * tier.group
