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
from kvbench.cache.codecs.quant import Quant
from kvbench.cache.layout import index_dtype
from kvbench.corpora import CALIBRATION_TEXTS
from kvbench.errors import UsageError
from kvbench.method import Family, Trust, Wrapper
from kvbench.plan import EXACT, Infeasible, LayerPlan, Plan, Tier, keep_all
from kvbench.prefill import Seen, SeenLayer
from kvbench.toolbox.routers import as_mass, byte_limits, hull_route, paper_counts, paper_route
from kvbench.toolbox.tiers import all_rows, tier
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
    tokens) and `retain_bits=4` (keys and values of retained ones). Maps are fitted on `texts`, disjoint from every
    task, on first use; they are shared by all contexts and reported as `bytes_shared`.
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
    retain_bits: int = 16
    texts: tuple[str, ...] = CALIBRATION_TEXTS
    calibration_tokens: int = 65536

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("key_bits", "retain_bits"):
            if getattr(self, name) not in (2, 4, 8, 16):
                raise UsageError(f"method.{name}={getattr(self, name)} is not one of 2, 4, 8, 16")

    @property
    def value_maps(self) -> ValueMaps:
        return ValueMaps(self.texts, self.calibration_tokens)

    @property
    def calibrations(self) -> frozenset[Calibration]:
        return super().calibrations | {self.value_maps}

    def plan(self, seen: Seen, budget: Allowance) -> Plan:
        if budget.limit >= sum(x.key.nbytes + x.value.nbytes for x in seen.layers):
            return keep_all(seen)
        retain = EXACT if self.retain_bits == 16 else tier(f"int{self.retain_bits}")
        tiers = [(retain, self._approximate(seen, i)) for i in range(len(seen.layers))]
        costs, limit = self._costs(seen, budget, tiers[0])
        scores = [self.scores(seen, i) for i in range(len(seen.layers))]
        limits = byte_limits(self.scorer, seen, scores, limit, budget.charged(*retain.row_bytes(seen.dim, seen.dtype)))
        if self.maps is Maps.layer:  # one route for all heads
            scores, limits = [x.mean(0, keepdim=True) for x in scores], limits.sum(1, keepdim=True)
        routes = [self._route(seen, i, scores[i], tiers[i], costs, limits) for i in range(len(seen.layers))]
        return Plan(tuple(LayerPlan(t, route) for t, route in zip(tiers, routes, strict=True)))

    def _approximate(self, seen: Seen, layer: int) -> Tier:
        """The tier of a layer's approximated tokens."""
        name = f"{self.features.name}.{self.maps.name}.{layer}"
        weight, bias = (seen.artefacts[self.value_maps].tensors[f"{name}.{part}"] for part in ("weight", "bias"))
        table = seen.network.embeddings if self.features is Features.key_token else None
        key = Exact() if self.key_bits == 16 else _quant(self.key_bits)
        joint = self.maps is Maps.layer
        return Tier("approximate", key, FromKey(weight, bias, seen.network.rope, table, self.intercept, joint))

    def _costs(self, seen: Seen, budget: Allowance, tiers: tuple[Tier, Tier]) -> tuple[tuple[int, int], int]:
        """Bytes of a (retained, approximated) token and bytes for the tokens, each in one unit of routing.

        A unit is a KV head of a layer, or with `maps=layer` the layer, whose heads share their tokens' positions.
        Raises Infeasible if not one token fits.
        """
        kv_heads = seen.layers[0].key.shape[0]
        rows = kv_heads if self.maps is Maps.layer else 1
        units = len(seen.layers) * kv_heads // rows
        position = index_dtype(seen.next_position).itemsize
        retained, approximated = (tier.row_bytes(seen.dim, seen.dtype) for tier in tiers)
        costs = (
            rows * budget.charged(*retained),
            budget.charged(rows * approximated[0], rows * approximated[1] + position),
        )
        counts = 0 if self.maps is Maps.layer else 2 * 4  # where heads differ, each tier's rows are counted per head
        fixed = budget.charged(0, tiers[1].value.fixed_bytes(rows, seen.dim, seen.dtype) + counts)
        ids = index_dtype(seen.vocabulary).itemsize * len(seen.token_ids) if tiers[1].needs_token else 0
        limit = budget.limit - budget.charged(0, ids) - units * fixed
        least = costs[0] if self.router is Router.paper else min(costs)
        if limit < units * least:
            raise Infeasible(budget.charged(0, ids) + units * (fixed + least), budget.limit)
        return costs, limit

    def _route(
        self, seen: Seen, layer: int, scores: Tensor, tiers: tuple[Tier, Tier], costs: tuple[int, int], limits: Tensor
    ) -> Tensor:
        x = seen.layers[layer]
        kv_heads, tokens, _ = x.key.shape
        value = x.value.float()
        norm, kept, estimated = (
            v.square().sum(-1)
            for v in (value, _round_trip(tiers[0], x) - value, self._estimate(seen, x, tiers[1]) - value)
        )
        if self.maps is Maps.layer:
            norm, kept, estimated = (v.sum(0, keepdim=True) for v in (norm, kept, estimated))
        first, last = self.inner.protected(int(limits.sum()) // (limits.numel() * costs[0]), tokens)
        at = torch.arange(tokens, device=value.device)
        protected = (at < first) | (at >= tokens - last)
        if self.router is Router.paper:
            counts = [paper_counts(tokens, costs, limit) for limit in limits[layer].tolist()]
            heads = [paper_route(scores[i : i + 1], estimated[i : i + 1], n, protected) for i, n in enumerate(counts)]
            route = torch.cat(heads)
        else:
            quality = torch.stack([(1 - error / norm).clamp(0, 1) for error in (kept, estimated)])
            route = hull_route(as_mass(scores, self.scale), quality, costs, limits[layer].to(value.device), protected)
        return route.expand(kv_heads, -1)

    def _estimate(self, seen: Seen, x: SeenLayer, tier: Tier) -> Tensor:
        """Every value of a layer estimated from its key as the tier would hold it: (kv_heads, tokens, dim), float32."""
        assert isinstance(tier.value, FromKey)
        rows = replace(all_rows(x), token=seen.token_ids[x.position].repeat(x.key.shape[0]))
        key = tier.key.decode(tier.key.encode(x.key.flatten(0, 1), rows, {}), rows, {}, seen.dtype)
        estimate = tier.value.predict(replace(rows, key=key))
        return estimate + (x.value - estimate).mean(1, keepdim=True) if self.intercept else estimate


def _round_trip(tier: Tier, x: SeenLayer) -> Tensor:
    """Every value of a layer as a retaining tier gives it back: (kv_heads, tokens, dim), float32."""
    rows = all_rows(x)
    stored = tier.value.encode(x.value.flatten(0, 1), rows, {})
    return rows.layout.pad(tier.value.decode(stored, rows, {}, torch.float32))


def _quant(bits: int) -> Quant:
    return Quant(bits, channels=64)
