"""Scorers, allocators, tiers and VECTOR, each with each."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import ids_of
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbench import plugins
from kvbench.artefact import Artefact, load_or_fit
from kvbench.budget import Budget
from kvbench.cache.codecs.base import Context
from kvbench.cache.packed import CompressedCache
from kvbench.errors import UsageError
from kvbench.method import Family, Method, Wrapper
from kvbench.model import Model
from kvbench.plan import EVICTED, Plan
from kvbench.prefill import Seen, read_exactly
from kvbench.toolbox.routers import hull_route
from kvbench.toolbox.tiers import NAMES, kept, tier

TOKENS = 120
SCORERS = [
    name
    for name in plugins.files("methods")
    if plugins.load("methods", name).family in (Family.scorer, Family.pattern)
    and plugins.load("methods", name).scores is not Method.scores
]
ALLOCATORS = [
    name
    for name in plugins.files("methods")
    if plugins.load("methods", name).family is Family.allocator and issubclass(plugins.load("methods", name), Wrapper)
]
WITH_SHARES = [  # others have a plan of their own, and no shares to hand out
    name for name in ALLOCATORS if plugins.load("methods", name).allocate is not Wrapper.allocate
]


def see(method: Method, model: Model) -> Seen:
    seen = read_exactly(model.network, ids_of(model.network, TOKENS), method.needs, "c")
    return replace(seen, artefacts={c: load_or_fit(c, model) for c in method.calibrations})


def packed(method: Method, seen: Seen, budget: str) -> tuple[Plan, CompressedCache]:
    full = seen.network.row_bytes() * TOKENS
    plan = method.plan(seen, Budget.parse(budget).allow(full, TOKENS))
    cache = CompressedCache.pack(plan, seen)
    assert cache.nbytes <= float(budget) * full
    return plan, cache


@pytest.mark.usefixtures("own_cache", "corpora")
@pytest.mark.parametrize("scorer", SCORERS)
def test_every_scorer_under_every_allocator_among_tiers_and_as_vectors_base(scorer: str, tiny: Model) -> None:
    methods = [plugins.build_method("vector", base=scorer)]
    for allocator in ALLOCATORS:
        methods.append(plugins.build_method(allocator, base=scorer))
    for allocator in WITH_SHARES:
        methods.append(plugins.build_method("compose", scorer=scorer, allocator=allocator, tiers=["exact", "int4"]))
    for method in methods:
        plan, cache = packed(method, see(method, tiny), "0.4")
        assert cache.nbytes > 0.3 * tiny.network.row_bytes() * TOKENS, method
        assert all((layer.route != EVICTED).any(1).all() for layer in plan.layers), method


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=5),
    st.integers(0, 60),
)
def test_the_knapsack_over_three_tiers_is_within_one_step_of_the_best(
    tokens: list[tuple[float, float, float]], limit: int
) -> None:
    costs = (12, 5, 3)
    importance = torch.tensor([[t[0] for t in tokens]])
    kept = torch.tensor([[[1.0] * len(tokens)], [[t[1] for t in tokens]], [[t[2] for t in tokens]]])
    none = torch.zeros(len(tokens), dtype=torch.bool)
    route = hull_route(importance, kept, costs, torch.tensor([limit]), none)[0].tolist()

    def worth(choice: tuple[int, ...]) -> float:
        return sum(float(kept[c, 0, i] * importance[0, i]) for i, c in enumerate(choice) if c != EVICTED)

    def price(choice: tuple[int, ...]) -> int:
        return sum(costs[c] for c in choice if c != EVICTED)

    every = itertools.product((EVICTED, 0, 1, 2), repeat=len(tokens))
    best = max(worth(choice) for choice in every if price(choice) <= limit)
    assert price(tuple(route)) <= limit
    assert worth(tuple(route)) >= best - float(importance.max()) - 1e-6


def test_one_exact_tier_is_plain_eviction(tiny: Model) -> None:
    """The same tokens as the scorer alone, but for the row that pays for the counts of rows."""
    base, composed = (
        plugins.build_method("snapkv", window=8),
        plugins.build_method("compose", scorer="snapkv", scorer_options={"window": 8}, tiers=["exact"]),
    )
    seen = see(base, tiny)
    for alone, layer in zip(packed(base, seen, "0.4")[0].layers, packed(composed, seen, "0.4")[0].layers, strict=True):
        assert not ((layer.route != EVICTED) & (alone.route == EVICTED)).any()
        assert (layer.route == EVICTED).sum() - (alone.route == EVICTED).sum() <= len(alone.route)


@pytest.mark.parametrize("budget", ["0.1", "0.2", "0.4"])
def test_one_exact_tier_is_the_allocator_alone(budget: str, tiny: Model) -> None:
    """DuoAttention's sinks shrink with the heads that stream: they leave room for a window under compose too."""
    gates = {"sinks": 20, "window": 30}
    base = {"base": "snapkv", "base_options": {"window": 8}}
    alone = plugins.build_method("duoattention", **gates, **base)
    composed = plugins.build_method(
        "compose",
        scorer="snapkv",
        scorer_options={"window": 8},
        allocator="duoattention",
        allocator_options=gates,
        tiers=["exact"],
    )
    assert composed.calibrations == alone.calibrations
    draw = torch.rand(tiny.network.layers, tiny.network.kv_heads, generator=torch.Generator().manual_seed(3))
    heads = {calibration: Artefact({"error": draw}, {}, "") for calibration in alone.calibrations}
    seen = replace(read_exactly(tiny.network, ids_of(tiny.network, TOKENS), alone.needs, "c"), artefacts=heads)
    plans = [packed(method, seen, budget)[0].layers for method in (alone, composed)]
    for mine, layer in zip(*plans, strict=True):
        assert not ((layer.route != EVICTED) & (mine.route == EVICTED)).any()
        assert ((mine.route != EVICTED).sum(1) - (layer.route != EVICTED).sum(1)).max() <= 1


@pytest.mark.usefixtures("own_cache", "corpora")
@pytest.mark.parametrize("allocator", WITH_SHARES)
def test_small_tiers_under_every_allocator(allocator: str, tiny: Model) -> None:
    """There are more rows to share out than there are tokens."""
    method = plugins.build_method("compose", allocator=allocator, tiers=["int4"])
    for budget in ("0.15", "0.5", "0.9"):
        packed(method, see(method, tiny), budget)


def test_survivors_at_4_bits_are_more_and_fewer_bits_keep_less(tiny: Model) -> None:
    exact = plugins.build_method("knorm")
    seen = see(exact, tiny)
    exactly = (packed(exact, seen, "0.3")[0].layers[0].route != EVICTED).sum()
    for name, more in (("int8", 1.2), ("int4", 1.8), ("int3", 2.0), ("int2", 2.5)):
        composed = plugins.build_method("compose", scorer="knorm", tiers=[name])
        assert (packed(composed, seen, "0.3")[0].layers[0].route != EVICTED).sum() > more * exactly
    contexts = Context.of(seen.token_ids, seen.next_position, seen.network.devices)
    left = kept(seen.layers[0], [tier(name) for name in NAMES], contexts).mean((1, 2)).tolist()
    assert left == sorted(left, reverse=True)
    assert left[0] == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"tiers": ["exact", "int5"]}, "unknown tier 'int5'; known: exact, int8, int4, int3, int2"),
        ({"tiers": []}, "one at least"),
        ({"tiers": ["int4", "int4"]}, "each tier once"),
        ({"scorer": "full"}, "scores no tokens"),
        ({"scorer": "h2o", "scorer_options": {"decode": True}}, "only scores here"),
        ({"allocator": "snapkv"}, "allocator=snapkv allocates no rows over another method's scores"),
        ({"allocator": "razorattention"}, "allocator=razorattention allocates no rows over another method's scores"),
    ],
)
def test_what_cant_be_composed_is_refused(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        plugins.build_method("compose", **options)
