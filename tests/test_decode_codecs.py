"""Methods that quantise while they decode, against naive ones; and the codec of 8-bit floating point."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import checks
import pytest
import torch
from conftest import ids_of, tiny_network
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvbench import plugins
from kvbench.budget import Allowance, Budget
from kvbench.cache.codecs.base import Rows
from kvbench.cache.codecs.fp8 import Fp8
from kvbench.cache.fork import Event, Fork
from kvbench.cache.hf import Network
from kvbench.cache.layout import Layout
from kvbench.cache.packed import CompressedCache, PackedLayer, Slab, nbytes
from kvbench.cell import options
from kvbench.decode import feed
from kvbench.errors import UsageError
from kvbench.method import Base, Method
from kvbench.plan import EXACT, Infeasible, Plan, keep_all
from kvbench.prefill import Seen, SeenLayer, read_exactly

TOKENS, NEW = 90, 64
NETWORK = tiny_network()
ROW, LAYERS, KV_HEADS, DIM = NETWORK.row_bytes(), NETWORK.layers, NETWORK.kv_heads, NETWORK.dim


@torch.inference_mode()
def see(method: Method, tokens: int = TOKENS, network: Network = NETWORK, chunk: int = 65536) -> Seen:
    return read_exactly(network, ids_of(network, tokens), method.needs, "c", chunk)


def allow(budget: str, tokens: int, network: Network = NETWORK) -> Allowance:
    return Budget.parse(budget).allow(network.row_bytes() * tokens, tokens)


def fork_of(method: Method, seen: Seen, budget: Allowance, hold_positions: bool = False) -> Fork:
    plan = method.plan(seen, budget)
    if hold_positions:  # for tests that ask which tokens are where
        plan = Plan(tuple(replace(layer, hold_positions=True) for layer in plan.layers))
    return Fork(CompressedCache.pack(plan, seen), method)


@torch.inference_mode()
def follow(fork: Fork, new: int = NEW, network: Network = NETWORK, seed: int = 2) -> Any:
    """Feeds tokens one by one; yields, after each, what every layer showed the method, before its edit."""
    for token in ids_of(network, new, seed=seed):
        events: list[Event] = []
        fork.observer = events.append
        feed(network, [fork], token[None, None])
        yield events


def near(method: Method, seen: Seen, budget: str) -> str:
    """A budget, or the smallest that is feasible."""
    full = seen.network.row_bytes() * len(seen.token_ids)
    try:
        method.plan(seen, Budget.parse(budget).allow(full, len(seen.token_ids)))
    except Infeasible as refused:
        return f"{math.ceil(1e4 * refused.smallest / full) / 1e4:.4f}"
    return budget


def within(fork: Fork, method: Method, budget: str, tokens: int, network: Network = NETWORK) -> list[int]:
    """What is left of the budget at each step; never less than nothing."""
    seen = method.budget_base is Base.seen
    limits = [allow(budget, tokens + (i + 1 if seen else 0), network).limit for i in range(len(fork.usage))]
    left = [limit - used for limit, used in zip(limits, fork.usage.held, strict=True)]
    assert min(left) >= 0
    return left


def slab_of(packed: PackedLayer, name: str) -> Slab | None:
    return next((slab for slab in packed.slabs if slab.tier.name == name), None)


def held_by(packed: PackedLayer, name: str) -> list[dict[int, tuple[Tensor, ...]]]:
    """Of each KV head: what is stored of each position in a tier."""
    slab = slab_of(packed, name)
    if slab is None:
        return [{} for _ in range(KV_HEADS)]
    position = slab.positions()
    assert position is not None
    stored = list(zip(*(x for part in (slab.key, slab.value) for x in part.values()), strict=True))
    ends = [0, *itertools.accumulate(slab.layout.counts)]
    return [dict(zip(position[a:b].tolist(), stored[a:b], strict=True)) for a, b in itertools.pairwise(ends)]


def same(first: PackedLayer, second: PackedLayer) -> bool:
    """Whether two layers hold the same bits."""
    assert [slab.tier.name for slab in first.slabs] == [slab.tier.name for slab in second.slabs]
    pairs = zip(first.tensors(), second.tensors(), strict=True)
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


# -- what all of them promise ------------------------------------------------------------------------------------------

METHODS = [
    plugins.build_method("kivi", decode=True, group=4, residual=8),
    plugins.build_method("kivi", decode=True, group=4, residual=0, bits=2),
    plugins.build_method("mikv", decode=True),
    plugins.build_method("mikv", decode=True, bits=4, base="snapkv"),
    plugins.build_method("arkv", window=8),
    plugins.build_method("arkv", window=8, fp8=False),
]
each = pytest.mark.parametrize("method", METHODS, ids=lambda m: "-".join(map(str, [type(m).__name__, *options(m)])))


@each
@pytest.mark.parametrize(
    ("budget", "tokens", "dtype"),
    [
        ("0.34", TOKENS, torch.float32),
        ("0.93", TOKENS, torch.float32),
        ("0.6", 41, torch.float32),
        ("0.5", TOKENS, torch.bfloat16),
    ],
)
def test_the_budget_holds_at_every_step(method: Method, budget: str, tokens: int, dtype: torch.dtype) -> None:
    network = tiny_network(dtype=dtype)
    seen = see(method, tokens, network)
    budget = near(method, seen, budget)
    fork = fork_of(method, seen, allow(budget, tokens, network))
    for _ in follow(fork, network=network):
        pass
    left = within(fork, method, budget, tokens, network)
    assert len(left) == NEW
    if type(method).__name__ != "KIVI":  # which has a few sizes only
        assert min(left) < 2 * network.row_bytes() + 2 * DIM * KV_HEADS * LAYERS


@each
def test_forks_turns_and_batches(method: Method) -> None:
    seen = see(method)
    caches = [fork_of(method, seen, allow(budget, TOKENS)).freeze() for budget in ("0.5", "0.8")]
    checks.forks_never_see_each_other(NETWORK, caches[0], method)
    checks.block_equals_single(NETWORK, caches[0], method)
    checks.batch_equals_solo(NETWORK, caches, method)
    fork = Fork(caches[0], method)
    before = [layer.packed for layer in fork.layers]
    for _ in follow(fork, checks.NEW):
        pass
    assert all(a is not b.packed for a, b in zip(before, fork.layers, strict=True))  # there was something to see


@each
@torch.inference_mode()
def test_a_frozen_fork_goes_on_as_it_would_have(method: Method) -> None:
    fork = fork_of(method, see(method), allow("0.5", TOKENS))
    feed(NETWORK, [fork], ids_of(NETWORK, 13, seed=2)[None])
    new = ids_of(NETWORK, 20, seed=3)[None]
    again = feed(NETWORK, [Fork(fork.freeze(), method)], new)
    torch.testing.assert_close(again, feed(NETWORK, [fork], new), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["kivi", "mikv"])
def test_without_decode_all_is_as_it_was(name: str) -> None:
    method, decoding = plugins.build_method(name), plugins.build_method(name, decode=True)
    assert plugins.build_method(name, decode=False) == method
    assert options(method) == {}  # so are a cell's identity and its label
    assert options(decoding) == {"decode": True}
    assert (method.steps, decoding.steps) == (False, True)
    seen = see(method)
    plan = method.plan(seen, allow("0.5", TOKENS))
    assert all(layer.state is None and not layer.hold_positions for layer in plan.layers)
    fork = fork_of(method, seen, allow("0.5", TOKENS))
    before = [layer.packed for layer in fork.layers]
    for _ in follow(fork, 20):
        pass
    assert all(layer.packed is packed for layer, packed in zip(fork.layers, before, strict=True))


@pytest.mark.parametrize("name", ["kivi", "mikv"])
@torch.inference_mode()
def test_budget_1_is_the_full_cache_for_good(name: str) -> None:
    method = plugins.build_method(name, decode=True)
    seen, new = see(method), ids_of(NETWORK, NEW, seed=2)[None]
    fork = fork_of(method, seen, allow("1", TOKENS))
    full = Fork(CompressedCache.pack(keep_all(seen), seen), Method())
    torch.testing.assert_close(feed(NETWORK, [fork], new), feed(NETWORK, [full], new), atol=1e-4, rtol=0)
    assert fork.usage.held == tuple(ROW * (TOKENS + i) for i in range(1, NEW + 1))


# -- KIVI --------------------------------------------------------------------------------------------------------------


def kivi_size(tokens: int, bits: int, group: int, residual: int) -> int:
    """The paper's formula, groups of values whole, in float32."""
    keys = tokens - tokens % max(residual, group)
    values = max(tokens - residual, 0) // group * group
    bits_stored = keys * DIM * (bits + 32 / group) + values * (DIM * bits + 32 * math.ceil(DIM / group))
    return LAYERS * KV_HEADS * int(bits_stored / 8 + (2 * tokens - keys - values) * DIM * 4)


@pytest.mark.parametrize(
    ("tokens", "bits", "group", "residual"), [(61, 2, 4, 8), (64, 4, 8, 16), (20, 4, 4, 32), (50, 2, 16, 0)]
)
@torch.inference_mode()
def test_kivi_is_at_every_step_what_it_would_be_had_all_been_context(
    tokens: int, bits: int, group: int, residual: int
) -> None:
    """Bit by bit, on every layer: of the very rows that the model made."""
    method = plugins.build_method("kivi", decode=True, bits=bits, group=group, residual=residual)
    seen = see(method, tokens)
    fork = fork_of(method, seen, Allowance(10**9))
    rows = [(x.key, x.value) for x in seen.layers]
    ids = seen.token_ids
    for n, events in enumerate(follow(fork, 40), tokens + 1):
        due = n % max(residual, group) == 0 or (n > residual and (n - residual) % group == 0)
        assert [e.packed is layer.packed for e, layer in zip(events, fork.layers, strict=True)] == [not due] * LAYERS
        rows = [
            (torch.cat([k, e.key[:, -1:]], 1), torch.cat([v, e.value[:, -1:]], 1))
            for (k, v), e in zip(rows, events, strict=True)
        ]
        ids = torch.cat([ids, fork.token_ids[-1:]])
        layers = tuple(SeenLayer(k, v, torch.arange(n)) for k, v in rows)
        whole = replace(seen, layers=layers, token_ids=ids)
        once = CompressedCache.pack(method.plan(whole, Allowance(10**9)), whole)
        for mine, packed, (key, value) in zip(fork.freeze().layers, once.layers, rows, strict=True):
            assert same(mine, packed)
            dense = mine.dense()
            keys, values = n % max(residual, group), min(residual, n)
            assert torch.equal(dense.key[:, n - keys :], key[:, n - keys :])
            assert torch.equal(dense.value[:, n - values :], value[:, n - values :])
        assert fork.usage.held[-1] == kivi_size(n, bits, group, residual)


@torch.inference_mode()
def test_kivi_in_bfloat16_is_what_it_would_be_up_to_a_rounding() -> None:
    """There a key that is encoded again, with its value, has been rounded to the cache's dtype."""
    network = tiny_network(dtype=torch.bfloat16)
    method = plugins.build_method("kivi", decode=True, bits=4, group=4, residual=8)
    fork = fork_of(method, see(method, 50, network), Allowance(10**9))
    for _ in follow(fork, network=network):
        pass
    whole = read_exactly(network, fork.token_ids)
    once = CompressedCache.pack(method.plan(whole, Allowance(10**9)), whole).layers[0].dense()
    found = fork.freeze().layers[0].dense()
    for a, b, exact in ((found.key, once.key, whole.layers[0].key), (found.value, once.value, whole.layers[0].value)):
        error = (a.float() - b.float()).abs().amax()
        assert error <= 2**-7 * exact.float().abs().amax()
        assert (b - exact).abs().amax() > 2 * error


@pytest.mark.parametrize("share", ["0.38", "0.42", "0.5", "0.8"])
@pytest.mark.parametrize("tokens", [64, 77])
def test_kivi_takes_the_largest_setting_that_lasts(share: str, tokens: int) -> None:
    group, residual = 4, 32
    method = plugins.build_method("kivi", decode=True, group=group, residual=residual)
    plan = method.plan(see(method, tokens), allow(share, tokens))
    every = [(4, residual), *((2, r) for r in range(residual, -1, -group))]

    def lasts(bits: int, left: int) -> bool:
        return all(kivi_size(n, bits, group, left) <= allow(share, n).limit for n in range(tokens, tokens + 1000))

    assert plan.layers[0].state == next(setting for setting in every if lasts(*setting))


def test_kivi_tells_the_smallest_share_that_lasts() -> None:
    method = plugins.build_method("kivi", decode=True, group=4, residual=8)
    seen = see(method)
    with pytest.raises(Infeasible) as refused:
        method.plan(seen, allow("0.01", TOKENS))
    smallest = refused.value.smallest
    assert method.plan(seen, Allowance(smallest)).layers[0].state == (2, 0)
    with pytest.raises(Infeasible):
        method.plan(seen, Allowance(smallest - 1))
    sizes = {n: kivi_size(n, 2, 4, 0) for n in range(TOKENS, TOKENS + 1000)}
    assert max(size * TOKENS / n for n, size in sizes.items()) <= smallest
    assert max(size * TOKENS / n for n, size in sizes.items()) > smallest - 1


# -- MiKV --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("budget", "bits", "base"), [("0.4", 2, "h2o"), ("0.7", 4, "h2o"), ("0.6", 2, "snapkv")])
@torch.inference_mode()
def test_mikv_demotes_whom_a_naive_one_would(budget: str, bits: int, base: str) -> None:
    method = plugins.build_method("mikv", decode=True, bits=bits, base=base)
    seen = see(method)
    fork = fork_of(method, seen, allow(budget, TOKENS), hold_positions=True)
    low = 2 * (DIM * bits // 8 + 4)
    sums: dict[tuple[int, int], dict[int, float]] = {}
    for i, layer in enumerate(fork.layers):
        scores = method.scores(seen, i)
        for head, first in enumerate(held_by(layer.packed, "exact")):
            sums[i, head] = {p: float(scores[head, p]) for p in first}
    demoted = 0
    for n, events in enumerate(follow(fork), TOKENS + 1):
        # The most exact rows that all bytes allow, each with a number of 4 bytes.
        limit = allow(budget, n).limit // LAYERS - 2 * KV_HEADS * DIM
        most = max(m for m in range(n) if KV_HEADS * (m * (8 * DIM + 4) + (n - m) * low) <= limit)
        for event, layer in zip(events, fork.layers, strict=True):
            assert event.position is not None
            held = held_by(layer.packed, "exact")
            tail = layer.length - layer.context
            for head in range(KV_HEADS):
                mine = sums[event.layer, head]
                mine[n - 1] = 0.0
                group = event.query[2 * head : 2 * head + 2, 0]
                attention = (group @ event.key[head].mT * event.scale).softmax(-1).sum(0)
                for slot, position in enumerate(event.position[head].tolist()):
                    if position in mine:
                        mine[position] += float(attention[slot])
                if len(mine) > most:
                    stay = most - most // 16
                    recent = min(method.protect[1], stay // 2)
                    old = sorted(mine)[: len(mine) - recent]
                    for position in sorted(old, key=mine.__getitem__)[: len(mine) - stay]:
                        del mine[position]
                        demoted += 1
                assert set(held[head]) | set(range(n - tail, n)) == set(mine)
                rows = [slab.layout.counts[head] for slab in layer.packed.slabs]
                assert sum(rows) + tail == n  # nobody is left behind
    assert demoted > NEW


@torch.inference_mode()
def test_mikv_never_encodes_a_row_twice() -> None:
    method = plugins.build_method("mikv", decode=True)
    fork = fork_of(method, see(method), allow("0.5", TOKENS), hold_positions=True)
    before = held_by(fork.layers[1].packed, "2-bit")
    start = len(before[0])
    for _ in follow(fork):
        after = held_by(fork.layers[1].packed, "2-bit")
        for old, new in zip(before, after, strict=True):
            assert set(old) <= set(new)
            assert all(torch.equal(a, b) for p in old for a, b in zip(old[p], new[p], strict=True))
        before = after
    assert len(before[0]) > start + NEW / 4


def test_mikv_at_its_smallest_has_no_important_token_ever() -> None:
    method = plugins.build_method("mikv", decode=True)
    seen = see(method)
    with pytest.raises(Infeasible) as refused:
        method.plan(seen, allow("0.01", TOKENS))
    share = f"{math.ceil(1e6 * refused.value.smallest / (ROW * TOKENS)) / 1e6:.6f}"
    fork = fork_of(method, seen, allow(share, TOKENS))
    for n, _ in enumerate(follow(fork, 10), TOKENS + 1):
        for layer in fork.layers:
            assert layer.length == layer.context == n
            assert [slab.tier.name for slab in layer.packed.slabs] == ["2-bit"]
    within(fork, method, share, TOKENS)


def test_mikv_adds_up_attention_only() -> None:
    plugins.build_method("mikv", base="knorm")
    with pytest.raises(UsageError):
        plugins.build_method("mikv", base="knorm", decode=True)


# -- 8-bit floating point ----------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(-40, 40), st.sampled_from([torch.float32, torch.bfloat16]))
@example(1100, 0, torch.bfloat16)  # half a step, to the last bit but one
def test_fp8_errs_by_a_sixteenth_of_each_number(seed: int, exponent: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    spread = 2.0 ** torch.randint(-12, 1, (6, DIM), generator=generator)
    x = (torch.randn(6, DIM, generator=generator) * spread * 2.0**exponent).to(dtype)
    codec, rows = Fp8(), Rows(Layout((4, 2)))
    stored = codec.encode(x, rows, {})
    back = codec.decode(stored, rows, {}, torch.float32)
    x = x.float()
    scale = x.abs().amax(1) / 448
    assert torch.equal(stored["scale"], scale)
    normal = x.abs() >= scale[:, None] * 2**-6
    error = (back - x).abs()
    assert (error[normal] <= x.abs()[normal] * 2**-4 * 1.0001).all()
    assert (error <= (scale[:, None] * 2**-10 * 1.0001).where(~normal, torch.inf)).all()  # half of a subnormal's step
    assert nbytes(stored.values()) == 6 * sum(codec.group_bytes(DIM, dtype))
    assert (back.abs().amax(1) - x.abs().amax(1)).abs().max() <= x.abs().max() * 1e-6  # the largest is exact


def test_fp8_of_nothing_is_nothing() -> None:
    codec, rows = Fp8(), Rows(Layout((2, 0)))
    x = torch.zeros(2, DIM)
    x[1, 3] = 1e-44
    back = codec.decode(codec.encode(x, rows, {}), rows, {}, torch.float32)
    assert back.isfinite().all()
    assert (back[0] == 0).all()


# -- ARKV --------------------------------------------------------------------------------------------------------------


def naive_attention(seen: Seen, layer: int, queries: Tensor, window: int) -> Tensor:
    """(heads, window, tokens before it): of the last queries, written out."""
    tokens = len(seen.token_ids)
    found = torch.zeros(len(queries), window, tokens - window, dtype=torch.float64)
    for head in range(len(queries)):
        key = seen.layers[layer].key[head * KV_HEADS // len(queries)].double()
        for i in range(window):
            end = tokens - window + i + 1
            weights = (queries[head, i].double() @ key[:end].mT / DIM**0.5).softmax(-1)
            found[head, i] = weights[: tokens - window]
    return found


@pytest.mark.parametrize("chunk", [65536, 50])
@torch.inference_mode()
def test_arkv_shares_and_scores_are_the_formulas(chunk: int) -> None:
    window = 8
    method = plugins.build_method("arkv", window=window)
    seen = see(method, chunk=chunk)
    fork = Fork(CompressedCache.pack(keep_all(see(method, TOKENS - window)), see(method, TOKENS - window)), Method())
    queries: dict[int, list[Tensor]] = {i: [] for i in range(LAYERS)}
    fork.observer = lambda event: queries[event.layer].append(event.query)
    feed(NETWORK, [fork], seen.token_ids[None, -window:])
    wanted = []
    for layer in range(LAYERS):
        a = naive_attention(seen, layer, torch.cat(queries[layer], 1), window)
        entropy = variance = kurtosis = 0.0
        scores = torch.zeros(len(a), TOKENS - window, dtype=torch.float64)
        for head in range(len(a)):
            for token in range(TOKENS - window):
                x = a[head, :, token]
                mean = float(x.mean())
                second = sum((float(y) - mean) ** 2 for y in x)
                fourth = sum((float(y) - mean) ** 4 for y in x) / window
                entropy -= sum(float(y) * math.log(float(y)) for y in x if y > 0)
                variance += second / (window - 1)
                kurtosis += fourth / max(second / window, 1e-8) ** 2
                scores[head, token] = mean + method.gamma * second / (window - 1)
        wanted.append(entropy ** (1 / method.tau1) * variance ** (1 / method.tau2) * kurtosis ** (1 / method.tau3))
        padded = torch.nn.functional.pad(scores, (2, 2))
        pooled = torch.stack([padded[:, i : i + 5].mean(1) for i in range(TOKENS - window)], 1)
        expected = pooled.unflatten(0, (KV_HEADS, -1)).mean(1)
        found = method.scores(seen, layer)[:, : TOKENS - window]
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-3)
        statistic = next(s for s in method.needs if type(s).__name__ == "WindowKurtosis")
        torch.testing.assert_close(float(seen.statistics[statistic][layer]), kurtosis, rtol=1e-3, atol=0)
    shares = method._shares(seen)
    torch.testing.assert_close(shares, [x / max(wanted) for x in wanted], rtol=1e-4, atol=0)
    assert max(shares) == 1
    assert min(shares) < 0.99


def arkv_rows(packed: PackedLayer, tail: int, first: int) -> list[dict[int, str]]:
    """Of each KV head: the tier of each position, the tail's (from `first` on) among them."""
    exact, fp8 = held_by(packed, "exact"), held_by(packed, "fp8")
    mine = range(first, first + tail)
    return [
        dict.fromkeys(a, "exact") | dict.fromkeys(b, "fp8") | dict.fromkeys(mine, "exact")
        for a, b in zip(exact, fp8, strict=True)
    ]


@pytest.mark.parametrize(("budget", "window", "tau2"), [("0.4", 8, 5.407), ("0.7", 8, 0.2), ("0.25", 4, 0.5)])
@pytest.mark.parametrize("fp8", [True, False])
@torch.inference_mode()
def test_arkv_holds_what_a_naive_one_would(budget: str, window: int, tau2: float, fp8: bool) -> None:
    method = plugins.build_method("arkv", window=window, tau2=tau2, fp8=fp8)  # a small tau2: shares that differ
    seen = see(method)
    full, less, place = 8 * DIM, 2 * (DIM + 4), 2
    limit = allow(budget, TOKENS).limit // LAYERS
    capacity = limit // (KV_HEADS * (full + place))
    fork = fork_of(method, seen, allow(budget, TOKENS))
    shares = method._shares(seen)
    naive = []
    for i, layer in enumerate(fork.layers):
        scores = method.scores(seen, i)
        found = arkv_rows(layer.packed, 0, TOKENS)
        for head, mine in enumerate(found):
            best = sorted(range(TOKENS - window), key=lambda p: -float(scores[head, p]))[: capacity - window]
            assert mine == dict.fromkeys([*best, *range(TOKENS - window, TOKENS)], "exact")
        naive.append(found)
    bursts = [0] * LAYERS
    since = [TOKENS] * LAYERS  # where the tail starts
    counts: list[dict[str, int]] = []
    for n, events in enumerate(follow(fork, 80), TOKENS + 1):
        for i, (event, layer) in enumerate(zip(events, fork.layers, strict=True)):
            for mine in naive[i]:
                mine[n - 1] = "exact"
            exact = sum(tier == "exact" for mine in naive[i] for tier in mine.values())
            packed_exact = exact - KV_HEADS * (n - since[i])
            quantised = sum(map(len, naive[i])) - exact
            held = exact * full + quantised * less + (packed_exact + quantised) * place
            if held > limit:
                bursts[i] += 1
                since[i] = n
                past = len(naive[i][0]) - window
                keep = int(0.75 * past)
                original = min(round(shares[i] * (capacity - window)), min(capacity, TOKENS) - window) - window
                original = min(max(original, 0), keep) if fp8 else keep
                assert event.position is not None
                for head, mine in enumerate(naive[i]):
                    slots = {p: s for s, p in enumerate(event.position[head].tolist())}
                    group = event.query[2 * head : 2 * head + 2, 0]
                    attention = (group @ event.key[head].mT * event.scale).softmax(-1).mean(0)
                    order = sorted(mine)
                    padded = [0.0, 0.0, *(float(attention[slots[p]]) for p in order[:past]), 0.0, 0.0]
                    pooled = {p: sum(padded[j : j + 5]) / 5 for j, p in enumerate(order[:past])}
                    ranked = sorted(pooled, key=pooled.__getitem__, reverse=True)
                    now = arkv_rows(layer.packed, 0, n)[head]
                    assert [now.pop(p) for p in order[past:]] == ["exact"] * window
                    tiers = [[p for p in pooled if now.get(p) == tier] for tier in ("exact", "fp8", None)]
                    assert [len(tier) for tier in tiers] == [original, keep - original, past - keep]
                    for tier, end in zip(tiers, (original, keep, past), strict=True):
                        for p in tier:  # as good as whom the ranking puts last in the tier: equals may change places
                            assert pooled[p] >= pooled[ranked[end - 1]] * (1 - 1e-5)
                    naive[i][head] = now | dict.fromkeys(order[past:], "exact")
                counts.append({t: list(naive[i][0].values()).count(t) for t in ("exact", "fp8")})
            assert arkv_rows(layer.packed, layer.length - layer.context, since[i]) == naive[i]
    assert min(bursts) >= 3
    assert any(count["fp8"] for count in counts) == fp8
    within(fork, method, budget, TOKENS)


@torch.inference_mode()
def test_arkv_reads_its_quantised_rows_and_lets_their_bits_be() -> None:
    method = plugins.build_method("arkv", window=8, tau3=0.5)
    fork = fork_of(method, see(method), allow("0.5", TOKENS))
    exact: list[dict[int, Tensor]] = [{} for _ in range(KV_HEADS)]
    stayed = moved = 0
    layer = min(range(LAYERS), key=lambda i: fork.layers[i].state[1])  # with the fewest originals
    before = held_by(fork.layers[layer].packed, "fp8")
    for events in follow(fork, 80):
        event = events[layer]
        assert event.position is not None
        weights = event.weights()[:, 0].unflatten(0, (KV_HEADS, -1)).sum(1)
        for head in range(KV_HEADS):
            slots = {p: s for s, p in enumerate(event.position[head].tolist())}
            for position, slot in slots.items():
                exact[head].setdefault(position, event.key[head, slot].clone())
            for position in before[head]:  # quantised at an earlier step, attended at this one
                row = exact[head][position]
                error = (event.key[head, slots[position]] - row).abs()
                assert (error <= row.abs() * 2**-4 + row.abs().max() / 448 * 2**-10).all()
                assert weights[head, slots[position]] > 0
        after = held_by(fork.layers[layer].packed, "fp8")
        for old, new in zip(before, after, strict=True):
            for position in old.keys() & new.keys():
                stayed += 1
                assert all(torch.equal(a, b) for a, b in zip(old[position], new[position], strict=True))
            moved += len(new.keys() - old.keys())
        before = after
    assert stayed > 100
    assert moved > 10


@torch.inference_mode()
def test_arkv_with_room_for_all_is_the_full_cache() -> None:
    method = plugins.build_method("arkv")
    seen, new = see(method), ids_of(NETWORK, NEW, seed=2)[None]
    place = 2 * KV_HEADS * LAYERS
    fork = fork_of(method, seen, Allowance((ROW + place) * (TOKENS + NEW)))
    full = Fork(CompressedCache.pack(keep_all(seen), seen), Method())
    torch.testing.assert_close(feed(NETWORK, [fork], new), feed(NETWORK, [full], new), atol=1e-4, rtol=0)
    short = fork_of(method, seen, Allowance((ROW + place) * (TOKENS + NEW - 10)))
    assert not torch.allclose(feed(NETWORK, [short], new), feed(NETWORK, [full.fork()], new), atol=1e-2)


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_arkv_works_with_hardly_any_rows(rows: int) -> None:
    method = plugins.build_method("arkv")
    limit = (ROW + 2 * KV_HEADS * LAYERS) * rows
    fork = fork_of(method, see(method), Allowance(limit))
    for events in follow(fork, 30):
        assert all(event.slots <= 2 * rows + 1 for event in events)
    assert max(fork.usage.held) <= limit
    assert min(layer.length for layer in fork.layers) >= 1
    with pytest.raises(Infeasible) as refused:
        fork_of(method, see(method), Allowance(1))
    assert refused.value.smallest == ROW + 2 * KV_HEADS * LAYERS


@pytest.mark.parametrize("options", [{"window": 1}, {"tau2": 0}])
def test_arkv_refuses_options_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        plugins.build_method("arkv", **options)


def test_arkv_in_a_context_that_is_all_window_holds_it() -> None:
    method = plugins.build_method("arkv")
    seen = see(method, 20)
    assert method._shares(seen) == [1.0] * LAYERS
    cache = fork_of(method, seen, allow("0.9", 20)).layers[0].packed
    assert [slab.tier for slab in cache.slabs] == [EXACT]
