"""Methods whose rows lie on the host (SentenceKV, LouisKV) against loops written from the papers' formulas."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import checks
import pytest
import torch
from conftest import ids_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvbench import plugins
from kvbench.artefact import Artefact
from kvbench.budget import Allowance, Budget
from kvbench.cache.fork import Event, Fork
from kvbench.cache.hf import Network
from kvbench.cache.packed import CompressedCache
from kvbench.decode import feed
from kvbench.errors import UsageError
from kvbench.method import Method
from kvbench.model import Model
from kvbench.plan import EVICTED, Infeasible, keep_all
from kvbench.prefill import Observed, Seen, Statistic, read_exactly
from kvbench.toolbox.offload import Index, k_means, nearest, unit_means
from kvbench.toolbox.sentences import SentenceEnds, sentences

TOKENS, NEW = 240, 60
MARKS = ".!?\n"
BOTH = ["sentencekv", "louiskv"]


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@dataclass(frozen=True)
class Queries(Statistic):
    """All queries of a context."""

    def observe(self, state: Tensor | None, seen: Observed) -> Tensor:
        return seen.query if state is None else torch.cat([state, seen.query], 1)


def text(model: Model, tokens: int, seed: int = 0, length: int = 9) -> Tensor:
    """Letters, and every `length` tokens on average the end of a sentence."""
    draw = torch.Generator().manual_seed(seed)
    letters, marks = (torch.tensor(model.writer.encode(x)) for x in ("abcdefghijklmnopqrstuvwxyz ,", MARKS))
    end = torch.rand(tokens, generator=draw) < 1 / length
    picked = [x[torch.randint(len(x), (tokens,), generator=draw)] for x in (letters, marks)]
    return torch.where(end, picked[1], picked[0])


def see(model: Model, method: Method, ids: Tensor) -> Seen:
    seen = read_exactly(model.network, ids, {*method.needs, Queries()}, "c")
    found = {c: Artefact(c.fit(model)[0], {}, "") for c in method.calibrations}
    return replace(seen, artefacts=found)


def share(budget: str, seen: Seen) -> Allowance:
    tokens = len(seen.token_ids)
    return Budget.parse(budget).allow(seen.network.row_bytes() * tokens, tokens)


def pack(method: Method, seen: Seen, budget: str) -> CompressedCache:
    return CompressedCache.pack(method.plan(seen, share(budget, seen)), seen)


@dataclass(frozen=True)
class Step:
    """What a layer did for one token."""

    query: Tensor  # (heads, dim)
    key: Tensor  # (kv_heads, dim), the new token's
    fetched: int
    device: int  # rows on the device, the new one included
    attended: Tensor  # keys, (kv_heads, rows, dim)
    fetch: Tensor  # the index tensor


def watch(network: Network, fork: Fork, ids: Tensor) -> list[list[Step]]:
    """Feeds tokens one by one: what every layer did for each."""
    found: list[list[Step]] = [[] for _ in fork.layers]

    def observe(event: Event) -> None:
        fetched = fork.layers[event.layer]._fetched
        assert fetched is not None
        attended = torch.cat([fetched.key, event.key], 1)
        found[event.layer].append(
            Step(event.query[:, -1], event.key[:, -1], fetched.key.shape[1], event.slots, attended, fetched.index)
        )

    fork.observer = observe
    feed(network, [fork], ids[None])
    return found


def same_keys(found: Tensor, expected: Sequence[Tensor]) -> bool:
    """Whether two lots of keys are equal, in any order."""
    return sorted(map(tuple, found.tolist())) == sorted(tuple(x.tolist()) for x in expected)


def of_head(g: int, query: Tensor, kv_heads: int = 2) -> Tensor:
    return query.unflatten(0, (kv_heads, -1))[g].double()


# -- SentenceKV --------------------------------------------------------------------------------------------------------


def cut(ids: Sequence[int], marks: set[int]) -> list[list[int]]:
    """The places of each sentence's tokens, the mark included."""
    found: list[list[int]] = [[]]
    for i, token in enumerate(ids):
        found[-1].append(i)
        if token in marks:
            found.append([])
    return [x for x in found if x]


def received(seen: Seen, layer: int, g: int, window: int, pool: int) -> list[float]:
    """What the last queries pay to each token before them, the most among its neighbours, in all query heads."""
    query, key = seen.statistics[Queries()][layer], seen.layers[layer].key[g].double()
    tokens = len(key)
    total = [0.0] * (tokens - window)
    for q in query.unflatten(0, (2, -1))[g].double():
        paid = torch.zeros(tokens, dtype=torch.float64)
        for i in range(tokens - window, tokens):
            paid[: i + 1] += (key[: i + 1] @ q[i] * seen.dim**-0.5).softmax(0)
        for i in range(tokens - window):
            total[i] += float(paid[max(i - pool // 2, 0) : min(i + pool // 2 + 1, tokens - window)].max())
    return total


@dataclass
class Sentences:
    """SentenceKV in one KV head, in loops: `rows` are (key, sentence), oldest first."""

    rows: list[tuple[Tensor, int | None]]
    means: list[Tensor]
    buffer: list[Tensor]

    def attends(self, step: Step, g: int, first: int) -> list[Tensor]:
        """The keys that a token reads, if `step` says how many are fetched and how many on the device."""
        self.rows.append((step.key[g], None))
        self.buffer.append(of_head(g, step.query))
        mean_query = torch.stack(self.buffer).mean(0)  # (group, dim)
        likeness = [float((mean_query @ mean).mean()) for mean in self.means]
        behind = self.rows[first : len(self.rows) - (step.device - first)]
        found: list[Tensor] = []
        for s in sorted(range(len(self.means)), key=lambda s: -likeness[s]):
            found += [key for key, sentence in behind if sentence == s]
        recent = self.rows[len(self.rows) - (step.device - first) :]
        return found[: step.fetched] + [key for key, _ in self.rows[:first]] + [key for key, _ in recent]

    def ends(self) -> None:
        """The sentence being written is over."""
        mine = [i for i, (_, sentence) in enumerate(self.rows) if sentence is None]
        for i in mine:
            self.rows[i] = (self.rows[i][0], len(self.means))
        self.means.append(torch.stack([self.rows[i][0] for i in mine]).double().mean(0))
        self.buffer = []


@pytest.mark.parametrize("budget", ["0.2", "0.3", "0.6"])
def test_sentencekv_attends_to_what_a_loop_attends_to(tiny: Model, budget: str) -> None:
    method = plugins.build_method("sentencekv", window=8, start=6, recent=10)
    ids = text(tiny, TOKENS)
    marks = set(tiny.writer.encode(MARKS))
    seen = see(tiny, method, ids)
    plan = method.plan(seen, share(budget, seen))
    new = text(tiny, NEW, seed=5)
    fork = Fork(CompressedCache.pack(plan, seen), method)
    steps = watch(tiny.network, fork, new)
    for layer, mine in enumerate(steps):
        state = plan.layers[layer].state
        for g in range(2):
            at = (plan.layers[layer].route[g] != EVICTED).nonzero()[:, 0].tolist()
            total = received(seen, layer, g, 8, method.pool)  # neighbours may have equal ones
            best = sorted(total, reverse=True)[: len(at) - 8]
            assert sorted((total[i] for i in at[:-8]), reverse=True) == pytest.approx(best, rel=1e-5)
            assert at[-8:] == list(range(TOKENS - 8, TOKENS))
            groups = cut(ids.tolist(), marks)
            sentence = {i: s for s, group in enumerate(groups) for i in group}
            key = seen.layers[layer].key[g]
            none = torch.zeros(seen.dim, dtype=torch.float64)
            members = [[key[i].double() for i in at if sentence[i] == s] for s in range(len(groups))]
            means = [torch.stack(x).mean(0) if x else none for x in members]
            torch.testing.assert_close(state.units.mean[g].double(), torch.stack(means), atol=5e-6, rtol=0)
            loop = Sentences([(key[i], sentence[i]) for i in at], means, [])
            for token, step in zip(new.tolist(), mine, strict=True):
                assert same_keys(step.attended[g], loop.attends(step, g, state.first))
                if token in marks:
                    loop.ends()
    last = fork.layers[0].state.units
    assert last.mean.shape[1] == len(cut(ids.tolist(), marks)) + sum(x in marks for x in new.tolist())
    assert {step.fetched for step in steps[0]} != {1}


def test_sentencekv_keeps_factor_times_what_fits(tiny: Model) -> None:
    """The rest is gone; what is kept, and is not at either end, is on the host."""
    for factor in (1, 2, 3):
        method = plugins.build_method("sentencekv", factor=factor)
        seen = see(tiny, method, text(tiny, TOKENS, length=30))
        plan = method.plan(seen, share("0.25", seen))
        cache = CompressedCache.pack(plan, seen)
        kept = [(x.route != EVICTED).sum(1) for x in plan.layers]
        [count] = {int(n) for x in kept for n in x}
        state = plan.layers[0].state
        row, means = tiny.network.row_bytes() // 2, 2 * 16 * 4
        other = means * (state.units.mean.shape[1] + 1 + 2)
        fits = (int(0.25 * row * TOKENS) - other) // (row + 2 * (4 + 2 * factor))
        assert count == factor * fits
        assert cache.offloaded == 2 * row * (count - state.first - state.recent)
        ends = state.first + state.recent
        assert cache.nbytes == 2 * (row * ends + state.units.nbytes + 2 * 2 * 16 * 4)


def test_sentencekv_a_full_stop_belongs_to_its_sentence(tiny: Model) -> None:
    ids = torch.tensor(tiny.writer.encode("One. Two!Three\n\nx?y"))
    ends = SentenceEnds().fit(tiny)[0]["ids"]
    assert sentences(ids, ends).tolist() == [0] * 4 + [1] * 5 + [2] * 6 + [3] + [4] * 2 + [5]
    assert sorted(tiny.writer.decode([i]) for i in ends.tolist()) == sorted(MARKS)


# -- LouisKV -----------------------------------------------------------------------------------------------------------


def lloyd(key: Tensor, order: Sequence[int], iterations: int) -> list[int]:
    """The cluster of each key, in loops."""
    centre = [key[i].double() for i in order]
    label: list[int] = []
    for _ in range(iterations):
        distance = [[float((k.double() - c).square().sum()) for c in centre] for k in key]
        label = [min(range(len(centre)), key=lambda c: row[c]) for row in distance]
        far = sorted(range(len(key)), key=lambda i: -distance[i][label[i]])
        empty = [c for c in range(len(centre)) if c not in label]
        for c, i in zip(empty, far, strict=False):
            label[i] = c
        centre = [
            torch.stack([k.double() for k, mine in zip(key, label, strict=True) if mine == c]).mean(0)
            for c in range(len(centre))
        ]
    return label


@pytest.mark.parametrize(("rows", "units", "seed"), [(60, 5, 0), (90, 12, 1), (40, 20, 2)])
def test_clusters_equal_a_loops(rows: int, units: int, seed: int) -> None:
    key = torch.randn(2, rows, 6, generator=torch.Generator().manual_seed(seed))
    mean, unit = k_means(key, units, 4, torch.Generator().manual_seed(seed))
    order = torch.rand(2, rows, generator=torch.Generator().manual_seed(seed)).argsort(1)[:, :units]
    for g in range(2):
        label = lloyd(key[g], order[g].tolist(), 4)
        assert unit[g].tolist() == label
        for c in range(units):
            members = [k for k, mine in zip(key[g], label, strict=True) if mine == c]
            torch.testing.assert_close(mean[g, c], torch.stack(members).mean(0), atol=5e-6, rtol=0)


def test_a_centroid_that_nothing_is_near_takes_the_farthest_row() -> None:
    key = torch.arange(10.0).view(1, 10, 1).repeat(2, 1, 1)
    mean = torch.tensor([[[0.0], [100.0], [-100.0]], [[4.0], [0.0], [9.0]]])
    assert nearest(key, mean).tolist() == [[0] * 8 + [2, 1], [1, 1, 0, 0, 0, 0, 0, 2, 2, 2]]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 50), st.integers(1, 4), st.integers(0, 10**6), st.data())
def test_no_cluster_is_empty(kv_heads: int, rows: int, kinds: int, seed: int, data: st.DataObject) -> None:
    """Not even where keys are lumped together."""
    draw = torch.Generator().manual_seed(seed)
    lumps = torch.randn(kv_heads, kinds, 4, generator=draw)
    key = lumps[:, torch.randint(kinds, (rows,), generator=draw)] + 0.01 * torch.randn(
        kv_heads, rows, 4, generator=draw
    )
    units = data.draw(st.integers(1, rows))
    mean, unit = k_means(key, units, 3, draw)
    assert unit.shape == (kv_heads, rows)
    assert all(set(x.tolist()) == set(range(units)) for x in unit)
    torch.testing.assert_close(mean, unit_means(key, unit, units))
    tighter = k_means(key, units, 8, torch.Generator().manual_seed(1))
    loose = k_means(key, units, 1, torch.Generator().manual_seed(1))
    if units <= kinds:  # no cluster had to be filled up, so Lloyd's steps never make it worse
        spread = [(key - m.take_along_dim(u[..., None], 1)).square().sum() for m, u in (tighter, loose)]
        assert spread[0] <= spread[1] * (1 + 1e-5)


@dataclass
class Clusters:
    """LouisKV in one layer, in loops: per KV head the units' keys, and the buffer that all heads share."""

    units: list[list[list[Tensor]]]
    sinks: list[list[Tensor]]
    buffer: list[list[Tensor]]
    starts: list[int]  # places in the buffer at which segments begin
    previous: Tensor | None = None
    fetched: list[list[Tensor]] | None = None

    def attends(self, step: Step, tau: float, scale: float) -> tuple[list[list[Tensor]], bool]:
        boundary = True
        if self.previous is not None:
            cosines = [
                float((a @ b) / (a.norm() * b.norm()))
                for a, b in zip(self.previous.double(), step.query.double(), strict=True)
            ]
            boundary = sum(cosines) / len(cosines) < tau
        self.previous = step.query
        if boundary:
            self.starts.append(len(self.buffer[0]))
            self.fetched = [self.retrieve(g, step, scale) for g in range(2)]
        assert self.fetched is not None
        self.fetched = [x[: step.fetched] for x in self.fetched]
        for g in range(2):
            self.buffer[g].append(step.key[g])
        return [self.fetched[g] + self.sinks[g] + self.buffer[g] for g in range(2)], boundary

    def retrieve(self, g: int, step: Step, scale: float) -> list[Tensor]:
        means = torch.stack([torch.stack(x).double().mean(0) for x in self.units[g]])
        score = torch.stack([(means @ q * scale).softmax(0) for q in of_head(g, step.query)]).mean(0).tolist()
        found: list[Tensor] = []
        for u in sorted(range(len(score)), key=lambda u: -score[u]):
            found += self.units[g][u]
        return found

    def leave(self, local: int, cluster: int) -> None:
        if len(self.buffer[0]) < local:
            return
        count = next((x for x in self.starts if cluster <= x <= local // 2), local // 2)
        for g in range(2):
            self.units[g].append(self.buffer[g][:count])
            self.buffer[g] = self.buffer[g][count:]
        self.starts = [x - count for x in self.starts if x > count]


@pytest.mark.parametrize(("budget", "tau"), [("0.4", 0.3), ("0.6", 0.6), ("0.5", 1.1)])
def test_louiskv_attends_to_what_a_loop_attends_to(tiny: Model, budget: str, tau: float) -> None:
    method = plugins.build_method("louiskv", tau=tau, cluster=6, sinks=3, local=20)
    seen = see(tiny, method, text(tiny, TOKENS))
    cache = pack(method, seen, budget)
    fork = Fork(cache, method)
    steps = watch(tiny.network, fork, text(tiny, NEW, seed=5))
    turned = []
    for layer, mine in enumerate(steps):
        state, key = cache.states[layer], seen.layers[layer].key
        assert (state.first, state.local) == (3, 20)
        end = TOKENS - 10
        units = [
            [[k for k, u in zip(key[g, 3:end], unit, strict=True) if u == c] for c in range(state.units.mean.shape[1])]
            for g, unit in enumerate(state.units.unit.tolist())
        ]
        loop = Clusters([list(x) for x in units], [list(x) for x in key[:, :3]], [list(x) for x in key[:, end:]], [])
        before = None
        for step in mine:
            expected, boundary = loop.attends(step, tau, seen.dim**-0.5)
            assert all(same_keys(step.attended[g], expected[g]) for g in range(2))
            assert boundary or before is None or step.fetched < before.fetched or step.fetch is before.fetch
            turned.append(boundary)
            before = step
            loop.leave(20, 6)
        assert fork.layers[layer].state.units.mean.shape[1] == len(loop.units[0])
        assert len(loop.units[0]) > len(units[0]) + 2
    assert all(turned) if tau > 1 else 2 < sum(turned) < len(turned)


def test_louiskv_units_partition_the_tokens(tiny: Model) -> None:
    """Every token that is neither a sink nor in the buffer is in one unit, and its mean is of those tokens."""
    method = plugins.build_method("louiskv", cluster=5, sinks=2, local=12)
    seen = see(tiny, method, text(tiny, TOKENS))
    cache = pack(method, seen, "0.5")
    fork = Fork(cache, method)
    watch(tiny.network, fork, text(tiny, NEW, seed=5))
    for layer in fork.layers:
        host, units = layer.packed.host, layer.state.units
        assert host is not None
        assert host.layout.width == units.unit.shape[1] == TOKENS + NEW - layer.length
        assert layer.length < 2 + 12
        key = host.layout.pad(host.key["x"])
        mean = unit_means(key, units.unit.long(), units.mean.shape[1])
        torch.testing.assert_close(units.mean, mean, atol=1e-5, rtol=0)
        assert all(len(x.unique()) == units.mean.shape[1] for x in units.unit)


def test_louiskv_retrieves_more_often_the_larger_tau(tiny: Model) -> None:
    """Above 1 at every step, below -1 at the first one only."""
    counts, moved = [], []
    for tau in (-1.1, -0.1, 0.0, 0.1, 1.1):
        method = plugins.build_method("louiskv", tau=tau, local=100)
        seen = see(tiny, method, text(tiny, 2 * TOKENS))
        fork = Fork(pack(method, seen, "0.5"), method)
        steps = watch(tiny.network, fork, text(tiny, 40, seed=5))[0]  # whose queries depend on nothing that is read
        counts.append(len({id(step.fetch) for step in steps}))
        moved.append([int(x) for x in fork.usage.moved])
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (1, 40)
    assert 1 < counts[1] < counts[3] < 40
    assert moved[0][0] > 0
    assert sum(moved[0][1:]) == 0
    assert sum(moved[-1][1:]) > 0


# -- both --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BOTH)
def test_equal_queries_move_nothing(tiny: Model, name: str) -> None:
    method = plugins.build_method(name)
    seen = see(tiny, method, text(tiny, TOKENS))
    fork = Fork(pack(method, seen, "0.5"), method)
    layer, draw = fork.layers[0], torch.Generator().manual_seed(0)
    query = torch.randn(4, 1, 16, generator=draw)
    moved = []
    for _ in range(6):
        fork.incoming = torch.tensor(tiny.writer.encode("a"))
        key, value = torch.randn(2, 2, 1, 16, generator=draw)
        layer.attend(query, key, value, 0.25)
        moved.append(int(layer.moved))
        fork.next_position += 1
    assert moved[0] > 0
    assert moved[1:] == [0] * 5


@pytest.mark.parametrize("name", BOTH)
def test_with_room_for_all_rows_it_is_the_full_cache(tiny: Model, name: str) -> None:
    """Everything is fetched: the offloaded cache, its edits and its index lose nothing."""
    options = {"factor": 5, "recent": 40} if name == "sentencekv" else {"local": 16, "cluster": 4, "tau": 1.1}
    method = plugins.build_method(name, **options)
    seen = see(tiny, method, text(tiny, TOKENS))
    cache = pack(method, seen, "0.5")
    assert cache.offloaded > 0.5 * tiny.network.row_bytes() * TOKENS
    roomy = tuple(x._replace(room=replace(x.room, budget=replace(x.room.budget, limit=10**9))) for x in cache.states)
    new = text(tiny, 30, seed=5)[None]
    full = Fork(CompressedCache.pack(keep_all(seen), seen), Method())
    expected = feed(tiny.network, [full], new)
    found = feed(tiny.network, [Fork(replace(cache, states=roomy), method)], new)
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=0)
    sparse = feed(tiny.network, [Fork(cache, method)], new)
    assert not torch.allclose(sparse, expected, atol=1e-2)


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("budget", ["0.15", "0.3", "0.7"])
def test_the_device_holds_no_more_than_the_budget_at_any_step(tiny: Model, name: str, budget: str) -> None:
    """Rows, index, fetched rows and their numbers, state: within the share of all tokens seen so far, and near it."""
    options = {"sentencekv": {}, "louiskv": {"tau": 0.5, "local": 30}}[name]
    method = plugins.build_method(name, **options)
    row = tiny.network.row_bytes()
    seen = see(tiny, method, text(tiny, TOKENS, length=20))
    fork = Fork(pack(method, seen, budget), method)
    feed(tiny.network, [fork], text(tiny, 150, seed=5)[None])
    limits = [int(Fraction(budget) * row * (TOKENS + i + 1)) for i in range(150)]
    assert all(held <= limit for held, limit in zip(fork.usage.held, limits, strict=True))
    near = [held > 0.7 * limit for held, limit in zip(fork.usage.held, limits, strict=True)]
    assert sum(near) > 140
    for layer in fork.layers:
        assert layer.packed.host is not None
        host = layer.packed.host.layout
        assert host.uniform
        gone = 0 if name == "louiskv" else TOKENS - _kept(method, seen, budget)
        assert host.width + layer.length == TOKENS + 150 - gone


def _kept(method: Method, seen: Seen, budget: str) -> int:
    route = method.plan(seen, share(budget, seen)).layers[0].route
    return int((route[0] != EVICTED).sum())


@pytest.mark.parametrize("name", BOTH)
def test_a_ceiling_in_bytes_holds_however_short_sentences_are(tiny: Model, name: str) -> None:
    """It does not grow: units for which there is no room join the one before."""
    method = plugins.build_method(name, **({"tau": 1.1, "cluster": 1} if name == "louiskv" else {}))
    seen = see(tiny, method, text(tiny, TOKENS, length=20))
    limit = int(0.25 * tiny.network.row_bytes() * TOKENS)
    cache = pack(method, seen, f"{limit}B")
    fork = Fork(cache, method)
    feed(tiny.network, [fork], text(tiny, 200, seed=5, length=1)[None])
    assert max(fork.usage.held) <= limit
    before, after = cache.states[0].units, fork.layers[0].state.units
    assert before.mean.shape[1] < after.mean.shape[1] < before.mean.shape[1] + 100
    assert after.last > 20
    host = fork.layers[0].packed.host
    assert host is not None
    key = torch.cat([host.layout.pad(host.key["x"]), fork.layers[0]._key[:, : fork.layers[0].length]], 1)
    start = before.unit.shape[1]
    mine = after.unit.long()[:, start:]
    if name == "louiskv":
        mean = unit_means(key[:, start : start + mine.shape[1]], mine, after.mean.shape[1])
        torch.testing.assert_close(after.mean[:, -1], mean[:, -1], atol=1e-4, rtol=0)


def test_what_was_fetched_shrinks_as_units_come(tiny: Model) -> None:
    """Under a ceiling that does not grow, with one retrieval: the worst rows make room for mean keys, nothing moves."""
    method = plugins.build_method("louiskv", tau=-1.1, local=8, cluster=2)
    seen = see(tiny, method, text(tiny, TOKENS))
    limit = int(0.5 * tiny.network.row_bytes() * TOKENS)
    fork = Fork(pack(method, seen, f"{limit}B"), method)
    steps = watch(tiny.network, fork, text(tiny, NEW, seed=5))[0]
    assert max(fork.usage.held) <= limit
    assert steps[-1].fetched < steps[0].fetched - 5
    assert torch.equal(steps[-1].fetch, steps[0].fetch[:, : steps[-1].fetched])
    assert not any(int(x) for x in fork.usage.moved[1:])


def test_louiskv_needs_numbers_of_clusters_two_means_a_query_and_three_rows(tiny: Model) -> None:
    method = plugins.build_method("louiskv")
    with pytest.raises(Infeasible) as refused:
        pack(method, see(tiny, method, text(tiny, TOKENS)), "1B")
    row = tiny.network.row_bytes() // 2
    assert refused.value.smallest == 2 * (2 * 2 * TOKENS + 2 * row // 2 + 4 * 16 * 4 + 3 * (row + 2 * 4))


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("tokens", [2, 9, 40, TOKENS])
def test_the_smallest_plan_works(tiny: Model, name: str, tokens: int) -> None:
    """It is refused a byte below, and holds for a while at a constant ceiling."""
    method = plugins.build_method(name)
    seen = see(tiny, method, text(tiny, tokens))
    with pytest.raises(Infeasible) as refused:
        pack(method, seen, "1B")
    smallest = refused.value.smallest
    with pytest.raises(Infeasible) as again:
        pack(method, seen, f"{smallest - 1}B")
    assert again.value.smallest == smallest
    fork = Fork(pack(method, seen, f"{smallest}B"), method)
    out = feed(tiny.network, [fork], text(tiny, 12, seed=5)[None])
    assert out.isfinite().all()
    assert max(fork.usage.held) <= smallest


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("budget", ["0.2", "0.5"])
def test_forks_never_see_each_other(tiny: Model, name: str, budget: str) -> None:
    method = plugins.build_method(name, **({"local": 8, "cluster": 4} if name == "louiskv" else {"recent": 4}))
    seen = see(tiny, method, text(tiny, TOKENS, length=20))
    cache = pack(method, seen, budget)
    before = [x.clone() for layer in cache.layers if layer.host for x in layer.host.tensors()]
    before += [x.clone() for x in cache.tensors()]
    checks.forks_never_see_each_other(tiny.network, cache, method)
    checks.block_equals_single(tiny.network, cache, method)
    checks.batch_equals_solo(tiny.network, [cache, pack(method, seen, "0.3")], method)
    after = [x for layer in cache.layers if layer.host for x in layer.host.tensors()] + list(cache.tensors())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("name", BOTH)
def test_a_frozen_fork_goes_on(tiny: Model, name: str) -> None:
    method = plugins.build_method(name)
    seen = see(tiny, method, text(tiny, TOKENS, length=20))
    fork = Fork(pack(method, seen, "0.3"), method)
    feed(tiny.network, [fork], text(tiny, 25, seed=5)[None])
    new = text(tiny, 25, seed=6)[None]
    frozen = Fork(fork.freeze(), method)
    torch.testing.assert_close(feed(tiny.network, [frozen], new), feed(tiny.network, [fork], new), atol=5e-5, rtol=0)


@pytest.mark.parametrize("name", BOTH)
def test_budget_1_holds_everything_here_and_has_no_state(tiny: Model, name: str) -> None:
    method = plugins.build_method(name)
    seen = see(tiny, method, ids_of(tiny.network, 50))
    for budget in ("1", "50tok"):
        cache = pack(method, seen, budget)
        assert (cache.offloaded, cache.states) == (0, (None, None))
    cache = pack(method, seen, f"{tiny.network.row_bytes() * 60}B")  # answers must not make it go over this one
    fork = Fork(cache, method)
    feed(tiny.network, [fork], text(tiny, 30)[None])
    assert max(fork.usage.held) <= tiny.network.row_bytes() * 60


@given(st.integers(1, 6), st.integers(1, 8), st.data())
def test_the_best_rows_are_those_of_whole_units(units: int, rows: int, data: st.DataObject) -> None:
    unit = data.draw(st.lists(st.integers(0, units - 1), min_size=rows, max_size=rows))
    scores = data.draw(st.permutations([float(i) for i in range(units)]))
    count = data.draw(st.integers(1, rows))
    seen = data.draw(st.integers(count, rows))
    index = Index(torch.zeros(1, units, 2), torch.tensor([unit], dtype=torch.int16))
    found = index.best(torch.tensor([scores]), seen, count)
    expected = sorted(range(seen), key=lambda i: (-scores[unit[i]], i))[:count]
    assert found.tolist() == [expected]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sentencekv", {"pool": 4}),
        ("sentencekv", {"factor": 0}),
        ("sentencekv", {"recent": 0}),
        ("louiskv", {"cluster": 0}),
        ("louiskv", {"iterations": 0}),
    ],
)
def test_options_that_make_no_sense_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="at least"):
        plugins.build_method(name, **options)
