"""Methods that go on evicting while they decode, against naive ones that hold lists of positions."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil
from typing import Any

import checks
import pytest
import torch
from conftest import ids_of, tiny_network
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvbench import plugins
from kvbench.budget import Allowance
from kvbench.cache.attention import attention_weights, causal_mask
from kvbench.cache.fork import Event, Fork, Keep
from kvbench.cache.hf import Network
from kvbench.cache.packed import CompressedCache, PackedLayer
from kvbench.cell import options
from kvbench.decode import feed
from kvbench.errors import UsageError
from kvbench.method import Method, Positions
from kvbench.plan import Infeasible, Plan
from kvbench.prefill import Observed, Seen, Statistic, read_exactly
from kvbench.toolbox.eviction import without
from methods.treekv import compete

TOKENS = 40
EXTRA = {"h2o": 4, "tova": 0, "streamingllm": 0, "lazyeviction": 4, "treekv": 6}  # bytes a row, beside key and value


@pytest.fixture(scope="module")
def network() -> Network:
    return tiny_network()


@dataclass(frozen=True)
class Queries(Statistic):
    """All queries of the context."""

    def observe(self, state: Any, seen: Observed) -> Tensor:
        return seen.query


@torch.inference_mode()
def see(network: Network, method: Method, tokens: int = TOKENS) -> Seen:
    return read_exactly(network, ids_of(network, tokens), method.needs | {Queries()}, "c")


def build(name: str, **given: Any) -> Method:
    decodes = {"decode": True} if name in ("h2o", "tova", "streamingllm") else {}
    return plugins.build_method(name, **(decodes | given))


def room(network: Network, method: Method, rows: int) -> Allowance:
    """The bytes of so many rows."""
    extra = EXTRA[plugins.name_of(method)]
    if plugins.name_of(method) == "streamingllm" and method.positions is Positions.contiguous:
        extra = 2
    return Allowance(rows * (network.row_bytes() + extra * network.layers * network.kv_heads))


def fork_of(seen: Seen, method: Method, budget: Allowance, hold_positions: bool = False) -> Fork:
    plan = method.plan(seen, budget)
    if hold_positions:
        plan = Plan(tuple(replace(layer, hold_positions=True) for layer in plan.layers))
    return Fork(CompressedCache.pack(plan, seen), method)


VARIANTS = [
    build("h2o"),
    build("tova"),
    build("streamingllm"),
    build("streamingllm", positions=Positions.contiguous),
    build("lazyeviction", window=6, alpha=0.02),
    build("treekv", block=4),
    build("treekv", block=4, positions=Positions.original),
]
ROLLING = pytest.mark.parametrize(
    "method", VARIANTS, ids=[f"{plugins.name_of(m)}-{m.positions.name}" for m in VARIANTS]
)


# -- naive methods: per KV head a list of positions --------------------------------------------------------------------


class Naive:
    """`kept[g]` are the positions that KV head g holds; `attention` is the context's, (kv_heads, group, T, T)."""

    def __init__(self, method: Any, attention: Tensor, rows: int) -> None:
        self.method, self.rows = method, rows
        self.tokens = attention.shape[-1]
        self.heads = range(len(attention))
        self.kept = [list(range(self.tokens)) for _ in self.heads]
        if self.tokens > rows:
            self.cut(attention)
        self.start(attention)

    def cut(self, attention: Tensor) -> None:
        """The context down to `rows`."""
        raise NotImplementedError

    def start(self, attention: Tensor) -> None:
        """What is counted from the context on."""

    def see(self, position: int, weights: list[Tensor]) -> None:
        """`weights[g]` (group, slots): the attention of the token at `position` over `kept[g]`, itself the last."""
        raise NotImplementedError


def best(score: dict[int, float], among: list[int], count: int) -> list[int]:
    return sorted(among, key=lambda p: -score[p])[:count]


class NaiveH2O(Naive):
    def start(self, attention: Tensor) -> None:
        self.sums = [dict(enumerate(attention[g].sum((0, 1)).tolist())) for g in self.heads]

    def cut(self, attention: Tensor) -> None:
        recent = self.tokens - self.rows // 2
        for g in self.heads:
            sums = dict(enumerate(attention[g].sum((0, 1)).tolist()))
            heavy = best(sums, list(range(recent)), self.rows - self.rows // 2)
            self.kept[g] = sorted(heavy) + list(range(recent, self.tokens))

    def see(self, position: int, weights: list[Tensor]) -> None:
        for g in self.heads:
            self.sums[g][position] = 0.0
            for j, p in enumerate(self.kept[g]):
                self.sums[g][p] += float(weights[g][:, j].sum())
            if len(self.kept[g]) > self.rows:
                older = self.kept[g][: len(self.kept[g]) - self.rows // 2]
                self.kept[g].remove(min(older, key=lambda p: self.sums[g][p]))


class NaiveTOVA(Naive):
    def cut(self, attention: Tensor) -> None:
        newest = dict(enumerate(attention[:, :, -1].mean((0, 1)).tolist()))
        self.kept = [sorted(best(newest, list(range(self.tokens)), self.rows)) for _ in self.heads]

    def see(self, position: int, weights: list[Tensor]) -> None:
        if len(self.kept[0]) > self.rows:
            least = int(torch.cat(weights).mean(0).argmin())
            for g in self.heads:
                del self.kept[g][least]


class NaiveStreaming(Naive):
    def cut(self, attention: Tensor) -> None:
        sinks = min(self.method.sinks, self.rows // 2)
        kept = [*range(sinks), *range(self.tokens - self.rows + sinks, self.tokens)]
        self.kept = [list(kept) for _ in self.heads]

    def see(self, position: int, weights: list[Tensor]) -> None:
        for g in self.heads:
            if len(self.kept[g]) > self.rows:
                del self.kept[g][min(self.method.sinks, self.rows // 2)]


class NaiveLazy(Naive):
    def __init__(self, method: Any, attention: Tensor, rows: int) -> None:
        self.window = max(1, min(method.window, (rows + 1) // 3))
        self.most = rows
        super().__init__(method, attention, rows + 1 - self.window)

    def start(self, attention: Tensor) -> None:
        self.t = 0
        self.last = [dict.fromkeys(range(self.tokens), 0) for _ in self.heads]
        self.mri = [dict.fromkeys(range(self.tokens), 0) for _ in self.heads]

    def cut(self, attention: Tensor) -> None:
        recent = self.tokens - min(self.window, self.rows // 2)
        seen = attention[:, :, -min(self.method.window, self.tokens) :].mean(2).amax(1)
        for g in self.heads:
            older = best(dict(enumerate(seen[g].tolist())), list(range(recent)), self.rows - self.tokens + recent)
            self.kept[g] = sorted(older) + list(range(recent, self.tokens))

    def due(self, g: int, p: int) -> float:
        since, mri = self.t - self.last[g][p], self.mri[g][p]
        if mri == 0:
            return 0.0
        score = 2 / (1 + 2.718281828459045 ** (since / mri)) + 2 / (1 + 2.718281828459045 ** (mri - 1))
        return float(torch.tensor(score, dtype=torch.float32))

    def see(self, position: int, weights: list[Tensor]) -> None:
        self.t += 1
        for g in self.heads:
            self.last[g][position], self.mri[g][position] = self.t - 1, 0
            for j, p in enumerate(self.kept[g]):
                if float(weights[g][:, j].max()) >= self.method.alpha:
                    self.mri[g][p] = max(self.mri[g][p], self.t - self.last[g][p])
                    self.last[g][p] = self.t
                assert self.last[g][p] <= self.t
            if len(self.kept[g]) > self.rows and self.t % self.window == 0:
                older, newest = self.kept[g][: -self.window], self.kept[g][-self.window :]
                older = sorted(older, key=lambda p: (-self.due(g, p), -p))[: self.rows - self.window]
                self.kept[g] = sorted(older) + newest
            assert len(self.kept[g]) <= self.most


class NaiveTree(Naive):
    turn = 0

    def __init__(self, method: Any, attention: Tensor, rows: int) -> None:
        self.sinks = min(method.sinks, rows // 2)
        self.recent = rows // 2 - self.sinks
        super().__init__(method, attention, rows)

    def start(self, attention: Tensor) -> None:
        window = attention[:, :, -min(self.method.block, self.tokens) :].mean((1, 2))
        self.sums = [dict(enumerate(row.tolist())) for row in window]
        self.times = [dict.fromkeys(range(self.tokens), 1) for _ in self.heads]

    def cut(self, attention: Tensor) -> None:
        """Block by block, as if blocks were decoded tokens."""
        window = attention[:, :, -min(self.method.block, self.tokens) :].mean((1, 2))
        size = max(1, min(self.method.block, (self.rows - self.sinks - self.recent) // 2))
        leave = self.tokens - self.rows
        blocks = [list(range(p, p + size)) for p in range(self.sinks, self.tokens - self.recent, size)]
        blocks = [b for b in blocks if b[-1] < self.tokens - self.recent]
        room = len(blocks) - ceil(leave / size)
        for g in self.heads:
            held: list[list[int]] = []
            turn, to_leave, spared = 0, leave, []
            for block in blocks:
                held.append(block)
                if len(held) > room:
                    pair = held[turn : turn + 2]
                    loser = min(reversed(pair), key=lambda b: sum(float(window[g, p]) for p in b))
                    held.remove(loser)
                    order = sorted(loser, key=lambda p: float(window[g, p]))
                    spared += order[to_leave:]
                    to_leave -= size
                    turn = (turn + 1) % room
            ends = [*range(self.sinks), *range(blocks[-1][-1] + 1, self.tokens)]
            self.kept[g] = sorted(ends + spared + [p for b in held for p in b])
            self.turn = turn * size

    def see(self, position: int, weights: list[Tensor]) -> None:
        for g in self.heads:
            self.sums[g][position], self.times[g][position] = 0.0, 0
            for j, p in enumerate(self.kept[g]):
                self.sums[g][p] += float(weights[g][:, j].mean())
                self.times[g][p] += 1
        if len(self.kept[0]) > self.rows:
            for g in self.heads:
                left, right = self.kept[g][self.sinks + self.turn : self.sinks + self.turn + 2]
                assert right not in self.kept[g][len(self.kept[g]) - self.recent :]
                mean = {p: self.sums[g][p] / self.times[g][p] for p in (left, right)}
                self.kept[g].remove(left if mean[left] < mean[right] else right)
            self.turn = (self.turn + 1) % (self.rows - self.sinks - self.recent)


NAIVE = {
    "h2o": NaiveH2O,
    "tova": NaiveTOVA,
    "streamingllm": NaiveStreaming,
    "lazyeviction": NaiveLazy,
    "treekv": NaiveTree,
}


def turned(x: Tensor, by: Tensor, network: Network) -> Tensor:
    """Rows moved by some positions, written out: each pair of dimensions is a complex number."""
    half = network.dim // 2
    cos, sin = network.rope(by.abs())
    angle = torch.complex(cos[:, :half], sin[:, :half] * by.sign()[:, None])
    z = torch.complex(x[..., :half], x[..., half:]) * angle
    return torch.cat([z.real, z.imag], -1)


class Watcher:
    """Keeps each token's key by position, and asks the naive methods what stays; nothing of it is the method's."""

    def __init__(self, seen: Seen, method: Method, rows: int) -> None:
        network = seen.network
        self.network, self.contiguous = network, method.positions is Positions.contiguous
        self.keys = [dict(enumerate(x.key.transpose(0, 1))) for x in seen.layers]
        self.naive: list[Naive] = []
        for x, query in zip(seen.layers, seen.statistics[Queries()], strict=True):
            tokens = x.key.shape[1]
            mask = causal_mask(tokens, tokens, x.key.device)
            weights = attention_weights(query, x.key, network.dim**-0.5, mask)
            self.naive.append(
                NAIVE[plugins.name_of(method)](method, weights.unflatten(0, (network.kv_heads, -1)), rows)
            )

    def __call__(self, event: Event) -> None:
        naive, keys, position = self.naive[event.layer], self.keys[event.layer], event.seen - 1
        keys[position] = event.key[:, -1]
        weights = []
        for g, query in enumerate(event.query.unflatten(0, (self.network.kv_heads, -1))):
            naive.kept[g].append(position)
            kept = torch.tensor(naive.kept[g])
            rows = torch.stack([keys[p][g] for p in naive.kept[g]])
            if self.contiguous:
                slot = torch.arange(len(kept))
                rows = turned(rows, slot - kept, self.network)
                query = turned(query, slot[-1:] - kept[-1:], self.network)
            weights.append((query[:, 0] @ rows.mT * event.scale).softmax(-1))
        naive.see(position, weights)


@torch.inference_mode()
def follow_naively(seen: Seen, method: Method, rows: int, steps: int) -> Fork:
    """Decodes, and compares what is kept after the context and after each token."""
    network = seen.network
    fork = fork_of(seen, method, room(network, method, rows), hold_positions=True)
    watcher = Watcher(seen, method, rows)
    fork.observer = watcher
    for i in range(steps + 1):
        for layer, naive in zip(fork.layers, watcher.naive, strict=True):
            position = layer._positions()
            assert position is not None
            assert position.tolist() == naive.kept, f"step {i}"
        feed(network, [fork], ids_of(network, 1, seed=100 + i)[None])
    return fork


@ROLLING
@pytest.mark.parametrize("rows", [1, 5, 13, 24, 39])
def test_keeps_what_a_naive_one_keeps(network: Network, method: Method, rows: int) -> None:
    follow_naively(see(network, method), method, rows, steps=45)


@ROLLING
@pytest.mark.parametrize("tokens", [3, 29])
def test_short_contexts_grow_up_to_the_budget(network: Network, method: Method, tokens: int) -> None:
    follow_naively(see(network, method, tokens), method, 12, steps=20)


# -- what holds for each of them ---------------------------------------------------------------------------------------


@ROLLING
@torch.inference_mode()
def test_the_budget_holds_at_every_step(network: Network, method: Method) -> None:
    """In bytes measured on storages, and filled: to within a row at some step, or to what the window leaves."""
    seen = see(network, method)
    with pytest.raises(Infeasible) as refused:
        method.plan(seen, Allowance(1))
    assert refused.value.smallest == room(network, method, 1).limit
    full = network.row_bytes() * TOKENS
    for limit in (refused.value.smallest, *(int(share * full) for share in (0.1, 0.25, 0.5, 1))):
        fork = fork_of(seen, method, Allowance(limit))
        start = sum(layer.held for layer in fork.layers)
        feed(network, [fork], ids_of(network, 30, seed=2)[None])
        assert max(start, *fork.usage.held) <= limit
        assert max(fork.usage.held) > limit - room(network, method, 1).limit
        assert fork.usage.read == fork.usage.held


@ROLLING
@torch.inference_mode()
def test_room_for_all_is_the_full_cache(network: Network, method: Method) -> None:
    seen = see(network, method)
    ids = ids_of(network, 12, seed=2)[None]
    expected = feed(network, [fork_of(seen, plugins.build_method("full"), Allowance(10**9))], ids)
    enough = room(network, method, TOKENS + 12 + getattr(method, "window", 0))
    found = feed(network, [fork_of(seen, method, enough)], ids)
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=0)
    less = feed(network, [fork_of(seen, method, room(network, method, TOKENS // 2))], ids)
    assert not torch.allclose(less, expected, atol=1e-2)


@ROLLING
@pytest.mark.parametrize("rows", [3, 20])
def test_forks_turns_and_batches(network: Network, method: Method, rows: int) -> None:
    seen = see(network, method)
    caches = [CompressedCache.pack(method.plan(seen, room(network, method, n)), seen) for n in (rows, 30)]
    checks.forks_never_see_each_other(network, caches[0], method)
    checks.block_equals_single(network, caches[0], method)
    checks.batch_equals_solo(network, caches, method)


@ROLLING
@torch.inference_mode()
def test_a_frozen_fork_goes_on(network: Network, method: Method) -> None:
    fork = fork_of(see(network, method), method, room(network, method, 20))
    feed(network, [fork], ids_of(network, 7, seed=2)[None])
    again = Fork(fork.freeze(), method)
    new = ids_of(network, 15, seed=3)[None]
    torch.testing.assert_close(feed(network, [again], new), feed(network, [fork], new), atol=5e-5, rtol=0)


@ROLLING
@torch.inference_mode()
def test_a_step_never_waits_for_the_device(network: Network, method: Method) -> None:
    """It runs on the meta device, whose tensors have no values to wait for."""
    fork = fork_of(see(network, method), method, room(network, method, 20), hold_positions=True)
    events: list[Event] = []
    fork.observer = events.append
    states = []
    for i in range(12):
        states.append(fork.layers[0].state)
        feed(network, [fork], ids_of(network, 1, seed=i)[None])
    kept = []
    for state, event in zip(states, events[:: network.layers], strict=True):
        assert event.position is not None
        there = {name: getattr(event, name).to("meta") for name in ("query", "key", "value", "position")}
        _, edit = method.step(_to_meta(state), replace(event, **there))
        if isinstance(edit, Keep):
            assert edit.slots.is_meta
            kept.append(edit.slots.shape)
    assert kept


def _to_meta(state: Any) -> Any:
    if isinstance(state, tuple):
        return tuple(map(_to_meta, state))
    return state.to("meta") if isinstance(state, Tensor) else state


@pytest.mark.parametrize("method", [VARIANTS[3], VARIANTS[5]], ids=["streamingllm", "treekv"])
@torch.inference_mode()
def test_positions_may_outgrow_two_bytes_while_decoding(method: Method) -> None:
    """A model that reads more than 65,536 tokens: the room for wider positions is left from the start."""
    far = tiny_network(max_position_embeddings=2**17)
    seen = see(far, method)
    limit = 20 * (far.row_bytes() + (EXTRA[plugins.name_of(method)] or 2) * far.layers * far.kv_heads)
    cache = CompressedCache.pack(method.plan(seen, Allowance(limit)), seen)
    fork = Fork(replace(cache, token_ids=torch.zeros(2**16 - 4, dtype=torch.long), next_position=2**16 - 4), method)
    before = sum(layer.held for layer in fork.layers)
    feed(far, [fork], ids_of(far, 8, seed=2)[None])
    assert max(before, fork.usage.held[0]) < fork.usage.held[-1] <= limit
    position = fork.layers[0].packed.slabs[0].position
    assert position is not None
    assert position.dtype == torch.int32


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["h2o", "tova", "streamingllm"])
def test_by_default_nothing_happens_while_decoding(network: Network, name: str) -> None:
    """The option is no part of the identity at its default, and the plan has no state and no positions."""
    method = plugins.build_method(name)
    assert options(method) == {}
    assert not method.steps
    assert options(build(name)) == {"decode": True}
    for layer in method.plan(see(network, method), Allowance(network.row_bytes() * 20)).layers:
        assert layer.state is None
        assert not layer.hold_positions


@pytest.mark.parametrize(("name", "given"), [("lazyeviction", {"window": 0}), ("treekv", {"block": 0})])
def test_options_that_make_no_sense_are_refused(name: str, given: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        plugins.build_method(name, **given)


# -- positions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "given"), [("streamingllm", {}), ("streamingllm", {"decode": True}), ("treekv", {"block": 4})], ids=str
)
@torch.inference_mode()
def test_contiguous_positions_are_those_of_a_reading_of_the_kept_tokens_alone(
    network: Network, name: str, given: dict[str, Any]
) -> None:
    """The newest token's attention in the first layer, whose keys depend on nothing but their tokens."""
    method = plugins.build_method(name, positions=Positions.contiguous, **given)
    seen = see(network, method)
    fork = fork_of(seen, method, room(network, method, 20))
    events: list[Event] = []
    fork.observer = events.append
    new = ids_of(network, 9, seed=2)
    feed(network, [fork], new[None, :8])
    del events[:]
    feed(network, [fork], new[None, 8:])
    event = events[0]
    assert event.position is not None
    every = torch.cat([seen.token_ids, new])
    found = event.weights()[:, 0].unflatten(0, (network.kv_heads, -1))
    assert event.slots == (21 if fork.one_by_one else 29)
    for g, position in enumerate(event.position):
        alone = read_exactly(network, every[position], {Queries()})
        query = alone.statistics[Queries()][0][:, -1:].unflatten(0, (network.kv_heads, -1))[g]
        expected = attention_weights(query, alone.layers[0].key[g : g + 1], event.scale, None)[:, 0]
        torch.testing.assert_close(found[g], expected, atol=5e-5, rtol=0)
    original: Any = replace(method, positions=Positions.original)
    mine, other = (feed(network, [fork_of(seen, m, room(network, m, 20))], new[None]) for m in (method, original))
    assert not torch.allclose(mine, other, atol=1e-2)


@torch.inference_mode()
def test_contiguous_positions_without_rolling(network: Network) -> None:
    method = plugins.build_method("streamingllm", positions=Positions.contiguous)
    seen = see(network, method)
    cache = CompressedCache.pack(method.plan(seen, room(network, method, 20)), seen)
    assert cache.nbytes == 20 * (network.row_bytes() + 2 * network.layers)  # positions once for the heads of a layer
    checks.forks_never_see_each_other(network, cache, method)
    checks.block_equals_single(network, cache, method)
    checks.batch_equals_solo(network, [cache, cache], method)


# -- scripted attention ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scripted(Event):
    """One KV head, one query head, attention as told."""

    attention: tuple[float, ...] = ()

    def weights(self) -> Tensor:
        return torch.tensor(self.attention)[None, None]


def scripted(position: list[int], attention: list[float]) -> Scripted:
    rows = torch.zeros(1, len(position), 2)
    where, seen = torch.tensor([position]), position[-1] + 1
    packed = PackedLayer((), None, rows[:, :0])
    new = torch.zeros(1, dtype=torch.long)
    return Scripted(
        0, rows[:, :1], rows, rows, where, new, 0, seen, 1.0, None, lambda x: (x, x), packed, tuple(attention)
    )


def moved(position: list[int], edit: Any) -> list[int]:
    return position if edit is None else [position[i] for i in edit.slots[0].tolist()]


def test_lazyeviction_keeps_what_recurs() -> None:
    """Tokens that are active every 1, 2, 3 steps have that as their interval and stay; those active once leave."""
    method: Any = plugins.build_method("lazyeviction", window=6, alpha=0.5)
    period = [1, 2, 3, 3, 2, 1]
    position = list(range(12))
    state: Any = (torch.zeros(2, 1, 12, dtype=torch.int16), 0, 17)  # keeps 12, has 17
    lengths = []
    for t in range(1, 13):
        position = [*position, 11 + t]
        active = [(p < 6 and t % period[p] == 0) or (6 <= p < 12 and t == 3) for p in position]
        before = state[0][1]
        state, edit = method.step(state, scripted(position, [float(a) for a in active]))
        position = moved(position, edit)
        lengths.append(len(position))
        last, longest = state[0]
        assert (last <= t).all()
        if edit is None:
            assert (longest[:, :-1] >= before).all()
        assert position[-6:] == list(range(6 + t, 12 + t))
    assert lengths == [13, 14, 15, 16, 17, 12] * 2
    assert position == [*range(6), *range(18, 24)]
    assert state[0][1, 0, :6].tolist() == period


def test_lazyeviction_counts_further_than_int16() -> None:
    """Counters of two bytes hold 65,535 steps."""
    method: Any = plugins.build_method("lazyeviction", window=5, alpha=0.5)
    state: Any = (torch.zeros(2, 1, 2, dtype=torch.int16), 40_000, 30)
    state, _ = method.step(state, scripted([0, 1, 2], [1.0, 0.0, 1.0]))
    assert (state[0].long() & 0xFFFF).tolist() == [[[40_001, 0, 40_001]], [[40_001, 0, 1]]]


def test_treekv_thins_out_by_half_from_sweep_to_sweep() -> None:
    """Where the older one always wins, what is kept depends on nothing else: half as many at each doubled distance."""
    method: Any = plugins.build_method("treekv")
    rows, tokens = 64, 64
    position = list(range(tokens))
    sums = torch.tensor([[1 / (1 + p) for p in position]])
    state: Any = (sums, 0, rows, tokens)
    for t in range(tokens, tokens + 32 * 16):
        position = [*position, t]
        state, edit = method.step(state, scripted(position, [1 / (1 + p) for p in position]))
        before, position = position, moved(position, edit)
        assert len(position) == rows
        assert position[:4] == [0, 1, 2, 3]
        assert position[-28:] == list(range(t - 27, t + 1))
        assert len(set(before) - set(position)) == 1
    assert state[1] == 0  # a whole sweep has ended
    gaps = [b - a for a, b in pairwise(position[4:37])]
    assert gaps == sorted(gaps, reverse=True)
    assert list(Counter(gaps).items())[::-1][:4] == [(2, 16), (4, 8), (8, 4), (16, 2)]


# -- parts -------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 2**31))
def test_blocks_that_lose_are_those_of_a_pointer_that_walks(more: int, keep: int, seed: int) -> None:
    """Sweep by sweep, or one block after the other: the same blocks leave in the same order."""
    scores = torch.randint(0, 9, (3, keep + more), generator=torch.Generator().manual_seed(seed)).float()
    for row, found in zip(scores.tolist(), compete(scores, keep).tolist(), strict=True):
        held, turn, lost = [], 0, []
        for block in range(keep + more):
            held.append(block)
            if len(held) > keep:
                left, right = held[turn : turn + 2]
                lost.append(left if row[left] < row[right] else right)
                held.remove(lost[-1])
                turn = (turn + 1) % keep
        assert found == lost


@given(st.lists(st.integers(0, 8), min_size=1, max_size=4))
def test_all_slots_but_one(gone: list[int]) -> None:
    found = without(torch.tensor(gone)[:, None], 9).tolist()
    assert found == [[i for i in range(9) if i != slot] for slot in gone]
