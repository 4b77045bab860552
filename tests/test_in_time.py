"""What the core does for methods that act in time: evictions, selections, rows on the host, positions, usage."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import checks
import pytest
import torch
from conftest import ids_of, tiny_network
from torch import Tensor

from kvbench.budget import Allowance
from kvbench.cache.attention import oracle_attention
from kvbench.cache.fork import Edit, Event, Fork, Keep, Selection
from kvbench.cache.hf import Network
from kvbench.cache.packed import CompressedCache
from kvbench.cache.rope import renumber, rotate, unrotate
from kvbench.decode import feed, follow
from kvbench.method import Axis, Method, Positions
from kvbench.plan import EVICTED, EXACT, HOST, Plan, keep_all
from kvbench.prefill import Seen, read_exactly

TOKENS = 40


@pytest.fixture(scope="module")
def network() -> Network:
    return tiny_network()


@torch.inference_mode()
def pack(network: Network, method: Method, tokens: int = TOKENS) -> CompressedCache:
    seen = read_exactly(network, ids_of(network, tokens))
    return CompressedCache.pack(method.plan(seen, Allowance(0)), seen)


def with_positions(seen: Seen) -> Plan:
    return Plan(tuple(replace(x, hold_positions=True) for x in keep_all(seen).layers))


@dataclass(frozen=True)
class Window(Method):
    """Sinks and the latest rows, `size` in all: by slots, or by a route over them."""

    steps: ClassVar[bool] = True
    size: int = 20
    by_route: bool = False
    positions: Positions = Positions.original

    def plan(self, seen: Seen, budget: Allowance) -> Plan:
        return with_positions(seen)

    def step(self, state: Any, event: Event) -> tuple[Any, Edit | Keep | None]:
        stay = torch.ones(len(event.key), event.slots, dtype=torch.bool)
        stay[:, 4 : event.slots - self.size + 4] = False
        if self.by_route:
            return state, Edit((EXACT,), torch.where(stay, 0, EVICTED).to(torch.int8))
        slots = stay[0].nonzero()[:, 0]
        return state, Keep(slots.expand(len(stay), -1))


@torch.inference_mode()
def test_keeping_slots_is_the_same_as_routing_them(network: Network) -> None:
    ids = ids_of(network, 9, seed=2)[None]
    forks = [Fork(pack(network, m), m) for m in (Window(), Window(by_route=True))]
    first, second = (feed(network, [fork], ids) for fork in forks)
    torch.testing.assert_close(first, second, atol=5e-5, rtol=0)
    for a, b in zip(forks[0].layers, forks[1].layers, strict=True):
        assert torch.equal(a.packed.dense().key, b.packed.dense().key)
        position = a.packed.dense().position
        assert position is not None
        assert position[0].tolist() == [0, 1, 2, 3, *range(TOKENS + 9 - 16, TOKENS + 9)]
    row, held = network.row_bytes(), forks[0].usage.held
    assert set(held) == {20 * row + 20 * 2 * network.kv_heads * network.layers}  # a position is two bytes
    assert forks[0].usage.read == held
    checks.forks_never_see_each_other(network, pack(network, Window()), Window())


@torch.inference_mode()
def test_contiguous_positions_equal_keys_rotated_by_hand(network: Network) -> None:
    """Slot j of n stands at position j and the query at n - 1, whatever was evicted between."""
    seen = read_exactly(network, ids_of(network, TOKENS)).layers[0]
    kept = torch.tensor([0, 3, 4, 17, 29, TOKENS - 1]).expand(network.kv_heads, -1)
    key = seen.key.take_along_dim(kept[..., None], 1)
    value = seen.value.take_along_dim(kept[..., None], 1)
    bare = unrotate(key, *(x for x in network.rope(kept[0])))
    query = torch.randn(network.heads, 1, network.dim, generator=torch.Generator().manual_seed(0))

    def turned(x: Tensor, position: Tensor) -> Tensor:
        """A rotation written out: each pair of dimensions is a complex number."""
        half = network.dim // 2
        cos, sin = network.rope(position)
        angle = torch.complex(cos[:, :half], sin[:, :half])
        z = torch.complex(x[..., :half], x[..., half:]) * angle
        return torch.cat([z.real, z.imag], -1)

    slots = kept.shape[1]
    by_hand = oracle_attention(
        turned(query, torch.tensor([slots - 1])), turned(bare, torch.arange(slots)), value, 0.3, None
    )
    asked = turned(query, torch.tensor([TOKENS - 1]))
    found = oracle_attention(asked, renumber(key, kept, None, network.rope), value, 0.3, None)
    torch.testing.assert_close(found, by_hand, atol=5e-5, rtol=0)
    assert not torch.allclose(oracle_attention(asked, key, value, 0.3, None), by_hand, atol=1e-3)
    moved = rotate(query, torch.full((network.heads, 1), 7), network.rope)
    torch.testing.assert_close(moved, turned(query, torch.tensor([7])), atol=5e-5, rtol=0)
    read = torch.tensor([True, False, True, True, False, True])[None, None]
    some = read[0, 0]
    chosen = renumber(key, kept, read, network.rope)[:, some]
    torch.testing.assert_close(chosen, renumber(key[:, some], kept[:, some], None, network.rope), atol=5e-5, rtol=0)


@torch.inference_mode()
def test_contiguous_positions_of_all_rows_are_the_original_ones(network: Network) -> None:
    ids = ids_of(network, 6, seed=2)[None]
    every = Window(size=1000, positions=Positions.contiguous)
    full = feed(network, [Fork(pack(network, Method_()), Method_())], ids)
    torch.testing.assert_close(feed(network, [Fork(pack(network, every), every)], ids), full, atol=5e-5, rtol=0)
    rolled = Window(positions=Positions.contiguous)
    assert not torch.allclose(
        feed(network, [Fork(pack(network, rolled), rolled)], ids),
        feed(network, [Fork(pack(network, Window()), Window())], ids),
    )


@dataclass(frozen=True)
class Method_(Method):
    """The full cache."""

    def plan(self, seen: Seen, budget: Allowance) -> Plan:
        return keep_all(seen)


@dataclass(frozen=True)
class Offload(Method):
    """All but the last 8 tokens lie on the host; a token reads every one of them, or the first `few` and the last."""

    axis: ClassVar[Axis] = Axis.DEVICE
    selects: ClassVar[bool] = True
    few: int = 0
    turning: bool = False

    def plan(self, seen: Seen, budget: Allowance) -> Plan:
        layers = []
        for x in keep_all(seen).layers:
            route = x.route.clone()
            route[:, : TOKENS - 8] = 1
            layers.append(replace(x, tiers=(EXACT, HOST), route=route, state=(None, 0)))
        return Plan(tuple(layers))

    def select(self, state: Any, event: Event) -> tuple[Any, Selection]:
        fetched, step = state
        if fetched is None or self.turning:
            rows = torch.arange(self.few or TOKENS - 8) + (step % 3 if self.turning else 0)
            fetched = rows.expand(len(event.key), -1)
        return (fetched, step + 1), Selection(fetch=fetched)


@torch.inference_mode()
def test_rows_on_the_host_are_read_as_if_they_were_here(network: Network) -> None:
    ids = ids_of(network, 6, seed=2)[None]
    cache, full = pack(network, Offload()), pack(network, Method_())
    row = network.row_bytes()
    assert (cache.nbytes, cache.offloaded) == (8 * row, (TOKENS - 8) * row)
    fork = Fork(cache, Offload())
    expected = feed(network, [Fork(full, Method_())], ids)
    torch.testing.assert_close(feed(network, [fork], ids), expected, atol=5e-5, rtol=0)
    assert [int(x) for x in fork.usage.moved] == [(TOKENS - 8) * row, 0, 0, 0, 0, 0]
    assert [int(x) for x in fork.usage.read] == [(TOKENS + i) * row for i in range(1, 7)]
    checks.forks_never_see_each_other(network, cache, Offload())
    checks.block_equals_single(network, cache, Offload())
    checks.batch_equals_solo(network, [cache, cache], Offload())


@torch.inference_mode()
def test_only_rows_that_are_not_here_yet_move(network: Network) -> None:
    method = Offload(few=10, turning=True)
    fork = Fork(pack(network, method), method)
    row = network.row_bytes()
    for i in range(4):
        feed(network, [fork], ids_of(network, 1, seed=i)[None])
        fetched, packed = fork.layers[0]._fetched, fork.layers[0].packed
        assert fetched is not None
        assert packed.host is not None
        start = i % 3
        rows = packed.host.layout.pad(packed.host.key["x"])
        assert torch.equal(fetched.key, rows[:, start : start + 10])
    assert [int(x) // row for x in fork.usage.moved] == [10, 1, 1, 2]
    index = 8 * 10 * network.layers  # int64, the same for all heads of a layer
    assert fork.usage.held == tuple(row * (8 + 10 + i + 1) + index for i in range(4))


@dataclass(frozen=True)
class Offloading(Offload):
    """What falls out of a window of 4 goes to the host, too."""

    steps: ClassVar[bool] = True

    def select(self, state: Any, event: Event) -> tuple[Any, Selection]:
        host = event.packed.host
        rows = torch.arange(0 if host is None else host.layout.width)
        return state, Selection(fetch=rows.expand(len(event.key), -1))

    def step(self, state: Any, event: Event) -> tuple[Any, Edit | Keep | None]:
        route = torch.zeros(len(event.key), event.slots - 4, dtype=torch.int8)
        return state, Edit((HOST,), route, keep_tail=4) if event.slots - event.context > 4 else None


@torch.inference_mode()
def test_rows_of_the_tail_move_to_the_host(network: Network) -> None:
    ids = ids_of(network, 9, seed=2)[None]
    fork = Fork(pack(network, Offloading()), Offloading())
    expected = feed(network, [Fork(pack(network, Method_()), Method_())], ids)
    torch.testing.assert_close(feed(network, [fork], ids), expected, atol=5e-5, rtol=0)
    host = fork.layers[0].packed.host
    assert host is not None
    assert host.layout.counts == (TOKENS + 5,) * network.kv_heads
    assert fork.layers[0].tail[0].shape[1] == 4


@dataclass(frozen=True)
class Halves(Method):
    """Query heads read the even or the odd slots, and the newest; half of the heads each."""

    axis: ClassVar[Axis] = Axis.READ
    selects: ClassVar[bool] = True

    def plan(self, seen: Seen, budget: Allowance) -> Plan:
        return keep_all(seen)

    def select(self, state: Any, event: Event) -> tuple[Any, Selection]:
        heads = torch.arange(len(event.query))[:, None, None] % 2
        mask = torch.arange(event.slots) % 2 == heads
        mask[..., -1] = True
        return state, Selection(mask, scanned=5)


@torch.inference_mode()
def test_reads_are_the_union_over_the_query_heads_of_a_group(network: Network) -> None:
    assert network.heads // network.kv_heads == 2
    fork = Fork(pack(network, Halves()), Halves())
    feed(network, [fork], ids_of(network, 2)[None])
    row = network.row_bytes()
    assert [int(x) for x in fork.usage.read] == [(TOKENS + i) * row + 5 * network.layers for i in (1, 2)]


@pytest.mark.parametrize("method", [Method_(), Window(), Offloading()])
@torch.inference_mode()
def test_a_frozen_fork_is_a_context(network: Network, method: Method) -> None:
    """What was fed becomes part of the context, and goes on as the fork would have."""
    fork = Fork(pack(network, method), method)
    feed(network, [fork], ids_of(network, 7, seed=2)[None])
    before = fork.layers[0].length
    frozen = fork.freeze()
    assert fork.layers[0].length == before
    again = Fork(frozen, method)
    assert frozen.next_position == TOKENS + 7
    assert frozen.planned.held == frozen.nbytes
    new = ids_of(network, 5, seed=3)[None]
    torch.testing.assert_close(feed(network, [again], new), feed(network, [fork], new), atol=5e-5, rtol=0)


@torch.inference_mode()
def test_branches_tell_what_they_used(network: Network) -> None:
    """One pass over all branches, or each on a fork of its own: the same bytes, token by token."""
    row, branches = network.row_bytes(), [(5, 6, 7), (9,)]
    fork = Fork(pack(network, Method_()), Method_())
    _, (long, short) = follow(network, fork, ids_of(network, 4, seed=2), branches)
    assert long.usage.held == tuple((TOKENS + 4 + i) * row for i in range(3))
    assert short.usage == long.usage[:1]
    rolling = Fork(pack(network, Window(size=1000)), Window(size=1000))
    _, (alone, _) = follow(network, rolling, ids_of(network, 4, seed=2), branches)
    extra = 2 * network.layers  # positions, once for all heads until the first eviction
    assert len(alone.usage) == 3
    assert alone.usage.held[0] >= long.usage.held[0] + extra


@torch.inference_mode()
def test_an_observer_sees_every_layer(network: Network) -> None:
    fork = Fork(pack(network, Method_()), Method_())
    found: list[Event] = []
    fork.observer = found.append
    feed(network, [fork], ids_of(network, 3)[None])
    assert [event.layer for event in found] == list(range(network.layers))
    for event in found:
        torch.testing.assert_close(event.weights().sum(-1), torch.ones(network.heads, 3))
