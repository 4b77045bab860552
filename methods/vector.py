"""VECTOR."""

import enum
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvbench.artefact import Calibration
from kvbench.budget import Allowance
from kvbench.cache.codecs.base import Context, Contexts
from kvbench.cache.codecs.exact import Exact
from kvbench.cache.codecs.from_key import FromKey
from kvbench.cache.layout import index_dtype
from kvbench.corpora import CALIBRATION_TEXTS
from kvbench.errors import UsageError
from kvbench.method import Family, Trust, Wrapper
from kvbench.plan import Infeasible, LayerPlan, Plan, Tier, keep_all
from kvbench.prefill import Seen, SeenLayer
from kvbench.toolbox.routers import as_mass, byte_limits, hull_route, one_price_route, paper_route, protected_tokens
from kvbench.toolbox.tiers import every_row, few_bits_key, fixed_bytes, kept, tier
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
    tokens), `retain` (how tokens are retained: in any of some tiers), `one_price` (a byte is worth the same in all
    layers and KV heads, whatever rows the base gives them) and `power` (importance is the score to this power: below 1
    tokens differ less, and more of them are held in fewer bits); see method=tiered. Maps are fitted on
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
    power: float = 1.0
    texts: tuple[str, ...] = CALIBRATION_TEXTS
    calibration_tokens: int = 32768
    calibration_draw: int = 0
    ridge: float = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.key_bits not in (2, 3, 4, 8, 16):
            raise UsageError(f"method.key_bits={self.key_bits} is not one of 2, 3, 4, 8, 16")
        if not self.retain or len(set(self.retain)) < len(self.retain):
            raise UsageError(f"method.retain={list(self.retain)}: name each tier once, and one at least")
        for name in self.retain:
            tier(name)
        if self.power <= 0:
            raise UsageError(f"method.power={self.power:g} turns importance round: give more than 0")
        if self.router is Router.paper and (len(self.retain) > 1 or self.one_price or self.power != 1):
            raise UsageError("method.router=paper knows no method.one_price, method.power or several method.retain")

    @property
    def value_maps(self) -> ValueMaps:
        return ValueMaps(self.texts, self.calibration_tokens, ridge=self.ridge, draw=self.calibration_draw)

    @property
    def calibrations(self) -> frozenset[Calibration]:
        return super().calibrations | {self.value_maps}

    def plan(self, seen: Seen, budget: Allowance) -> Plan:
        if budget.limit >= sum(x.key.nbytes + x.value.nbytes for x in seen.layers):
            return keep_all(seen)
        retained = tuple(map(tier, self.retain))
        tiers = [(*retained, self.approximate(seen, i)) for i in range(len(seen.layers))]
        costs, limit = self._costs(seen, budget, tiers[0])
        scores = [self.scores(seen, i) for i in range(len(seen.layers))]
        row = max(budget.charged(*one.row_bytes(seen.dim, seen.dtype)) for one in retained)
        limits = byte_limits(self.scorer, seen, scores, limit, row)
        if self.maps is Maps.layer:  # one route for all heads
            scores, limits = [x.mean(0, keepdim=True) for x in scores], limits.sum(1, keepdim=True)
        protected = protected_tokens(self.inner, limits, max(costs), scores[0].shape[1])
        contexts = Context.of(seen.token_ids, seen.next_position, seen.network.devices)
        judged = [self._judge(x, some, contexts) for x, some in zip(seen.layers, tiers, strict=True)]
        if self.router is Router.utility:
            scores = [as_mass(score, self.scale) ** self.power for score in scores]
        if self.one_price:
            routes = one_price_route(seen.network.gather(scores), seen.network.gather(judged), costs, limits, protected)
        else:
            route = paper_route if self.router is Router.paper else hull_route
            each = zip(scores, judged, limits, strict=True)
            routes = [route(score, worth, costs, limit, protected) for score, worth, limit in each]
        return Plan(
            tuple(
                LayerPlan(some, one.to(x.key.device).expand(len(x.key), -1))
                for some, one, x in zip(tiers, routes, seen.layers, strict=True)
            )
        )

    def _judge(self, x: SeenLayer, tiers: tuple[Tier, ...], contexts: Contexts) -> Tensor:
        """What routers compare: the squared errors of the estimated values, (units, tokens), or what each tier keeps of
        each token, (tiers, units, tokens)."""
        if self.router is Router.paper:
            each = tiers[-1].value.squared_error(x.value.flatten(0, 1), every_row(x, contexts)).view(x.key.shape[:2])
        else:
            each = kept(x, tiers, contexts)
        return each.mean(-2, keepdim=True) if self.maps is Maps.layer else each

    def approximate(self, seen: Seen, layer: int) -> Tier:
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
