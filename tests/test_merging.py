"""Merging methods (EMS, Elastic Cache) and LaCache's ladder against loops written from the papers' formulas."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import ids_of, tiny_network
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvbench import plugins
from kvbench.budget import Allowance
from kvbench.cache.fork import Fork
from kvbench.cache.hf import Network
from kvbench.cache.packed import CompressedCache
from kvbench.decode import feed
from kvbench.errors import UsageError
from kvbench.method import Method
from kvbench.plan import EXACT, Infeasible, LayerPlan, keep_all, shrink, weigh
from kvbench.prefill import Observed, Seen, SeenLayer, read_exactly
from kvbench.toolbox import merging
from kvbench.toolbox.merging import MERGED, pooled
from kvbench.toolbox.statistics import ColumnSums

TOKENS = 60
DIM = 16
Row = tuple[int, Tensor, Tensor, int]  # position, key, value, how many tokens it is made of


@pytest.fixture(scope="module")
def network() -> Network:
    return tiny_network()


def toy_context(network: Network, method: Method, seed: int = 0) -> tuple[Seen, list[Tensor]]:
    """Two layers of random rows, a third of them alike, and what their attention leaves; its weights."""
    draw = torch.Generator().manual_seed(seed)
    layers, matrices = [], []
    statistics: dict[Any, list[Any]] = {need: [] for need in method.needs}
    for i in range(2):
        query = torch.randn(4, TOKENS, DIM, generator=draw) * 2
        rows = torch.randn(2, 2, TOKENS, DIM, generator=draw)  # keys and values, KV heads
        kind = torch.randint(0, 12, (TOKENS,), generator=draw)
        rows = torch.where((kind < 4)[:, None], rows[:, :, kind] + 0.3 * rows, rows)
        key, value = rows * torch.rand(2, 2, TOKENS, 1, generator=draw).exp()
        observed = Observed(i, query, key, value, 0, TOKENS, DIM**-0.5)
        for need in method.needs:
            statistics[need].append(need.observe(None, observed))
        layers.append(SeenLayer(key, value, torch.arange(TOKENS)))
        matrices.append(naive_attention(query, key))
    found = {need: tuple(values) for need, values in statistics.items()}
    return replace(read_exactly(network, ids_of(network, TOKENS)), layers=tuple(layers), statistics=found), matrices


def naive_attention(query: Tensor, key: Tensor) -> Tensor:
    """(heads, queries, tokens)."""
    matrix = torch.zeros(4, TOKENS, TOKENS)
    for head in range(4):
        for i in range(TOKENS):
            logits = key[head // 2, : i + 1] @ query[head, i] / math.sqrt(DIM)
            matrix[head, i, : i + 1] = logits.softmax(0)
    return matrix


def rows_of(plan: LayerPlan, x: SeenLayer) -> list[list[Row]]:
    """What each KV head holds, by position; the multiplicity is 1 for rows that stay exact, 0 for merged ones."""
    found: list[list[Row]] = []
    for head in range(2):
        rows = []
        for j, tier in enumerate(plan.route[head].tolist()):
            if j < TOKENS and tier >= 0:
                assert plan.tiers[tier] is EXACT
                rows.append((j, x.key[head, j], x.value[head, j], 1))
            elif tier >= 0:
                assert plan.made is not None
                assert plan.tiers[tier] == MERGED
                made = plan.made
                position = int(made.position[head, j - TOKENS])
                rows.append((position, made.key[head, j - TOKENS], made.value[head, j - TOKENS], 0))
        found.append(sorted(rows, key=lambda row: row[0]))
    return found


def same(found: list[Row], expected: list[Row]) -> None:
    assert [row[0] for row in found] == [row[0] for row in expected]
    assert [row[3] for row in found] == [int(row[3] == 1) for row in expected]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a[1], b[1], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(a[2], b[2], atol=1e-4, rtol=1e-4)


def allowance(network: Network, tokens: float) -> Allowance:
    return Allowance(int(tokens * network.row_bytes()))


# -- Elastic Cache -----------------------------------------------------------------------------------------------------


def elastic_oracle(matrix: Tensor, x: SeenLayer, keep: int, start: int, released: bool) -> list[list[Row]]:
    importance = [sum(float(matrix[:, i, j].mean()) for i in range(j, TOKENS)) for j in range(TOKENS)]
    first, last = shrink((start, 1), keep, TOKENS)
    middle = list(range(first, TOKENS - last))
    by_importance = sorted(range(len(middle)), key=lambda r: importance[middle[r]])
    thrown = TOKENS - keep
    if released:  # the ids in the order of importance, read as if they were ranks; members counted without `start`
        anchors = [first + r for r, token in enumerate(by_importance) if token >= thrown]
        members = [r for r, token in enumerate(by_importance) if token < thrown]
    else:
        anchors = sorted(middle[r] for r in by_importance[thrown:])
        members = sorted(middle[r] for r in by_importance[:thrown])
    joined: dict[int, list[int]] = {a: [a] for a in anchors}
    for m in members:
        joined[min(anchors, key=lambda a: (abs(a - m), a))].append(m)
    ends = {j: [j] for j in [*range(first), *range(TOKENS - last, TOKENS)]}
    heads = []
    for head in range(2):
        rows = []
        for j, of in sorted((ends | joined).items()):
            key, value = (torch.stack([y[head, t] for t in of]).mean(0) for y in (x.key, x.value))
            rows.append((j, key, value, len(of)))
        heads.append(rows)
    return heads


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("start", [0, 1, 4])
@pytest.mark.parametrize("tokens", [1.1, 3.3, 15.5, 30.2, 58])
def test_elastic_cache_equals_the_loop(network: Network, variant: str, start: int, tokens: float) -> None:
    method = plugins.build_method("elastic_cache", start=start, variant=variant)
    seen, matrices = toy_context(network, method)
    plan = method.plan(seen, allowance(network, tokens))
    for layer, x, matrix in zip(plan.layers, seen.layers, matrices, strict=True):
        found = rows_of(layer, x)
        expected = elastic_oracle(matrix, x, len(found[0]), start, variant == "released")
        assert sum(row[3] for row in expected[0]) == TOKENS  # every token is in some row
        for mine, theirs in zip(found, expected, strict=True):
            same(mine, theirs)


def test_elastic_cache_keeps_the_most_attended_or_as_released_any(network: Network) -> None:
    """Where importance has nothing to do with age, the released anchors meet the true ones by chance: half of half."""
    shared, total = 0, 0
    for seed in range(6):
        kept = []
        for variant in ("paper", "released"):
            method = plugins.build_method("elastic_cache", start=0, variant=variant)
            seen, _ = toy_context(network, method, seed)
            sums = tuple(torch.rand(4, TOKENS, generator=torch.Generator().manual_seed(seed + i)) for i in (0, 99))
            seen = replace(seen, statistics={ColumnSums(): sums})
            plan = method.plan(seen, allowance(network, 30.5))
            kept.append([{row[0] for row in rows_of(p, x)[0]} for p, x in zip(plan.layers, seen.layers, strict=True)])
        for true, released in zip(*kept, strict=True):
            shared += len(true & released)
            total += len(true)
    assert 0.4 < shared / total < 0.6


def test_elastic_cache_released_pinned(network: Network) -> None:
    """The middle has the order 3, 0, 2, 5, 1, 4, 6, ...: taken for ranks, those below 3 (at 1, 2, 4) are thrown."""
    method = plugins.build_method("elastic_cache", variant="released")
    seen, _ = toy_context(network, method)
    sums = torch.arange(TOKENS) + 100.0
    sums[1:7] = torch.tensor([2.0, 5, 3, 1, 6, 4])
    seen = replace(seen, statistics={ColumnSums(): (sums.expand(4, -1),) * 2})
    layer, x = method.plan(seen, allowance(network, 57.2)).layers[0], seen.layers[0]
    for head, rows in enumerate(rows_of(layer, x)):
        assert [row[0] for row in rows] == [0, 1, 4, *range(6, TOKENS)]
        key = x.key[head]
        torch.testing.assert_close(rows[1][1], (2 * key[1] + key[2]) / 3)  # members 1, 2 and 4 are not shifted by start
        torch.testing.assert_close(rows[2][1], key[4])
        assert [row[3] for row in rows[:4]] == [1, 0, 0, 1]


# -- EMS ---------------------------------------------------------------------------------------------------------------


def ems_oracle(matrix: Tensor, x: SeenLayer, keep: int, options: dict[str, Any]) -> list[list[Row]]:
    window = options["window"]
    heads = []
    for head in range(2):
        group = matrix[2 * head : 2 * head + 2].mean(0)
        whole = [float(sum(group[i, j] for i in range(TOKENS))) for j in range(TOKENS)]
        local = [float(sum(group[i, j] for i in range(TOKENS - window, TOKENS))) / window for j in range(TOKENS)]
        aligned = [w * sum(local) / sum(whole) for w in whole]
        score = [max(a, b) for a, b in zip(aligned, local, strict=True)]
        last = shrink((0, window), keep, TOKENS)[1]
        order = sorted(range(TOKENS - last), key=lambda j: -score[j])
        centres = [*order[: keep - last], *range(TOKENS - last, TOKENS)]
        members: dict[int, list[int]] = {c: [c] for c in centres}
        covered = sum(score[c] for c in centres)
        for m in order[keep - last : keep - last + int(options["factor"] * keep)]:
            if covered >= options["mass"] * sum(score):
                break
            covered += score[m]
            similar = {
                c: max(float(torch.cosine_similarity(x.key[head, m], x.key[head, c], 0)), 0)
                * max(float(torch.cosine_similarity(x.value[head, m], x.value[head, c], 0)), 0)
                for c in centres
            }
            best = max(similar, key=lambda c: similar[c])
            if similar[best] > options["threshold"]:
                members[best].append(m)
        rows = []
        for c, of in sorted(members.items()):
            weights = [score[j] / sum(score[i] for i in of) for j in of]
            assert sum(weights) == pytest.approx(1)
            value = sum(a * x.value[head, j] for a, j in zip(weights, of, strict=True))
            length = sum(a * float(x.key[head, j].norm()) for a, j in zip(weights, of, strict=True))
            direction = sum(a * x.key[head, j] / x.key[head, j].norm() for a, j in zip(weights, of, strict=True))
            assert isinstance(direction, Tensor)
            assert isinstance(value, Tensor)
            rows.append((c, length * direction / direction.norm(), value, len(of)))
        heads.append(rows)
    return heads


@pytest.mark.parametrize("tokens", [1.1, 5.5, 15.5, 30.2, 45, 58])
@pytest.mark.parametrize(
    "options",
    [
        {"window": 8, "factor": 1.0, "mass": 0.95, "threshold": 0.6},
        {"window": 8, "factor": 3.0, "mass": 1.5, "threshold": 0.2},
        {"window": 1, "factor": 0.5, "mass": 0.7, "threshold": 0.0},
        {"window": 99, "factor": 1.0, "mass": 1.5, "threshold": 0.4},
    ],
    ids=["default", "many", "few", "all window"],
)
def test_ems_equals_the_loop(network: Network, options: dict[str, Any], tokens: float) -> None:
    method = plugins.build_method("ems", **options)
    seen, matrices = toy_context(network, method)
    plan = method.plan(seen, allowance(network, tokens))
    options = options | {"window": min(options["window"], TOKENS)}
    merged = []
    for layer, x, matrix in zip(plan.layers, seen.layers, matrices, strict=True):
        found = rows_of(layer, x)
        assert len({len(rows) for rows in found}) == 1  # every KV head has as many rows
        for mine, theirs in zip(found, ems_oracle(matrix, x, len(found[0]), options), strict=True):
            same(mine, theirs)
            merged.append(sum(row[3] > 1 for row in theirs))
    if options["factor"] == 3 and 10 < tokens < 50:
        assert all(merged)


@pytest.mark.parametrize("off", [{"factor": 0.0}, {"threshold": 1.1}, {"mass": 0.0}], ids=str)
def test_ems_without_merging_evicts_by_its_score(network: Network, off: dict[str, float]) -> None:
    method = plugins.build_method("ems", window=8, **off)
    seen, _ = toy_context(network, method)
    plan = method.plan(seen, allowance(network, 20.5))
    for i, (layer, x) in enumerate(zip(plan.layers, seen.layers, strict=True)):
        scores = method.scores(seen, i)
        for head, rows in enumerate(rows_of(layer, x)):
            assert [row[3] for row in rows] == [1] * 20
            best = scores[head, :-8].topk(12).indices.tolist()
            assert [row[0] for row in rows] == sorted([*best, *range(TOKENS - 8, TOKENS)])


def test_ems_scores_are_the_larger_of_two_with_the_same_mean(network: Network) -> None:
    method = plugins.build_method("ems", window=8)
    seen, matrices = toy_context(network, method)
    for i, matrix in enumerate(matrices):
        scores = method.scores(seen, i)
        group = matrix.unflatten(0, (2, 2)).mean(1)
        local, whole = group[:, -8:].mean(1), group.sum(1)
        assert (scores >= local - 1e-6).all()
        for mine, near, far in zip(scores, local, whole, strict=True):
            other = mine > near + 1e-6
            assert other.any()
            assert not other.all()
            torch.testing.assert_close(mine[other] / far[other], (near.mean() / far.mean()).expand(int(other.sum())))


@pytest.mark.parametrize("tiered", [False, True])
def test_ems_with_multiplicity_merges_equal_rows_exactly(network: Network, tiered: bool) -> None:
    """Thirty equal tokens: those that join one of them weigh as much as they did; without multiplicity they don't."""
    logits = []
    for multiplicity in (True, False):
        method = plugins.build_method("ems", window=22, mass=2.0, multiplicity=multiplicity)
        seen = read_exactly(network, ids_of(network, TOKENS), method.needs)
        alike = []
        for x in seen.layers:
            key, value = x.key.clone(), x.value.clone()
            key[:, :30], value[:, :30] = key[:, :1].clone(), value[:, :1].clone()
            alike.append(SeenLayer(key, value, x.position))
        sums = torch.ones(network.heads, TOKENS)
        sums[:, 30:] = 2.0
        seen = replace(
            seen, layers=tuple(alike), statistics={**seen.statistics, ColumnSums(): (sums,) * network.layers}
        )
        cache = CompressedCache.pack(method.plan(seen, allowance(network, 46)), seen)
        assert cache.nbytes < allowance(network, 46).limit
        assert any(slab.tier == MERGED for slab in cache.layers[0].slabs)
        with torch.inference_mode():
            logits.append(feed(network, [Fork(cache, method, tiered)], ids_of(network, 8, seed=2)[None]))
    with torch.inference_mode():
        full = CompressedCache.pack(keep_all(seen), seen)
        expected = feed(network, [Fork(full, Method())], ids_of(network, 8, seed=2)[None])
    torch.testing.assert_close(logits[0], expected, atol=5e-5, rtol=0)
    assert not torch.allclose(logits[1], expected, atol=1e-3)


def test_ems_merges_chunk_by_chunk_alike(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    method = plugins.build_method("ems", window=8, mass=2.0, threshold=0.3)
    seen, _ = toy_context(network, method)
    whole = method.plan(seen, allowance(network, 30))
    monkeypatch.setattr(merging, "CHUNK", 7)
    chunked = method.plan(seen, allowance(network, 30))
    for a, b in zip(whole.layers, chunked.layers, strict=True):
        assert torch.equal(a.route, b.route)
        assert a.made is not None
        assert b.made is not None
        torch.testing.assert_close(a.made.value, b.made.value)


# -- what both share ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ems", "elastic_cache"])
def test_equal_tokens_merge_to_themselves(network: Network, name: str) -> None:
    method = plugins.build_method(name, **({"window": 8, "mass": 2.0, "factor": 9.0} if name == "ems" else {}))
    seen, _ = toy_context(network, method)
    one = tuple(
        SeenLayer(x.key[:, :1].expand_as(x.key), x.value[:, :1].expand_as(x.value), x.position) for x in seen.layers
    )
    seen = replace(seen, layers=one)
    for layer, x in zip(method.plan(seen, allowance(network, 20)).layers, one, strict=True):
        for head, rows in enumerate(rows_of(layer, x)):
            assert any(row[3] == 0 for row in rows)
            for _, key, value, _ in rows:
                torch.testing.assert_close(key, x.key[head, 0])
                torch.testing.assert_close(value, x.value[head, 0])


@pytest.mark.parametrize("options", [{"name": "ems", "window": 8}, {"name": "elastic_cache"}], ids=lambda o: o["name"])
def test_bytes_are_used_up_and_the_smallest_plan_is_named(network: Network, options: dict[str, Any]) -> None:
    method = plugins.build_method(**options)
    seen, _ = toy_context(network, method)
    heads, row = 4, network.row_bytes()
    with pytest.raises(Infeasible) as refused:
        method.plan(seen, Allowance(1))
    smallest = refused.value.smallest
    with pytest.raises(Infeasible):
        method.plan(seen, Allowance(smallest - 1))
    assert row <= smallest <= row + heads * 12
    for limit in range(smallest, row * TOKENS, 1777):
        plan = method.plan(seen, Allowance(limit))
        held = CompressedCache.pack(plan, seen).nbytes
        assert limit - row - 16 * heads < held == weigh(plan, seen).held <= limit
        nominal = method.plan(seen, Allowance(limit, nominal=True))
        assert limit - row < weigh(nominal, seen).payload <= limit


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 6), st.integers(0, 20), st.integers(0, 99))
def test_pooled_sums_each_row_and_those_that_join_it(rows: int, members: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    own, joining = torch.randn(2, rows, 3, generator=draw), torch.randn(2, members, 3, generator=draw)
    centre = torch.randint(0, rows + 1, (2, members), generator=draw)
    expected = own.clone()
    for head in range(2):
        for m, c in enumerate(centre[head].tolist()):
            if c < rows:
                expected[head, c] += joining[head, m]
    torch.testing.assert_close(pooled(own, joining, centre), expected)


# -- LaCache -----------------------------------------------------------------------------------------------------------


def empty_context(network: Network, layers: int, tokens: int) -> Seen:
    """A context of which only the shape matters."""
    rows = torch.zeros(1, tokens, DIM)
    return Seen((SeenLayer(rows, rows, torch.arange(tokens)),) * layers, torch.zeros(tokens, dtype=torch.long), network)


def ladder_kept(network: Network, layers: int, tokens: int, keep: int, **options: Any) -> list[list[int]]:
    method = plugins.build_method("lacache", **options)
    seen = empty_context(network, layers, tokens)
    plan = method.plan(seen, Allowance(keep * layers * 2 * DIM * 4))
    return [(layer.route[0] == 0).nonzero()[:, 0].tolist() for layer in plan.layers]


def released_ladder(tokens: int, size: int, sinks: int, layers: int, span: int, overlap: int) -> list[list[int]]:
    """The released compaction of one long prompt, as lists of indices; layers may end with less than `size`."""
    before = 1 + math.ceil((layers - span) / (span - overlap))
    after = min(math.ceil(span / (span - overlap)), before)
    saved = before - after
    rungs = (size - sinks - layers) // after
    need, now = tokens - size, rungs * saved
    if need <= now:
        rungs = math.ceil(need / saved)
    found = []
    for layer in range(layers):
        kept = list(range(sinks))
        for j in range(rungs):
            kept += [sinks + layer % (saved + 1) + before * j + k for k in range(after)]
        kept += range(sinks + before * rungs, tokens)
        if need > now:
            times = math.ceil((need - now) / now)
            wide = before + (times - 1) * (before - 1)
            wider = math.ceil((need - now) / (wide - after))
            again = list(range(sinks))
            for j in range(wider):
                again += [sinks + layer % (wide - after + 1) + wide * j + times * k for k in range(after)]
            again += range(sinks + wide * wider, len(kept))
            kept = [kept[i] for i in again]
        found.append(kept)
    return found


def walked_ladder(
    layer: int, tokens: int, size: int, sinks: int, layers: int, span: int, overlap: int, ladder: bool
) -> list[int]:
    """What a layer keeps, found by walking over its tokens, rung by rung, until enough have left."""
    sinks, recent = shrink((sinks, layers), size, tokens)
    step = span - overlap
    before = 1 + math.ceil((layers - span) / step)
    after = min(math.ceil(span / step), size - sinks - recent)
    first_pass = (size - sinks - recent) // after * (before - after)
    kept = list(range(tokens))
    for times in (1, None):
        need = len(kept) - size
        if times is None:
            times = math.ceil(need / first_pass)
        else:
            need = min(need, first_pass)
        room = times * (before - after)
        offset = layer % (room + 1)
        if ladder:
            offset = times * sorted([0, layer // step - after + 1, before - after])[1]
        stay, place = kept[:sinks], 0
        for token in kept[sinks:]:
            if place in [offset + times * k for k in range(after)] or need <= 0:
                stay.append(token)
            else:
                need -= 1
            place = (place + 1) % (before + (times - 1) * (before - 1))
        kept = stay
        if len(kept) == size:
            break
    return kept


LADDERS = [
    (layers, span, overlap)
    for layers in range(2, 14)
    for span in range(1, layers)
    for overlap in range(span)
    if math.ceil((layers - span) / (span - overlap)) >= math.ceil(span / (span - overlap))  # a rung gives up something
]


@settings(deadline=None, max_examples=80)
@given(
    st.sampled_from(LADDERS),
    st.integers(0, 6),
    st.integers(2, 400),
    st.floats(0.01, 0.99),
    st.sampled_from(["interleaved", "ladder"]),
)
def test_lacache_equals_the_walk(
    sizes: tuple[int, int, int], sinks: int, tokens: int, share: float, pattern: str
) -> None:
    layers, span, overlap = sizes
    keep = max(int(share * tokens), 1)
    found = ladder_kept(NETWORK, layers, tokens, keep, span=span, overlap=overlap, sinks=sinks, pattern=pattern)
    first, last = shrink((sinks, layers), keep, tokens)
    for layer, kept in enumerate(found):
        assert kept == walked_ladder(layer, tokens, keep, sinks, layers, span, overlap, pattern == "ladder")
        assert len(kept) == keep
        assert set(range(first)) | set(range(tokens - last, tokens)) <= set(kept)


NETWORK = tiny_network()


@pytest.mark.parametrize(
    ("layers", "span", "overlap", "size", "tokens"),
    [
        (32, 16, 0, 128, 150),
        (32, 16, 0, 128, 219),
        (30, 15, 0, 205, 300),
        (24, 9, 7, 108, 160),
        (32, 16, 0, 256, 2000),
        (30, 15, 0, 205, 2048),
        (12, 6, 0, 64, 333),
        (12, 4, 0, 99, 500),
    ],
)
def test_lacache_equals_the_released_code(layers: int, span: int, overlap: int, size: int, tokens: int) -> None:
    """Where that fills the cache; else ours gives back what left last."""
    released = released_ladder(tokens, size, 4, layers, span, overlap)
    found = ladder_kept(NETWORK, layers, tokens, size, span=span, overlap=overlap)
    for mine, theirs in zip(found, released, strict=True):
        back = sorted(set(mine) - set(theirs))
        assert set(theirs) <= set(mine)
        assert len(back) == size - len(theirs)
        assert not back or back[0] > max(set(range(tokens)) - set(mine))


def test_lacache_is_sparser_for_older_tokens_and_covers_more_than_a_layer() -> None:
    found = ladder_kept(NETWORK, 30, 2048, 205)
    for kept in found:
        gaps = [b - a for a, b in itertools.pairwise(kept[4:])]
        assert gaps == sorted(gaps, reverse=True)
        assert len(set(gaps)) >= 3
        assert kept[:4] == [0, 1, 2, 3]
        assert kept[-30:] == list(range(2018, 2048))
    assert len(set().union(*found)) > 5 * 205


def test_lacache_layers_take_turns_or_form_groups() -> None:
    turns = ladder_kept(NETWORK, 12, 100, 80, span=4)  # rungs of 3 tokens, one stays
    groups = ladder_kept(NETWORK, 12, 100, 80, span=4, pattern="ladder")
    assert turns[0] == turns[3] == turns[6] == turns[9]
    assert turns[0] != turns[1] != turns[2] != turns[0]
    assert groups[0] == groups[3] == turns[0]
    assert groups[4] == groups[7] == turns[1]
    assert groups[8] == groups[11] == turns[2]
    older = [sum(kept) for kept in groups]
    assert older == sorted(older)  # older tokens in shallow layers


@pytest.mark.parametrize(("span", "overlap"), [(2, 0), (1, 1), (0, 0), (9, 0), (1, -1)])
def test_lacache_refuses_spans_that_evict_nothing(span: int, overlap: int) -> None:
    with pytest.raises(UsageError, match="overlap < span < 2"):
        ladder_kept(NETWORK, 2, 50, 20, span=span, overlap=overlap)
    with pytest.raises(UsageError, match="no token would be evicted"):
        ladder_kept(NETWORK, 30, 50, 20, span=20, overlap=18)
