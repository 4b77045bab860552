"""VECTOR: routers, maps, and what its card promises."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ids_of
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from kvbench import plugins
from kvbench.artefact import load, load_or_fit, location
from kvbench.budget import Budget
from kvbench.cache.packed import CompressedCache
from kvbench.cache.rope import unrotate
from kvbench.errors import UsageError
from kvbench.method import Method
from kvbench.model import Model
from kvbench.plan import Plan, top_rows
from kvbench.prefill import Seen, read_exactly
from kvbench.toolbox.routers import APPROXIMATED, RETAINED, hull_route, paper_counts, paper_route
from kvbench.toolbox.value_maps import VARIANTS, Features, Maps, ValueMaps, sequences

TOKENS = 200


def worth(route: Any, importance: list[float], quality: list[float]) -> float:
    return sum(
        i * (q if r == APPROXIMATED else r == RETAINED) for r, i, q in zip(route, importance, quality, strict=True)
    )


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=6), st.integers(0, 60))
def test_the_knapsack_is_within_one_token_of_the_best(tokens: list[tuple[float, float]], limit: int) -> None:
    """Greedy on the hull loses at most the step it could not afford: the known bound of the relaxation."""
    importance, quality = [i for i, _ in tokens], [q for _, q in tokens]
    costs = (10, 6)
    none = torch.zeros(len(tokens), dtype=torch.bool)
    row = [torch.tensor([x]) for x in (importance, quality)]
    quality_of = torch.stack([torch.ones_like(row[0]), row[1]])
    route = hull_route(row[0], quality_of, costs, torch.tensor([limit]), none)[0].tolist()
    spent = sum({RETAINED: 10, APPROXIMATED: 6, -1: 0}[r] for r in route)
    every = itertools.product((-1, RETAINED, APPROXIMATED), repeat=len(tokens))
    price = {RETAINED: 10, APPROXIMATED: 6, -1: 0}
    best = max(worth(r, importance, quality) for r in every if sum(price[x] for x in r) <= limit)
    assert spent <= limit
    assert worth(route, importance, quality) >= best - max(importance) - 1e-6


def test_worthless_estimates_leave_the_bases_eviction() -> None:
    scores = torch.rand(2, 50, generator=torch.Generator().manual_seed(0))
    protected = torch.zeros(50, dtype=torch.bool)
    quality = torch.stack([torch.ones_like(scores), torch.zeros_like(scores)])
    route = hull_route(scores, quality, (10, 6), torch.tensor([200, 200]), protected)
    assert torch.equal(route, top_rows(scores, 20))


def test_perfect_estimates_retain_only_the_protected() -> None:
    scores = torch.rand(2, 50, generator=torch.Generator().manual_seed(0))
    protected = torch.arange(50) >= 45
    quality = torch.ones(2, *scores.shape)
    route = hull_route(scores, quality, (10, 6), torch.tensor([200, 200]), protected)
    assert ((route == RETAINED) == protected).all()
    assert ((route == APPROXIMATED).sum(1) == (200 - 50) // 6).all()


@pytest.mark.parametrize(("removed", "kept", "swapped"), [(0.25, 0.75, 0.125), (0.5, 0.5, 0.25), (0.75, 0.25, 0.125)])
def test_the_papers_split(removed: float, kept: float, swapped: float) -> None:
    """p_c = .25 / .5 / .75 gives p_a = .125 / .25 / .125; a value weighs half of a token."""
    tokens = 800
    retained, approximated = paper_counts(tokens, (2, 1), int(2 * kept * tokens))
    assert approximated == int(2 * swapped * tokens)
    assert retained == int((kept - swapped) * tokens)


def test_the_paper_truncates_the_smallest_errors_of_its_pool() -> None:
    scores, error = torch.arange(10.0)[None], torch.tensor([[9.0, 8, 7, 6, 5, 4, 3, 0, 2, 1]])
    route = paper_route(scores, error, (2, 1), torch.tensor([8]), torch.arange(10) == 9)
    assert paper_counts(10, (2, 1), 8) == (2, 4)
    assert route.tolist() == [[-1] * 4 + [RETAINED] + [APPROXIMATED] * 4 + [RETAINED]]


def seen_by(tiny: Model, method: Method) -> Seen:
    seen = read_exactly(tiny.network, ids_of(tiny.network, TOKENS), method.needs, "c")
    return replace(seen, artefacts={c: load_or_fit(c, tiny) for c in method.calibrations})


def plan_at(method: Method, seen: Seen, budget: str) -> Plan:
    return method.plan(seen, Budget.parse(budget).allow(seen.network.row_bytes() * TOKENS, TOKENS))


VARIED: list[dict[str, Any]] = [
    {},
    {"features": Features.key},
    {"maps": Maps.layer},
    {"maps": Maps.layer, "features": Features.key, "intercept": False},
    {"key_bits": 4},
    {"key_bits": 4, "retain": ("int4",)},
    {"base": "random"},
    {"base": "streamingllm"},
    {"base": "snapkv", "base_options": {"window": 8}},
]


@pytest.mark.usefixtures("own_cache", "corpora")
@pytest.mark.parametrize("router", ["utility", "paper"])
@pytest.mark.parametrize("options", VARIED, ids=str)
def test_every_variant_stays_within_its_bytes(tiny: Model, options: dict[str, Any], router: str) -> None:
    cls = plugins.load("methods", "vector")
    routers: Any = cls.__dataclass_fields__["router"].type
    method = cls(router=routers[router], **options)
    seen = seen_by(tiny, method)
    full = tiny.network.row_bytes() * TOKENS
    for budget in ("0.1", "0.3"):
        plan = plan_at(method, seen, budget)
        cache = CompressedCache.pack(plan, seen)
        assert cache.nbytes <= float(budget) * full
        routes = torch.stack([layer.route for layer in plan.layers])
        if (routes >= 0).all():  # 4-bit retention holds every token in less
            continue
        assert cache.nbytes > float(budget) * full - 2 * tiny.network.row_bytes() - 600
        assert cache.shared_bytes > 0
        assert (routes == APPROXIMATED).any()
    if options.get("maps") is Maps.layer:
        assert (routes == routes[:, :1]).all()


@pytest.mark.usefixtures("own_cache", "corpora")
@pytest.mark.parametrize("maps", Maps)
def test_one_price_moves_bytes_to_where_they_are_worth_more(tiny: Model, maps: Maps) -> None:
    """Over all layers and KV heads the importance kept is no less than with equal shares, in no more bytes."""
    options: dict[str, Any] = {"base": "h2o", "key_bits": 4, "retain": ("int8", "int4"), "maps": maps}
    shares, price = (plugins.build_method("vector", one_price=one, **options) for one in (False, True))
    seen = seen_by(tiny, shares)
    plans = [plan_at(method, seen, "0.2") for method in (shares, price)]
    caches = [CompressedCache.pack(plan, seen) for plan in plans]
    assert max(cache.nbytes for cache in caches) <= 0.2 * tiny.network.row_bytes() * TOKENS
    routes = [torch.stack([layer.route for layer in plan.layers]) for plan in plans]
    mass = torch.stack([shares.scores(seen, i) for i in range(len(seen.layers))])
    kept = [float(mass[route >= 0].sum().detach()) for route in routes]
    assert kept[1] > 0.98 * kept[0]
    assert not torch.equal((routes[0] >= 0).sum(-1), (routes[1] >= 0).sum(-1))
    with pytest.raises(UsageError, match="one_price"):
        replace(price, router=type(price.router).paper, retain=("int4",))


@pytest.mark.usefixtures("own_cache", "corpora")
def test_shared_bytes_are_the_maps_that_are_read(tiny: Model) -> None:
    network = tiny.network
    for features, width in ((Features.key, 16), (Features.key_token, 16 + 64)):
        method = plugins.build_method("vector", features=features)
        seen = seen_by(tiny, method)
        cache = CompressedCache.pack(plan_at(method, seen, "0.3"), seen)
        assert cache.shared_bytes == network.layers * network.kv_heads * (width + 1) * 16 * 2


@pytest.mark.usefixtures("own_cache")
class TestValueMaps:
    def test_solves_what_least_squares_solves(self, tiny: Model, tmp_path: Path) -> None:
        """The sums over chunks give the same maps as one explicit regression over all rows."""
        text = tmp_path / "text"
        text.mkdir()
        for i in range(40):
            (text / f"{i}.txt").write_text("".join(chr(97 + (i * j * 7 + j * j) % 26) for j in range(900)))
        calibration = ValueMaps((str(text),), tokens=4 * 256, sequence=256, ridge=0.0)
        tensors, about = calibration.fit(tiny)
        network = tiny.network
        chunks = [
            ids for _, ids in zip(range(4), sequences(tiny, calibration.texts, calibration.sequence), strict=False)
        ]
        keys, values = [], []
        for ids in chunks:
            layer = read_exactly(network, ids).layers[1]
            keys.append(unrotate(layer.key, *network.rope(layer.position))[:, 4:])
            values.append(layer.value[:, 4:])
        x, y = torch.cat(keys, 1).double(), torch.cat(values, 1).double()
        ones = torch.ones_like(x[..., :1])
        solved = torch.linalg.lstsq(torch.cat([x, ones], -1), y).solution
        torch.testing.assert_close(tensors["key.head.1.weight"].double(), solved[:, :-1], atol=2e-2, rtol=2e-2)
        assert set(about["held_out_r2"]) == {f"{f.name}.{m.name}" for f, m in VARIANTS}
        draws = [replace(calibration, draw=draw).fit(tiny)[1]["text_sha256"] for draw in (1, 2, 3, 1)]
        assert len({about["text_sha256"], *draws}) > 1  # few documents: two orders may begin alike
        assert draws[0] == draws[-1]

    def test_kept_and_refused_for_another_model(self, tiny: Model, tmp_path: Path, corpora: None) -> None:
        calibration = ValueMaps(("pydoc",), tokens=1024, sequence=256)
        first = load_or_fit(calibration, tiny)
        file = location(calibration, tiny)
        stamp = file.stat().st_mtime_ns
        assert load_or_fit(calibration, tiny).digest == first.digest
        assert file.stat().st_mtime_ns == stamp  # not fitted again
        other = replace(tiny, facts={"weights": "random-1"})
        assert location(calibration, other) != file
        with pytest.raises(UsageError, match="was fitted for"):
            load(file, other)
        with safe_open(file, framework="pt") as opened:
            assert "text_sha256" in opened.metadata()["kvbench"]

    def test_token_features_explain_layer_0(self, tiny: Model, corpora: None) -> None:
        """In layer 0 a value is a function of its token alone, and linear in the embedding."""
        scores = load_or_fit(ValueMaps(("pydoc",), tokens=8192, sequence=256), tiny).header["held_out_r2"]
        assert min(scores["key_token.head"][0]) > 0.95


@pytest.mark.usefixtures("own_cache", "corpora")
def test_a_smaller_power_holds_more_tokens_in_fewer_bits(tiny: Model) -> None:
    counts = []
    for power in (1.0, 0.25):
        method = plugins.build_method("vector", base="tova", key_bits=4, retain=("int8", "int4"), power=power)
        routes = torch.stack([layer.route for layer in plan_at(method, seen_by(tiny, method), "0.2").layers])
        counts.append([int((routes == tier).sum()) for tier in range(3)])
    (eight, *_), (fewer, *_) = counts
    assert fewer < eight
    assert sum(counts[1]) > sum(counts[0])
    with pytest.raises(UsageError, match="turns importance round"):
        plugins.build_method("vector", power=0)


def test_a_base_that_scores_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="scores no tokens"):
        plugins.build_method("vector", base="full")
    with pytest.raises(UsageError, match="unknown method 'snap'; known: adakv"):
        plugins.build_method("vector", base="snap")
    with pytest.raises(UsageError, match="window_size"):
        plugins.build_method("vector", base="snapkv", base_options={"window_size": 3})
