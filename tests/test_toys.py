"""Six toys that keep the interface honest: each in a few lines what a whole family of methods does."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import checks
import pytest
import torch
from conftest import ids_of, tiny_network
from torch import Tensor

from kvbench.budget import Allowance
from kvbench.cache.codecs.quant import Quant
from kvbench.cache.fork import Edit, Event, Fork, Selection
from kvbench.cache.hf import Network
from kvbench.cache.packed import CompressedCache
from kvbench.decode import feed
from kvbench.method import Axis, Method
from kvbench.plan import EXACT, LayerPlan, Made, Plan, Tier, keep_all, top_rows, uniform_rows
from kvbench.prefill import Observed, Reader, Seen, SeenLayer, Statistic, read_exactly

TOKENS = 60
INT4 = Tier("4-bit", Quant(4), Quant(4))


@dataclass(frozen=True)
class ColumnSums(Statistic):
    def observe(self, state: Any, seen: Observed) -> Tensor:
        mask = torch.ones(seen.query.shape[1], seen.key.shape[1], dtype=torch.bool).tril(seen.start)
        keys = seen.key.repeat_interleave(len(seen.query) // len(seen.key), 0)
        logits = (seen.query @ keys.mT * seen.scale).masked_fill(~mask, -torch.inf)
        return logits.softmax(-1).sum(1).unflatten(0, (len(seen.key), -1)).sum(1)


@dataclass(frozen=True)
class H2O(Method):
    """One row per head leaves at every step, from the context or from the tail."""

    steps: ClassVar[bool] = True
    rows: int = 30
    recent: int = 10

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset({ColumnSums()})

    def plan(self, seen: Seen, budget: Allowance) -> Plan:
        layers = []
        for sums in seen.statistics[ColumnSums()]:
            route = top_rows(sums, self.rows, (0, self.recent))
            layers.append(LayerPlan((EXACT,), route, hold_positions=True, state=sums[route == 0].view(len(sums), -1)))
        return Plan(tuple(layers))

    def step(self, state: Tensor, event: Event) -> tuple[Tensor, Edit | None]:
        new = event.weights().sum(1).unflatten(0, (len(state), -1)).sum(1)
        sums = new + torch.nn.functional.pad(state, (0, event.new))
        if sums.shape[1] <= self.rows:
            return sums, None
        loser = sums[:, : -self.recent].argmin(1, keepdim=True)
        route = torch.zeros_like(sums, dtype=torch.int8).scatter(1, loser, -1)
        return sums[route == 0].view(len(sums), -1), Edit((EXACT,), route)


@dataclass(frozen=True)
class Quest(Method):
    """Holds everything and the bounds of each page; each query reads the pages with the highest bound."""

    axis: ClassVar[Axis] = Axis.READ
    selects: ClassVar[bool] = True
    page: int = 6
    pages: int = 3

    def plan(self, seen: Seen, budget: Allowance) -> Plan:
        layers = []
        for full, x in zip(keep_all(seen).layers, seen.layers, strict=True):
            blocks = x.key.unflatten(1, (-1, self.page))
            layers.append(replace(full, state=(blocks.amin(2), blocks.amax(2))))
        return Plan(tuple(layers))

    def select(self, state: tuple[Tensor, Tensor], event: Event) -> tuple[Any, Selection]:
        query = event.query
        low, high = (x.repeat_interleave(len(query) // len(x), 0)[:, None] for x in state)  # heads, 1, pages, dim
        bound = torch.maximum(query[:, :, None] * low, query[:, :, None] * high).sum(-1)
        best = bound.topk(min(self.pages, bound.shape[-1]), dim=-1).indices
        pages = torch.zeros_like(bound, dtype=torch.bool).scatter(-1, best, True).repeat_interleave(self.page, -1)
        tail = torch.nn.functional.pad(pages, (0, event.slots - event.context), value=True)
        return state, Selection(tail, scanned=sum(x.nbytes for x in state))


@dataclass(frozen=True)
class FastKV(Method):
    """After its first layer only some tokens go on."""

    own_prefill: ClassVar[bool] = True
    passed: int = 20

    def prefill(self, reader: Reader, budget: Allowance) -> CompressedCache:
        every = torch.arange(len(reader.token_ids))
        hidden = reader.run(range(1), reader.embed(), every)
        last = reader.last(0)
        score = (last.query[:, -1:].unflatten(0, (len(last.key), -1)) @ last.key[:, None].mT).sum((0, 1, 2))
        keep = score.topk(self.passed).indices.sort().values
        reader.run(range(1, reader.network.layers), hidden[keep], every[keep])
        seen = reader.seen()
        return CompressedCache.pack(keep_all(seen), seen)


@dataclass(frozen=True)
class GrowingInt4(Method):
    """The context is 4-bit; while decoding, every `residual` exact rows become 4-bit too."""

    steps: ClassVar[bool] = True
    residual: int = 4

    def plan(self, seen: Seen, budget: Allowance) -> Plan:
        return Plan(tuple(replace(x, tiers=(INT4,)) for x in keep_all(seen).layers))

    def step(self, state: Any, event: Event) -> tuple[Any, Edit | None]:
        tail = event.key.shape[1] - event.context
        if tail <= self.residual:
            return state, None
        rows = event.context + self.residual
        return state, Edit((INT4,), torch.zeros(len(event.key), rows, dtype=torch.int8), tail - self.residual)


@dataclass(frozen=True)
class AdaKV(Method):
    """The heads of a layer compete: ragged rows."""

    def plan(self, seen: Seen, budget: Allowance) -> Plan:
        keep = uniform_rows(seen, budget, EXACT)
        layers = []
        for x in seen.layers:
            norm = -x.key.norm(dim=-1)
            best = norm.flatten().topk(min(keep * len(norm), norm.numel())).indices
            route = torch.full((norm.numel(),), -1, dtype=torch.int8).scatter(0, best, 0)
            layers.append(LayerPlan((EXACT,), route.view(norm.shape)))
        return Plan(tuple(layers))


@dataclass(frozen=True)
class Merge(Method):
    """The older half of the context becomes one mean row per head, which counts for as many tokens."""

    def plan(self, seen: Seen, budget: Allowance) -> Plan:
        layers = []
        for x in seen.layers:
            half = x.key.shape[1] // 2
            old = x.key[:, :half], x.value[:, :half]
            many = torch.full((len(x.key), 1), float(half)).log()
            made = Made(*(o.mean(1, keepdim=True) for o in old), many, torch.zeros(len(x.key), 1, dtype=torch.long))
            route = torch.zeros(len(x.key), x.key.shape[1] + 1, dtype=torch.int8)
            route[:, :half] = -1
            route[:, -1] = 1
            layers.append(LayerPlan((EXACT, replace(EXACT, name="merged")), route, made))
        return Plan(tuple(layers))


@dataclass(frozen=True)
class Masked(Method):
    """Not a method: reads the rows of a full cache that another plan keeps. The oracle of ragged storage."""

    selects: ClassVar[bool] = True
    routes: tuple[Any, ...] = ()

    def plan(self, seen: Seen, budget: Allowance) -> Plan:
        kept = tuple(r == 0 for r in self.routes)
        return Plan(tuple(replace(x, state=k) for x, k in zip(keep_all(seen).layers, kept, strict=True)))

    def select(self, state: Tensor, event: Event) -> tuple[Any, Selection]:
        mask = torch.nn.functional.pad(state, (0, event.slots - event.context), value=True)
        return state, Selection(mask[:, None].expand(-1, event.new, -1))


TOYS = [H2O(), Quest(), FastKV(), GrowingInt4(), AdaKV(), Merge()]


@pytest.fixture(scope="module")
def network() -> Network:
    return tiny_network()


@torch.inference_mode()
def pack(network: Network, method: Method, share: float = 0.4) -> tuple[Seen, Plan, CompressedCache]:
    seen = read_exactly(network, ids_of(network, TOKENS), method.needs)
    plan = method.plan(seen, Allowance(int(share * network.row_bytes() * TOKENS)))
    return seen, plan, CompressedCache.pack(plan, seen)


@torch.inference_mode()
def compress(network: Network, method: Method, share: float = 0.4) -> CompressedCache:
    if method.own_prefill:
        reader = Reader(network, ids_of(network, TOKENS))
        return method.prefill(reader, Allowance(int(share * network.row_bytes() * TOKENS)))
    return pack(network, method, share)[2]


def logits(network: Network, cache: CompressedCache, method: Method, tiered: bool = False) -> Tensor:
    with torch.inference_mode():
        return feed(network, [Fork(cache, method, tiered)], ids_of(network, 8, seed=2)[None])


@pytest.mark.parametrize("toy", TOYS, ids=lambda toy: type(toy).__name__)
def test_forks_turns_and_batches(network: Network, toy: Method) -> None:
    cache = compress(network, toy)
    checks.forks_never_see_each_other(network, cache, toy)
    checks.block_equals_single(network, cache, toy)
    checks.batch_equals_solo(network, [cache, cache, compress(network, toy, 0.8)], toy)


def test_h2o_holds_its_rows_at_every_step(network: Network) -> None:
    toy = H2O()
    fork = Fork(pack(network, toy)[2], toy)
    before = [set(range(TOKENS))] * network.layers
    for i, token in enumerate(ids_of(network, 15, seed=2)):
        with torch.inference_mode():
            feed(network, [fork], token[None, None])
        for j, layer in enumerate(fork.layers):
            position = layer.packed.dense().position
            assert position is not None
            assert position.shape == (network.kv_heads, toy.rows)
            assert (position[:, -toy.recent :] == torch.arange(TOKENS + i + 1 - toy.recent, TOKENS + i + 1)).all()
            kept = set(position.flatten().tolist())
            assert kept <= before[j] | {TOKENS + i}  # what has left never comes back
            before[j] = kept


def test_h2o_with_room_for_all_is_the_full_cache(network: Network) -> None:
    toy = H2O(rows=100)
    full = CompressedCache.pack(keep_all(pack(network, toy)[0]), pack(network, toy)[0])
    torch.testing.assert_close(
        logits(network, pack(network, toy)[2], toy), logits(network, full, Method()), atol=5e-5, rtol=0
    )
    assert not torch.allclose(logits(network, pack(network, H2O())[2], H2O()), logits(network, full, Method()))


def test_quest_reads_all_pages_as_the_full_cache_and_pays_for_its_bounds(network: Network) -> None:
    every = Quest(pages=TOKENS // 6)
    seen, _, cache = pack(network, every)
    full = CompressedCache.pack(keep_all(seen), seen)
    torch.testing.assert_close(logits(network, cache, every), logits(network, full, Method()), atol=5e-5, rtol=0)
    assert cache.nbytes == full.nbytes * 7 // 6
    assert not torch.allclose(logits(network, pack(network, Quest())[2], Quest()), logits(network, full, Method()))


def test_fastkv_ends_with_fewer_tokens_above_its_layer(network: Network) -> None:
    toy = FastKV()
    cache = compress(network, toy)
    exact = read_exactly(network, ids_of(network, TOKENS))
    assert [x.dense().key.shape[1] for x in cache.layers] == [TOKENS, toy.passed]
    assert torch.equal(cache.layers[0].dense().key, exact.layers[0].key)
    assert cache.nbytes == network.row_bytes() // 2 * (TOKENS + toy.passed)
    whole = FastKV(passed=TOKENS)
    full = CompressedCache.pack(keep_all(exact), exact)
    torch.testing.assert_close(
        logits(network, compress(network, whole), whole), logits(network, full, Method()), atol=5e-5, rtol=0
    )


def test_growing_int4_equals_quantising_all_at_once(network: Network) -> None:
    toy = GrowingInt4()
    fork = Fork(pack(network, toy)[2], toy)
    start = fork.layers[0].packed.slabs[0].layout.rows
    ids = ids_of(network, 10, seed=2)
    with torch.inference_mode():
        feed(network, [fork], ids[None])
    slab = fork.layers[0].packed.slabs[0]  # of the first layer: its keys don't depend on any attention
    assert slab.layout.rows == start + 8 * network.kv_heads
    assert fork.layers[0].tail[0].shape[1] == 2
    whole = read_exactly(network, torch.cat([ids_of(network, TOKENS), ids[:8]]))
    once = CompressedCache.pack(toy.plan(whole, Allowance(0)), whole).layers[0]
    assert sum(t.nbytes for t in slab.tensors()) == sum(t.nbytes for t in once.tensors())
    dense = fork.layers[0].packed.dense()
    torch.testing.assert_close(dense.key, once.dense().key, atol=0.02, rtol=0)
    torch.testing.assert_close(dense.value, once.dense().value, atol=0.02, rtol=0)


@pytest.mark.parametrize("tiered", [False, True])
def test_ragged_heads_equal_a_masked_full_cache(network: Network, tiered: bool) -> None:
    toy = AdaKV()
    seen, plan, cache = pack(network, toy)
    counts = [slab.layout.counts for layer in cache.layers for slab in layer.slabs]
    assert any(len(set(c)) > 1 for c in counts)
    masked = Masked(tuple(layer.route for layer in plan.layers))
    oracle = logits(network, CompressedCache.pack(masked.plan(seen, Allowance(0)), seen), masked)
    torch.testing.assert_close(logits(network, cache, toy, tiered), oracle, atol=5e-5, rtol=0)


@pytest.mark.parametrize("tiered", [False, True])
def test_merging_equal_rows_with_multiplicity_is_exact(network: Network, tiered: bool) -> None:
    seen = pack(network, Merge())[0]
    alike = []
    for x in seen.layers:
        key, value = x.key.clone(), x.value.clone()
        key[:, : TOKENS // 2], value[:, : TOKENS // 2] = key[:, :1].clone(), value[:, :1].clone()
        alike.append(SeenLayer(key, value, x.position))
    seen = replace(seen, layers=tuple(alike))
    full = CompressedCache.pack(keep_all(seen), seen)
    cache = CompressedCache.pack(Merge().plan(seen, Allowance(0)), seen)
    expected = logits(network, full, Method())
    torch.testing.assert_close(logits(network, cache, Merge(), tiered), expected, atol=5e-5, rtol=0)
    assert cache.nbytes < full.nbytes * 0.6


@dataclass(frozen=True)
class RaggedThenInt4(AdaKV):
    """Ragged exact rows that all become 4-bit at the first step: empty places must not."""

    steps: ClassVar[bool] = True

    def step(self, state: Any, event: Event) -> tuple[Any, Edit | None]:
        return state, Edit((EXACT, INT4), torch.ones(event.key.shape[:2], dtype=torch.int8))


def test_an_edit_moves_the_rows_of_ragged_heads_alone(network: Network) -> None:
    toy = RaggedThenInt4()
    fork = Fork(pack(network, toy)[2], toy)
    before = [layer.packed.slabs[0].layout.counts for layer in fork.layers]
    assert any(len(set(counts)) > 1 for counts in before)
    with torch.inference_mode():
        feed(network, [fork], ids_of(network, 1, seed=2)[None])
    for counts, layer in zip(before, fork.layers, strict=True):
        (slab,) = layer.packed.slabs
        assert slab.tier == INT4
        assert slab.layout.counts == tuple(count + 1 for count in counts)
