"""A scorer, an allocator and tiers, freely composed."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from kvbench.budget import Allowance
from kvbench.cache.codecs.base import Context
from kvbench.errors import UsageError
from kvbench.method import Delegate, Family, Method, Trust, Wrapper, check_scorer
from kvbench.plan import Infeasible, LayerPlan, Plan, keep_all
from kvbench.plugins import build_method, load
from kvbench.prefill import Seen
from kvbench.toolbox.routers import as_mass, byte_limits, hull_route, protected_tokens
from kvbench.toolbox.tiers import fixed_bytes, kept, tier


@dataclass(frozen=True)
class Compose(Delegate):
    """Any scorer x any allocator x tiers, tokens routed among the tiers by bytes (no paper: the free composition).

    Each token goes where importance x estimated quality per byte is best (`hull_route`). `tiers=[exact]` is plain
    eviction, `tiers=[int4]` a scorer with survivors at 4 bits, and `tiers=[exact,int2]` mixed precision. `allocator` is
    any method that allocates rows over another's scores; empty: as the scorer itself does, mostly `uniform`. Scores
    that only rank are mapped to positive numbers first.
    """

    family: ClassVar[Family] = Family.router
    trust: ClassVar[Trust] = Trust.paper
    query_aware: ClassVar[bool] = True
    holds: ClassVar[str] = "tokens in any of `tiers`"

    scorer: str = "snapkv"
    scorer_options: dict[str, Any] = field(default_factory=dict)
    allocator: str = ""
    allocator_options: dict[str, Any] = field(default_factory=dict)
    tiers: tuple[str, ...] = ("exact", "int4")

    def __post_init__(self) -> None:
        if not self.tiers or len(set(self.tiers)) < len(self.tiers):
            raise UsageError(f"method.tiers={list(self.tiers)}: name each tier once, and one at least")
        for name in self.tiers:
            tier(name)
        if self.allocator:
            found = load("methods", self.allocator)
            if not issubclass(found, Wrapper) or found.allocate is Wrapper.allocate:
                what = "allocates no rows over another method's scores"
                raise UsageError(f"method.allocator={self.allocator} {what}; choose one such as adakv")
        check_scorer(build_method(self.scorer, **self.scorer_options), f"method.scorer={self.scorer}")

    @cached_property
    def inner(self) -> Method:  # type: ignore[override]
        """The allocator over the scorer: a method of its own."""
        if not self.allocator:
            return build_method(self.scorer, **self.scorer_options)
        return build_method(
            self.allocator, base=self.scorer, base_options=self.scorer_options, **self.allocator_options
        )

    def plan(self, seen: Seen, budget: Allowance) -> Plan:
        if budget.limit >= sum(x.key.nbytes + x.value.nbytes for x in seen.layers):
            return keep_all(seen)
        tiers = tuple(tier(name) for name in self.tiers)
        costs = [budget.charged(*one.row_bytes(seen.dim, seen.dtype)) for one in tiers]
        layers, kv_heads = len(seen.layers), seen.layers[0].key.shape[0]
        # What the codecs keep once, and each tier's rows, per head.
        fixed = layers * budget.charged(
            0, fixed_bytes(tiers, kv_heads, seen.dim, seen.dtype) + 4 * len(tiers) * kv_heads
        )
        if budget.limit - fixed < layers * kv_heads * min(costs):
            raise Infeasible(fixed + layers * kv_heads * min(costs), budget.limit)
        scores = [self.scores(seen, i) for i in range(layers)]
        limits = byte_limits(self.inner, seen, scores, budget.limit - fixed, max(costs))
        protected = protected_tokens(self.inner, limits, max(costs), scores[0].shape[1])
        contexts = Context.of(seen.token_ids, seen.next_position, seen.network.devices)
        each = zip(seen.layers, scores, limits, strict=True)
        routes = [
            hull_route(as_mass(score, self.scale), kept(x, tiers, contexts), costs, limit, protected)
            for x, score, limit in each
        ]
        return Plan(tuple(LayerPlan(tiers, route) for route in routes))
