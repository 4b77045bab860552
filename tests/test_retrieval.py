"""Methods that hold everything and read what a query asks for, each against a naive reading of its paper."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import checks
import pytest
import torch
from conftest import ids_of, tiny_network
from hypothesis import given
from hypothesis import strategies as st
from kvbench.methods.fasa import FASA
from kvbench.methods.full import Full
from kvbench.methods.quest import Quest, promise
from kvbench.methods.tokenselect import TokenSelect, votes
from torch import Tensor

from kvbench.artefact import Artefact
from kvbench.budget import Budget
from kvbench.cache.fork import Event, Fork, Selection
from kvbench.cache.hf import Network
from kvbench.cache.packed import CompressedCache
from kvbench.cache.rope import rotate
from kvbench.decode import feed
from kvbench.errors import UsageError
from kvbench.method import Method, Positions
from kvbench.model import Model
from kvbench.plan import Infeasible, tensors_in
from kvbench.prefill import Observed, Seen, read_exactly
from kvbench.toolbox.planes import PlaneAgreement, agreement
from kvbench.toolbox.reading import best_within

TOKENS = 200
NETWORKS = {kv: tiny_network(num_key_value_heads=kv) for kv in (1, 2, 4)}  # of 4 query heads
NETWORK = NETWORKS[2]
ROW = NETWORK.row_bytes()
# Each with a budget that is tight, and one that isn't.
TIGHT = [(Quest(), "0.4"), (FASA(), "0.25"), (TokenSelect(), "0.55")]
WIDE = [(Quest(), "0.8"), (FASA(), "0.7"), (TokenSelect(), "0.9")]
CASES = [*TIGHT, *WIDE, (Quest(page=4), "0.6"), (FASA(share=0.5), "0.6"), (TokenSelect(sinks=3, window=9), "0.7")]
METHODS = [method for method, _ in TIGHT]


def name(value: object) -> str:
    return type(value).__name__ if isinstance(value, Method) else str(value)


def see(network: Network = NETWORK, tokens: int = TOKENS) -> Seen:
    with torch.inference_mode():
        seen = read_exactly(network, ids_of(network, tokens))
    drawn = torch.rand(network.layers, network.heads, network.dim // 2, generator=torch.Generator().manual_seed(3))
    return replace(seen, artefacts={PlaneAgreement(): Artefact({"agreement": drawn}, {}, "")})


def pack(method: Method, budget: str, seen: Seen | None = None) -> CompressedCache:
    seen = seen or see()
    tokens = len(seen.token_ids)
    plan = method.plan(seen, Budget.parse(budget).allow(seen.network.row_bytes() * tokens, tokens))
    return CompressedCache.pack(plan, seen)


class Spy(Method):
    """A method, and what it has selected."""

    def __init__(self, method: Method) -> None:
        self.method, self.found = method, list[tuple[Event, Selection]]()
        self.selects, self.steps, self.positions = method.selects, method.steps, method.positions  # type: ignore[misc]

    def select(self, state: Any, event: Event) -> tuple[Any, Selection]:
        state, chosen = self.method.select(state, event)
        self.found.append((event, chosen))
        return state, chosen


@dataclass(frozen=True)
class Step:
    """One layer and new token: what attention got, what it gave, and what was chosen for it."""

    query: Tensor  # (heads, dim)
    key: Tensor  # (kv_heads, tokens, dim): of all tokens, the new one included
    value: Tensor
    out: Tensor
    mask: Tensor | None  # (heads, tokens)
    scanned: int
    layer: int


@torch.inference_mode()
def steps(method: Method, budget: str, count: int, network: Network = NETWORK) -> Iterator[Step]:
    """Random queries, keys and values given to each layer, token by token; checks what is counted as read."""
    seen, draw = see(network), torch.Generator().manual_seed(5)
    spy = Spy(method)
    fork = Fork(pack(method, budget, seen), spy)
    rows = [(x.key, x.value) for x in seen.layers]
    for _ in range(count):
        counted, fork.incoming = 0, torch.zeros(1, dtype=torch.long)
        for i, layer in enumerate(fork.layers):
            query = torch.randn(network.heads, 1, network.dim, generator=draw)
            key, value = (torch.randn(network.kv_heads, 1, network.dim, generator=draw) for _ in range(2))
            out = layer.attend(query, key, value, 0.3)
            rows[i] = torch.cat([rows[i][0], key], 1), torch.cat([rows[i][1], value], 1)
            event, chosen = spy.found[-1]
            tokens = event.slots
            mask = None
            if chosen.mask is not None:
                mask = chosen.mask[:, 0].repeat_interleave(network.heads // len(chosen.mask), 0)
            union = network.kv_heads * tokens if mask is None else in_groups(mask, network.kv_heads)
            counted += union * 2 * network.dim * 4 + chosen.scanned
            yield Step(query[:, 0], *rows[i], out[:, 0], mask, chosen.scanned, i)
        fork.advance(fork.incoming)
        assert int(fork.usage.read[-1]) == counted


def in_groups(mask: Tensor, kv_heads: int) -> int:
    """Rows that any query head of a group reads, summed over the KV heads."""
    return sum(int(group.any(0).sum()) for group in mask.chunk(kv_heads))


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float = 0.3) -> Tensor:
    """Of one head: a softmax written out."""
    weights = (key @ query * scale).exp()
    return (weights / weights.sum()) @ value


def of_groups(step: Step, sets: Sequence[Sequence[int]]) -> Tensor:
    """Attention of each query head over its own set of tokens."""
    group = len(step.query) // len(step.key)
    return torch.stack(
        [
            attend(q, step.key[h // group, s], step.value[h // group, s])
            for h, (q, s) in enumerate(zip(step.query, sets, strict=True))
        ]
    )


def as_many_as_fit(orders: Sequence[Sequence[int]], group: int, most: int) -> list[list[int]]:
    """For each query head the first of its order: per group as many as have a union of at most `most`."""
    found = []
    for g in range(0, len(orders), group):
        own = orders[g : g + group]
        count = max(n for n in range(len(own[0]) + 1) if len({x for order in own for x in order[:n]}) <= most)
        found += [sorted(order[:count]) for order in own]
    return found


def per_layer(budget: str, tokens: int, network: Network = NETWORK) -> int:
    return math.floor(Fraction(budget) * tokens * network.row_bytes() / network.layers)


def naive_quest(step: Step, page: int, limit: int) -> tuple[list[list[int]], int]:
    kv_heads, tokens, dim = step.key.shape
    group, row = len(step.query) // kv_heads, kv_heads * 2 * dim * 4
    pages = [range(i, min(i + page, tokens)) for i in range(0, tokens, page)]
    *full, last = pages
    orders = []
    for h, query in enumerate(step.query):
        bounds = []
        for part in full:
            keys = step.key[h // group, list(part)]
            low, high = keys.min(0).values, keys.max(0).values
            bounds.append(sum(max(float(query[d] * low[d]), float(query[d] * high[d])) for d in range(dim)))
        orders.append(sorted(range(len(full)), key=lambda p: -bounds[p]))
    scanned = kv_heads * len(full) * 2 * dim * 4
    most = (limit - scanned - len(last) * row) // (page * row)
    chosen = as_many_as_fit(orders, group, most)
    return [[t for p in mine for t in full[p]] + list(last) for mine in chosen], scanned


@pytest.mark.parametrize(("page", "budget"), [(16, "0.5"), (5, "0.5"), (7, "0.75"), (50, "0.8")])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_quest_reads_the_pages_of_a_naive_one(page: int, budget: str, kv_heads: int) -> None:
    sizes = set()
    for step in steps(Quest(page=page), budget, 2 * page if page < 10 else 18, NETWORKS[kv_heads]):
        limit = per_layer(budget, step.key.shape[1], NETWORKS[kv_heads])
        sets, scanned = naive_quest(step, page, limit)
        assert step.mask is not None
        assert [x.nonzero()[:, 0].tolist() for x in step.mask] == sets
        assert step.scanned == scanned
        torch.testing.assert_close(step.out, of_groups(step, sets), atol=1e-5, rtol=1e-4)
        sizes.update(map(len, sets))
    assert page < min(sizes) <= max(sizes) < TOKENS


@given(st.integers(0, 10**6), st.integers(1, 6), st.sampled_from([1, 2, 4]))
def test_quest_bounds_every_logit_of_a_page(seed: int, page: int, kv_heads: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    key = torch.randn(kv_heads, 5 * page, 8, generator=draw)
    query = torch.randn(4, 8, generator=draw)
    bounds = promise(query, *Quest(page=page).bounds(key, 0, 5))
    logits = (query[:, None] * key.repeat_interleave(4 // kv_heads, 0)).sum(-1).unflatten(1, (5, page)).amax(2)
    assert (bounds >= logits - 1e-5).all()
    if page == 1:
        torch.testing.assert_close(bounds, logits, atol=1e-5, rtol=0)
    else:
        assert (bounds > logits).any()


def test_quest_with_pages_of_one_token_is_exact_top_k() -> None:
    """The newest token is always read, 39 besides it; nominally, since the bounds of such pages are a cache."""
    for step in steps(Quest(page=1), "40tok", 5, NETWORKS[4]):
        best = (step.query[:, None] * step.key).sum(-1)[:, :-1].topk(39).indices
        sets = [[*sorted(x.tolist()), step.key.shape[1] - 1] for x in best]
        assert step.mask is not None
        assert [x.nonzero()[:, 0].tolist() for x in step.mask] == sets
        torch.testing.assert_close(step.out, of_groups(step, sets), atol=1e-5, rtol=1e-4)


def test_quest_holds_a_row_of_bounds_per_page_and_appends_them() -> None:
    method = Quest()
    cache = pack(method, "0.5")
    assert cache.nbytes == (TOKENS + TOKENS // 16) * ROW
    fork = Fork(cache, method)
    with torch.inference_mode():
        for i in range(30):
            feed(NETWORK, [fork], ids_of(NETWORK, 1, seed=i)[None])
            pages = (TOKENS + i) // 16  # before the newest token's own
            for layer in fork.layers:
                low, high = layer.state[1:]
                every = layer._key[:, : pages * 16].unflatten(1, (pages, 16))
                assert torch.equal(low, every.amin(2))
                assert torch.equal(high, every.amax(2))
    assert [held - fork.usage.held[0] for held in fork.usage.held[7:10]] == [7 * ROW, 9 * ROW, 10 * ROW]


def naive_fasa(step: Step, planes: Tensor, rows: int) -> list[list[int]]:
    """`planes` (heads, N)."""
    kv_heads, tokens, dim = step.key.shape
    group, orders = len(step.query) // kv_heads, []
    for h, query in enumerate(step.query):
        scores = []
        for key in step.key[h // group]:
            scores.append(sum(float(query[i] * key[i] + query[i + dim // 2] * key[i + dim // 2]) for i in planes[h]))
        orders.append(sorted(range(tokens), key=lambda t: -scores[t]))
    return as_many_as_fit(orders, group, rows)


@pytest.mark.parametrize(("share", "budget"), [(0.25, "0.3"), (0.25, "0.6"), (0.5, "0.6")])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_fasa_reads_the_tokens_of_a_naive_one(share: float, budget: str, kv_heads: int) -> None:
    network = NETWORKS[kv_heads]
    tables = see(network).artefacts[PlaneAgreement()].tensors["agreement"]
    planes = [[sorted(range(8), key=lambda i, a=a: -a[i])[: int(8 * share)] for a in table] for table in tables]
    dims = [
        sum(2 * len({i for head in table[g : g + 4 // kv_heads] for i in head}) for g in range(0, 4, 4 // kv_heads))
        for table in planes
    ]
    mean = math.ceil(sum(dims) * 4 / network.layers)
    for step in steps(FASA(share=share), budget, 4, network):
        tokens = step.key.shape[1]
        assert step.scanned == tokens * dims[step.layer] * 4
        rows = (per_layer(budget, tokens, network) - tokens * mean) // (kv_heads * 2 * 16 * 4)
        sets = naive_fasa(step, torch.tensor(planes[step.layer]), rows)
        assert step.mask is not None
        assert [x.nonzero()[:, 0].tolist() for x in step.mask] == sets
        assert len({len(x) for x in sets}) == 1 or kv_heads == 2
        if kv_heads == 4:  # every query head has a KV head of its own
            assert {len(x) for x in sets} == {rows}
        torch.testing.assert_close(step.out, of_groups(step, sets), atol=1e-5, rtol=1e-4)


def test_fasa_with_all_planes_is_exact_top_k() -> None:
    for step in steps(FASA(share=1.0), "40tok", 3, NETWORKS[4]):
        best = (step.query[:, None] * step.key).sum(-1).topk(40).indices
        assert step.mask is not None
        assert [x.nonzero()[:, 0].tolist() for x in step.mask] == [sorted(x.tolist()) for x in best]


def test_planes_are_what_the_rotary_embedding_turns() -> None:
    query = torch.randn(4, 1, 16, generator=torch.Generator().manual_seed(0))
    turned = rotate(query, torch.full((4, 1), 77), NETWORK.rope)
    pairs = [x.unflatten(-1, (2, 8)).norm(dim=-2) for x in (query, turned)]
    torch.testing.assert_close(*pairs)
    neighbours = [x.unflatten(-1, (8, 2)).norm(dim=-1) for x in (query, turned)]
    assert not torch.allclose(*neighbours, atol=1e-2)


def test_agreement_is_that_of_a_naive_one() -> None:
    draw = torch.Generator().manual_seed(0)
    query, key = torch.randn(4, 3, 8, generator=draw), torch.randn(2, 30, 8, generator=draw)
    found = agreement(5, Observed(0, query, key, key, 27, 30, 1.0))
    for h in range(4):
        for plane in range(4):
            shares = []
            for t in range(3):
                seen, own = key[h // 2, : 28 + t], [plane, plane + 4]
                every, alone = seen @ query[h, t], seen[:, own] @ query[h, t, own]
                both = set(every.topk(5).indices.tolist()) & set(alone.topk(5).indices.tolist())
                shares.append(len(both) / 5)
            assert found[h, plane] == pytest.approx(sum(shares) / 3)
    assert ((found >= 0) & (found <= 1)).all()
    alone = query * torch.tensor([0, 0, 1, 0]).repeat(2)
    assert (agreement(5, Observed(0, alone, key, key, 27, 30, 1.0))[:, 2] == 1).all()


@pytest.mark.usefixtures("own_cache", "corpora")
def test_agreement_is_fitted_on_texts(tiny: Model) -> None:
    calibration = PlaneAgreement(best=8, sequences=2, tokens=64, steps=4)
    found = calibration.fit(tiny)[0]["agreement"]
    assert found.shape == (2, 4, 8)
    assert ((found > 0) & (found < 1)).all()
    assert torch.equal(calibration.fit(tiny)[0]["agreement"], found)
    with pytest.raises(UsageError, match="too short"):
        replace(calibration, sequences=10**6, tokens=4000).fit(tiny)


def turn(x: Tensor, by: int) -> Tensor:
    """A rotation written out: each pair of dimensions is a complex number."""
    cos, sin = NETWORK.rope(torch.tensor([abs(by)]))
    angle = torch.complex(cos[0, :8], sin[0, :8] if by >= 0 else -sin[0, :8])
    z = torch.complex(x[..., :8], x[..., 8:]) * angle
    return torch.cat([z.real, z.imag], -1)


def naive_tokenselect(step: Step, first: int, last: int, best: int) -> list[int]:
    tokens = step.key.shape[1]
    votes = dict.fromkeys(range(first, tokens - last), 0.0)
    for h, query in enumerate(step.query):
        bare = turn(query, -(tokens - 1))
        asked = turn(bare, last)
        logits = {t: float(asked @ turn(step.key[h // 2, t], -t)) for t in votes}
        mass = {t: math.exp(x - max(logits.values())) for t, x in logits.items()}
        for t, x in mass.items():
            votes[t] += x / sum(mass.values())
    assert sum(votes.values()) == pytest.approx(4)
    chosen = sorted(votes, key=lambda t: (-round(100 * math.log(votes[t])), -t))[:best]
    return [*range(first), *sorted(chosen), *range(tokens - last, tokens)]


@pytest.mark.parametrize("positions", Positions)
@pytest.mark.parametrize(("sinks", "window", "budget"), [(4, 10, "0.7"), (128, 512, "0.6"), (0, 1, "0.8")])
def test_tokenselect_reads_the_tokens_of_a_naive_one(
    positions: Positions, sinks: int, window: int, budget: str
) -> None:
    method = TokenSelect(sinks=sinks, window=window, positions=positions)
    for step in steps(method, budget, 3):
        tokens, row = step.key.shape[1], ROW // 2
        limit = per_layer(budget, tokens)
        rows = (limit - tokens * row // 2) // row
        share = min(1, rows / 2 / (sinks + window))
        first, last = int(share * sinks), max(int(share * window), 1)
        assert (first, last) == (sinks, window) or first + last <= rows / 2
        scanned = (tokens - first - last) * row // 2
        rows = (limit - scanned) // row
        chosen = naive_tokenselect(step, first, last, rows - first - last)
        assert step.scanned == scanned
        assert step.mask is not None
        assert all(x.nonzero()[:, 0].tolist() == chosen for x in step.mask)
        assert len(chosen) == rows
        out = []
        for h, query in enumerate(step.query):
            key = step.key[h // 2, chosen]
            if positions is Positions.contiguous:  # the i-th token read stands at i, the query with the last of them
                query = turn(turn(query, -(tokens - 1)), rows - 1)
                key = torch.stack([turn(turn(k, -t), i) for i, (k, t) in enumerate(zip(key, chosen, strict=True))])
            out.append(attend(query, key, step.value[h // 2, chosen]))
        torch.testing.assert_close(step.out, torch.stack(out), atol=1e-4, rtol=1e-3)


@given(st.integers(0, 10**6), st.floats(0.1, 10))
def test_every_head_has_one_vote(seed: int, louder: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    query, key = torch.randn(4, 8, generator=draw), torch.randn(2, 30, 8, generator=draw)
    assert float(votes(query, key).exp().sum()) == pytest.approx(4, abs=1e-4)
    loud = query * torch.tensor([louder, 1, 1, 1])[:, None]
    assert float(votes(loud, key).exp().sum()) == pytest.approx(4, abs=1e-4)
    alone = (key[0] @ loud[0]).softmax(0) - (key[0] @ query[0]).softmax(0)
    torch.testing.assert_close(votes(loud, key).exp() - votes(query, key).exp(), alone, atol=1e-5, rtol=0)
    far = votes(100 * query, key)
    assert (far.exp() == 0).any()  # and such tokens still have an order
    assert far.isfinite().all()
    assert len(far.unique()) > 20


@given(st.integers(0, 10**6), st.integers(1, 20), st.integers(0, 25), st.sampled_from([1, 2, 4]))
def test_a_group_reads_as_many_as_fit(seed: int, candidates: int, most: int, kv_heads: int) -> None:
    """Ties included: scores are few different numbers."""
    scores = torch.randint(4, (4, candidates), generator=torch.Generator().manual_seed(seed)).float()
    orders = [sorted(range(candidates), key=lambda t, s=s: -s[t]) for s in scores.tolist()]
    expected = as_many_as_fit(orders, 4 // kv_heads, most)
    assert [x.nonzero()[:, 0].tolist() for x in best_within(scores, kv_heads, most)] == expected


@given(st.integers(1, 1000), st.integers(0, 1000), st.sampled_from(["0.1", "0.333", "1", "0.9r", "64KiB", "128tok"]))
def test_a_share_of_all_tokens_seen_grows_with_them(tokens: int, more: int, text: str) -> None:
    budget = Budget.parse(text)
    grown = budget.allow(512 * tokens, tokens).at(tokens + more)
    if text in ("64KiB", "128tok"):
        assert grown == budget.allow(512 * tokens, tokens).limit
    else:
        afresh = budget.allow(512 * (tokens + more), tokens + more).limit
        assert afresh - 1 <= grown <= afresh or (budget.nominal and abs(grown - afresh) <= 512)  # whole tokens


@torch.inference_mode()
@pytest.mark.parametrize(("method", "budget"), CASES, ids=name)
def test_what_is_read_fills_the_budget_at_every_step(method: Method, budget: str) -> None:
    seen = see()
    fork = Fork(pack(method, budget, seen), method)
    feed(NETWORK, [fork], ids_of(NETWORK, 120, seed=2)[None])
    room = ROW * {Quest: getattr(method, "page", 0) * 3, FASA: 3, TokenSelect: 1.5}[type(method)]
    for i, read in enumerate(fork.usage.read):
        limit = Budget.parse(budget).allow(ROW * (TOKENS + i + 1), TOKENS + i + 1).limit
        assert limit - room < int(read) <= limit
    full = Fork(pack(Full(), "1", seen), Full())
    assert fork.usage.held[0] >= full.growth(0, 1).held[0]


@torch.inference_mode()
@pytest.mark.parametrize("method", METHODS, ids=name)
def test_all_of_the_cache_is_the_full_cache(method: Method) -> None:
    """Nothing is held or read besides it, and it stays so."""
    cache = pack(method, "1")
    assert cache.nbytes == TOKENS * ROW
    fork, full = Fork(cache, method), Fork(pack(Full(), "1"), Full())
    for i in range(20):
        ids = ids_of(NETWORK, 1, seed=i)[None]
        torch.testing.assert_close(feed(NETWORK, [fork], ids), feed(NETWORK, [full], ids), atol=1e-6, rtol=0)
    assert fork.usage.read == tuple(ROW * (TOKENS + i + 1) for i in range(20))
    few = Fork(pack(method, "0.6"), method)
    ids = ids_of(NETWORK, 3, seed=1)[None]
    assert not torch.allclose(feed(NETWORK, [few], ids), feed(NETWORK, [Fork(pack(Full(), "1"), Full())], ids))


@torch.inference_mode()
@pytest.mark.parametrize("method", METHODS, ids=name)
def test_bytes_are_a_ceiling_that_does_not_grow(method: Method) -> None:
    """Enough for the context and three more tokens: those read everything, later ones choose."""
    limit = ROW * (TOKENS + 3)
    fork = Fork(pack(method, f"{limit}B"), method)
    feed(NETWORK, [fork], ids_of(NETWORK, 20, seed=2)[None])
    read = [int(x) for x in fork.usage.read]
    assert read[:3] == [ROW * (TOKENS + i) for i in (1, 2, 3)]
    assert all(0.7 * limit < x <= limit for x in read[3:])


@torch.inference_mode()
@pytest.mark.parametrize("kv_heads", NETWORKS)
@pytest.mark.parametrize("method", [*METHODS, Quest(page=5), Quest(dense=1), FASA(dense=1)], ids=name)
def test_the_smallest_plan_is_right(method: Method, kv_heads: int) -> None:
    """One byte less is refused; at it, and at the share it is, the budget holds at every step to come."""
    network = NETWORKS[kv_heads]
    seen = see(network)
    full = network.row_bytes() * TOKENS
    with pytest.raises(Infeasible) as refused:
        pack(method, "1B", seen)
    least = refused.value.smallest
    assert least < full
    with pytest.raises(Infeasible, match=f"{least:,} bytes"):
        pack(method, f"{least - 1}B", seen)
    fork = Fork(pack(method, f"{least}B", seen), method)
    feed(network, [fork], ids_of(network, 1)[None])
    assert int(fork.usage.read[0]) <= least
    share = math.ceil(1e4 * least / full) / 1e4
    fork = Fork(pack(method, f"{share:g}", seen), method)
    assert feed(network, [fork], ids_of(network, 100, seed=2)[None]).isfinite().all()
    for i, read in enumerate(fork.usage.read):
        assert int(read) <= share * network.row_bytes() * (TOKENS + i + 1)


@torch.inference_mode()
@pytest.mark.parametrize("method", METHODS, ids=name)
@pytest.mark.parametrize("tokens", [1, 5, 16, 33])
def test_short_contexts(method: Method, tokens: int) -> None:
    seen, expected = see(tokens=tokens), feed(NETWORK, [Fork(pack(Full(), "1", see(tokens=tokens)), Full())], IDS)
    torch.testing.assert_close(feed(NETWORK, [Fork(pack(method, "1", seen), method)], IDS), expected, atol=5e-5, rtol=0)
    with pytest.raises(Infeasible) as refused:
        pack(method, "1B", seen)
    least = refused.value.smallest
    assert least <= ROW * tokens
    if least > 0.6 * ROW * tokens:
        with pytest.raises(Infeasible):
            pack(method, "0.6", seen)
        return
    fork = Fork(pack(method, "0.6", seen), method)
    assert feed(NETWORK, [fork], IDS).isfinite().all()
    assert all(int(read) <= 0.6 * ROW * (tokens + i + 1) for i, read in enumerate(fork.usage.read))


IDS = ids_of(NETWORK, 12, seed=2)[None]


@torch.inference_mode()
@pytest.mark.parametrize("method", METHODS, ids=name)
@pytest.mark.parametrize("budget", ["1tok", "20tok", "0.9r"])
def test_nominal_budgets_are_never_refused_and_count_tokens_alone(method: Method, budget: str) -> None:
    spy = Spy(method)
    fork = Fork(pack(method, budget), spy)
    assert feed(NETWORK, [fork], IDS).isfinite().all()
    most = 1 if budget == "1tok" else 21
    for event, chosen in spy.found:
        assert chosen.mask is not None
        mask = chosen.mask[:, 0].repeat_interleave(4 // len(chosen.mask), 0)
        tail = 16 if isinstance(method, Quest) else 2  # a page that is being filled, a token for each query head
        assert in_groups(mask, 2) <= 2 * max(most, tail)
        assert event.slots > most


@torch.inference_mode()
@pytest.mark.parametrize("make", [Quest, FASA])
def test_dense_layers_read_everything_and_that_counts(make: Callable[..., Method]) -> None:
    method = make(dense=1)
    spy = Spy(method)
    cache = pack(method, "0.85")
    fork = Fork(cache, spy)
    feed(NETWORK, [fork], ids_of(NETWORK, 60, seed=2)[None])
    assert not tensors_in(cache.states[0])
    assert tensors_in(cache.states[1])
    assert all((chosen.mask is None) == (event.layer == 0) for event, chosen in spy.found)
    assert all(int(read) <= 0.85 * ROW * (TOKENS + i + 1) for i, read in enumerate(fork.usage.read))
    with pytest.raises(Infeasible) as refused:
        pack(make(dense=2), "0.99")
    assert refused.value.smallest == TOKENS * ROW
    assert pack(make(dense=5), "1").nbytes == TOKENS * ROW


@pytest.mark.parametrize(("method", "budget"), CASES, ids=name)
def test_forks_turns_and_batches(method: Method, budget: str) -> None:
    cache = pack(method, budget)
    checks.forks_never_see_each_other(NETWORK, cache, method)
    checks.block_equals_single(NETWORK, cache, method)
    checks.batch_equals_solo(NETWORK, [cache, pack(method, "1"), pack(method, "0.95")], method)


@torch.inference_mode()
@pytest.mark.parametrize(("method", "budget"), TIGHT, ids=name)
def test_a_frozen_fork_goes_on_as_it_would_have(method: Method, budget: str) -> None:
    fork = Fork(pack(method, budget), method)
    feed(NETWORK, [fork], ids_of(NETWORK, 21, seed=2)[None])
    again = Fork(fork.freeze(), method)
    torch.testing.assert_close(feed(NETWORK, [again], IDS), feed(NETWORK, [fork], IDS), atol=5e-5, rtol=0)
    assert [int(x) for x in again.usage.read] == [int(x) for x in fork.usage.read[21:]]


def test_positions_are_known_where_every_token_is_there() -> None:
    """Without being held; once a token has left they are not."""
    seen, found = see(), list[Event]()
    cache = pack(Full(), "1", seen)
    half = pack(Full(), "1", see(tokens=TOKENS // 2))
    for packed in (cache, replace(half, token_ids=cache.token_ids, next_position=TOKENS)):
        fork = Fork(packed, Full())
        fork.observer = found.append
        with torch.inference_mode():
            feed(NETWORK, [fork], IDS[:, :3])
    (known, _), (unknown, _) = found[:2], found[2:]
    assert known.position is not None
    assert known.position.tolist() == [list(range(TOKENS + 3))] * 2
    assert unknown.position is None


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (Quest, {"page": 0}),
        (Quest, {"dense": -1}),
        (FASA, {"share": 0.0}),
        (FASA, {"share": 1.1}),
        (FASA, {"dense": -1}),
        (TokenSelect, {"sinks": -1}),
        (TokenSelect, {"window": 0}),
    ],
)
def test_options_that_make_no_sense_are_refused(make: Callable[..., Method], options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"method\.\w+="):
        make(**options)
