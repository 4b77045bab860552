"""VECTOR."""

import enum
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from kvbench.artefact import Calibration
from kvbench.budget import Allowance
from kvbench.cache.codecs.exact import Exact
from kvbench.cache.codecs.from_key import FromKey
from kvbench.cache.layout import index_dtype, look_up
from kvbench.cache.rope import Angles
from kvbench.corpora import CALIBRATION_TEXTS
from kvbench.errors import UsageError
from kvbench.method import Family, Trust, Wrapper
from kvbench.plan import Infeasible, LayerPlan, Plan, Tier, keep_all
from kvbench.prefill import Seen, SeenLayer
from kvbench.toolbox.routers import as_mass, byte_limits, hull_route, paper_counts, paper_route
from kvbench.toolbox.tiers import all_rows, few_bits_key, fixed_bytes, quality, round_trip, tier
from kvbench.toolbox.value_maps import Features, Maps, ValueMaps


class Router(enum.Enum):
    """`paper`: drop the values with the least error from a relaxed pool. `utility`: a knapsack (ours)."""

    paper = 0
    utility = 1


@dataclass(frozen=True)
class Vector(Wrapper):
    """Retain, approximate (keep the key, estimate the value from it) or evict each token (VECTOR, arXiv 2605.23258).

    A plug-in for any eviction scorer (`base`). Reconstructed from a public reading note of the paper, not from its
    text. The paper's recipe is `router=paper maps=layer features=key intercept=false` (method=vector_paper); with
    `maps=layer` all heads of a layer route together, since the map reads every head's key. Ours, and named so:
    `router=utility` (importance x reconstructability per byte), `features=key_token` (the token's embedding helps to
    estimate its value), `intercept` (the mean error of a context, held with it), `key_bits=4` (keys of approximated
    tokens), `retain` (how tokens are retained: in any of some tiers) and `one_price` (a byte is worth the same in all
    layers and KV heads, whatever rows the base gives them); see method=tiered. Maps are fitted on
    `texts`, disjoint from every task, on first use (`calibration_draw`: in another order of the documents); they are
    shared by all contexts and reported as `bytes_shared`.
    """

    family: ClassVar[Family] = Family.router
    trust: ClassVar[Trust] = Trust.reconstructed
    query_aware: ClassVar[bool] = True
    holds: ClassVar[str] = "exact tokens; keys whose values are estimated from them"

    router: Router = Router.utility
    features: Features = Features.key_token
    maps: Maps = Maps.head
    intercept: bool = True
    key_bits: int = 16
    retain: tuple[str, ...] = ("exact",)
    one_price: bool = False
    texts: tuple[str, ...] = CALIBRATION_TEXTS
    calibration_tokens: int = 32768
    calibration_draw: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.key_bits not in (2, 3, 4, 8, 16):
            raise UsageError(f"method.key_bits={self.key_bits} is not one of 2, 3, 4, 8, 16")
        if not self.retain or len(set(self.retain)) < len(self.retain):
            raise UsageError(f"method.retain={list(self.retain)}: name each tier once, and one at least")
        for name in self.retain:
            tier(name)
        if self.router is Router.paper and (len(self.retain) > 1 or self.one_price):
            raise UsageError("method.router=paper knows neither several tiers in method.retain nor method.one_price")

    @property
    def value_maps(self) -> ValueMaps:
        return ValueMaps(self.texts, self.calibration_tokens, draw=self.calibration_draw)

    @property
    def calibrations(self) -> frozenset[Calibration]:
        return super().calibrations | {self.value_maps}

    def plan(self, seen: Seen, budget: Allowance) -> Plan:
        if budget.limit >= sum(x.key.nbytes + x.value.nbytes for x in seen.layers):
            return keep_all(seen)
        retained = tuple(map(tier, self.retain))
        tiers = [(*retained, self._approximate(seen, i)) for i in range(len(seen.layers))]
        costs, limit = self._costs(seen, budget, tiers[0])
        scores = [self.scores(seen, i) for i in range(len(seen.layers))]
        row = max(budget.charged(*one.row_bytes(seen.dim, seen.dtype)) for one in retained)
        limits = byte_limits(self.scorer, seen, scores, limit, row)
        if self.maps is Maps.layer:  # one route for all heads
            scores, limits = [x.mean(0, keepdim=True) for x in scores], limits.sum(1, keepdim=True)
        tokens = scores[0].shape[1]
        first, last = self.inner.protected(int(limits.sum()) // (limits.numel() * max(costs)), tokens)
        at = torch.arange(tokens, device=scores[0].device)
        route = self._paper if self.router is Router.paper else self._utility
        routes = route(seen, scores, tiers, costs, limits, (at < first) | (at >= tokens - last))
        kv_heads = seen.layers[0].key.shape[0]
        return Plan(tuple(LayerPlan(t, x.expand(kv_heads, -1)) for t, x in zip(tiers, routes, strict=True)))

    def _approximate(self, seen: Seen, layer: int) -> Tier:
        """The tier of a layer's approximated tokens."""
        name = f"{self.features.name}.{self.maps.name}.{layer}"
        maps, device = seen.artefacts[self.value_maps], seen.layers[layer].key.device
        weight, bias = (maps.tensor(f"{name}.{part}", device) for part in ("weight", "bias"))
        table = seen.network.embeddings if self.features is Features.key_token else None
        key = Exact() if self.key_bits == 16 else few_bits_key(self.key_bits)
        joint = self.maps is Maps.layer
        return Tier("approximate", key, FromKey(weight, bias, seen.network.rope, table, self.intercept, joint))

    def _costs(self, seen: Seen, budget: Allowance, tiers: tuple[Tier, ...]) -> tuple[tuple[int, ...], int]:
        """Bytes of a token in each tier and bytes for the tokens, each in one unit of routing.

        A unit is a KV head of a layer, or with `maps=layer` the layer, whose heads share their tokens' positions.
        Raises Infeasible if not one token fits.
        """
        kv_heads = seen.layers[0].key.shape[0]
        rows = kv_heads if self.maps is Maps.layer else 1
        units = len(seen.layers) * kv_heads // rows
        position = index_dtype(seen.next_position).itemsize
        each = [one.row_bytes(seen.dim, seen.dtype) for one in tiers]
        costs = tuple(
            budget.charged(rows * payload, rows * metadata + position * one.needs_position)
            for one, (payload, metadata) in zip(tiers, each, strict=True)
        )
        counts = 0 if self.maps is Maps.layer else 4 * len(tiers)  # where heads differ, each tier's rows per head
        fixed = budget.charged(0, fixed_bytes(tiers, rows, seen.dim, seen.dtype) + counts)
        ids = index_dtype(seen.vocabulary).itemsize * len(seen.token_ids) if tiers[-1].needs_token else 0
        limit = budget.limit - budget.charged(0, ids) - units * fixed
        least = costs[0] if self.router is Router.paper else min(costs)
        if limit < units * least:
            raise Infeasible(budget.charged(0, ids) + units * (fixed + least), budget.limit)
        return costs, limit

    def _paper(
        self,
        seen: Seen,
        scores: list[Tensor],
        tiers: list[tuple[Tier, ...]],
        costs: tuple[int, ...],
        limits: Tensor,
        protected: Tensor,
    ) -> list[Tensor]:
        """The route of each layer, for each unit."""
        routes = []
        angles = Angles(seen.network.rope, seen.next_position)
        for x, score, (_, approximate), limit in zip(seen.layers, scores, tiers, limits.tolist(), strict=True):
            error = (self._estimate(seen, x, approximate, angles)[1] - x.value).square().sum(-1)
            error = error.sum(0, keepdim=True) if self.maps is Maps.layer else error
            counts = [paper_counts(score.shape[1], (costs[0], costs[1]), one) for one in limit]
            units = zip(score.split(1), error.split(1), counts, strict=True)
            routes.append(torch.cat([paper_route(*unit, protected.to(score.device)) for unit in units]))
        return routes

    def _utility(
        self,
        seen: Seen,
        scores: list[Tensor],
        tiers: list[tuple[Tier, ...]],
        costs: tuple[int, ...],
        limits: Tensor,
        protected: Tensor,
    ) -> list[Tensor]:
        """The route of each layer, for each unit."""
        angles = Angles(seen.network.rope, seen.next_position)
        mass = [as_mass(score, self.scale) for score in scores]
        kept = (self._kept(seen, x, some, angles) for x, some in zip(seen.layers, tiers, strict=True))
        if not self.one_price:
            units = zip(mass, kept, limits, strict=True)
            return [hull_route(m, k, costs, limit.to(m.device), protected.to(m.device)) for m, k, limit in units]
        every = torch.stack(seen.network.gather(mass))
        worth = torch.stack(seen.network.gather(kept), 1).flatten(1)[:, None]
        limit, protected = limits.sum()[None].to(every.device), protected.to(every.device).repeat(every[..., 0].numel())
        route = hull_route(every.flatten()[None], worth, costs, limit, protected).view_as(every)
        return [one.to(x.key.device) for one, x in zip(route, seen.layers, strict=True)]

    def _kept(self, seen: Seen, x: SeenLayer, tiers: tuple[Tier, ...], angles: Angles) -> Tensor:
        """What each tier keeps of a layer's tokens, unit by unit: (tiers, units, tokens)."""
        rows = all_rows(x)
        key, estimate = self._estimate(seen, x, tiers[-1], angles)
        keys = {tiers[-1].key: key}
        found = []
        for one in tiers[:-1]:
            back = keys[one.key] if one.key in keys else round_trip(one.key, x.key, rows)
            found.append(quality(x, back, round_trip(one.value, x.value, rows)))
        kept = torch.stack([*found, quality(x, key, estimate)])
        return kept.mean(1, keepdim=True) if self.maps is Maps.layer else kept

    def _estimate(self, seen: Seen, x: SeenLayer, tier: Tier, angles: Angles) -> tuple[Tensor | None, Tensor]:
        """Every key of a layer as the tier would hold it (None: as it is) and the value estimated from it, in float32:
        (kv_heads, tokens, dim)."""
        assert isinstance(tier.value, FromKey)
        rows = replace(all_rows(x), token=look_up(seen.token_ids, x.position).repeat(x.key.shape[0]))
        key = round_trip(tier.key, x.key, rows)
        held = (x.key if key is None else key.to(x.key.dtype)).flatten(0, 1)
        estimate = replace(tier.value, rope=angles).predict(replace(rows, key=held))
        return key, estimate + (x.value - estimate).mean(1, keepdim=True) if self.intercept else estimate
