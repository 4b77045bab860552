"""The fast path: what each codec makes of queries and weights, heads with different rows, and what is kept beside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import ids_of, tiny_network
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kvbench import plugins
from kvbench.budget import Budget
from kvbench.cache.attention import Ready, oracle_attention, tiered_attention
from kvbench.cache.codecs.balanced import Balanced
from kvbench.cache.codecs.base import Codec, Context, Rows
from kvbench.cache.codecs.channels import Channels
from kvbench.cache.codecs.exact import Exact
from kvbench.cache.codecs.fp8 import Fp8
from kvbench.cache.codecs.from_key import FromKey
from kvbench.cache.codecs.low_rank import LowRank
from kvbench.cache.codecs.quant import Quant
from kvbench.cache.codecs.rotated import Rotated, lloyd_max, random_rotation
from kvbench.cache.codecs.sparse import Sparse
from kvbench.cache.codecs.standardised import Standardised
from kvbench.cache.fork import Fork
from kvbench.cache.layout import Layout
from kvbench.cache.packed import CompressedCache, PackedLayer, Slab
from kvbench.decode import feed
from kvbench.method import Method
from kvbench.plan import EXACT, Tier
from kvbench.prefill import read_exactly

NETWORK = tiny_network()
DIM, KV_HEADS, TOKENS = NETWORK.dim, NETWORK.kv_heads, 120
EMBEDDINGS = NETWORK.embeddings.detach()
IDS = ids_of(NETWORK, TOKENS)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotated(bits: int) -> Rotated:
    return Rotated(bits, random_rotation(DIM, 0), lloyd_max(bits, DIM))


def low_rank(rope: bool) -> LowRank:
    basis = torch.linalg.qr(random(1, KV_HEADS * DIM, KV_HEADS * DIM)).Q[:, :, : KV_HEADS * 5].clone()
    return LowRank(basis, 5, NETWORK.rope if rope else None)


def from_key(tokens: bool = True, all_heads: bool = False) -> FromKey:
    features = DIM * (KV_HEADS if all_heads else 1) + 64 * tokens
    weight, bias = random(KV_HEADS, features, DIM).bfloat16(), random(KV_HEADS, DIM, seed=1).bfloat16()
    return FromKey(weight, bias, NETWORK.rope, EMBEDDINGS if tokens else None, True, all_heads)


QUANTS = st.builds(
    Quant, bits=st.sampled_from([1, 2, 3, 4, 8]), channels=st.sampled_from([0, 8]), tokens=st.sampled_from([1, 4, 8])
)
ANY_ROWS = st.one_of(  # codecs that take any rows
    QUANTS,
    st.builds(Balanced, st.builds(Quant, bits=st.sampled_from([2, 4, 8])), st.just(random(KV_HEADS, DIM).exp())),
    st.builds(Standardised, st.builds(Quant, bits=st.sampled_from([2, 4, 8]))),
    st.builds(rotated, st.integers(1, 4)),
    st.sampled_from([Exact(), Fp8(), Sparse(5), Channels(9, random(KV_HEADS, DIM).square()), low_rank(False)]),
)
GROUPS = st.lists(st.integers(0, 6), min_size=KV_HEADS, max_size=KV_HEADS)


def rows_of(counts: list[int], shared: bool, seed: int = 0) -> Rows:
    """Rows of a context of `TOKENS` tokens, at places of their own in every head unless `shared`."""
    draw = torch.Generator().manual_seed(seed)
    each = [torch.randperm(TOKENS, generator=draw)[:n].sort().values for n in counts]
    position = torch.cat([each[0]] * len(counts) if shared else each)
    return Rows(Layout(tuple(counts), shared), position, IDS[position], random(len(position), DIM, seed=seed + 1))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-5 * float(expected.abs().max().clamp(min=1)), rtol=1e-5)


@settings(deadline=None, max_examples=150)
@given(codec=ANY_ROWS, groups=GROUPS, new=st.integers(1, 4), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_dot_and_mix_equal_decode_then_multiply(codec: Codec, groups: list[int], new: int, dtype: torch.dtype) -> None:
    assume(sum(groups))
    shared = isinstance(codec, LowRank)
    counts = [codec.group * n for n in ([max(groups)] * KV_HEADS if shared else groups)]
    rows = rows_of(counts, shared)
    x = random(sum(counts), DIM, seed=3).to(dtype)
    fixed = codec.fit(x, rows)
    stored = codec.encode(x, rows, fixed)
    decoded = rows.layout.pad(codec.decode(stored, rows, fixed, torch.float32))
    query, weights = random(KV_HEADS, new, DIM, seed=4), random(KV_HEADS, new, max(counts), seed=5)
    weights = weights * rows.layout.mask(x.device)[:, None]
    real = rows.layout.mask(x.device)[:, None]
    close(codec.dot(query, stored, rows, fixed) * real, query @ decoded.mT * real)
    close(codec.mix(weights, stored, rows, fixed), weights @ decoded)


@pytest.mark.parametrize(("tokens", "all_heads"), [(True, False), (False, False), (True, True), (False, True)])
@settings(deadline=None, max_examples=20)
@given(groups=GROUPS, new=st.integers(1, 4), kept=st.booleans())
def test_estimated_values_are_mixed_without_being_built(
    tokens: bool, all_heads: bool, groups: list[int], new: int, kept: bool
) -> None:
    assume(sum(groups))
    codec = from_key(tokens, all_heads)
    counts = [max(groups)] * KV_HEADS if all_heads else groups
    rows = rows_of(counts, all_heads)
    assert rows.position is not None
    x = random(sum(counts), DIM, seed=3)
    fixed = codec.fit(x, rows)
    weights = random(KV_HEADS, new, max(counts)) * rows.layout.mask(x.device)[:, None]
    explicit = weights @ rows.layout.pad(codec.decode({}, rows, fixed, torch.float32))
    if kept:  # as in a fork: no tokens row by row, but tables of the context
        rows = Rows(rows.layout, rows.position.int(), None, rows.key, Context(IDS, TOKENS))
    for _ in range(2):
        close(codec.mix(weights, {}, rows, fixed), explicit)


@settings(deadline=None, max_examples=60)
@given(
    codec=st.one_of(ANY_ROWS, st.sampled_from([from_key(), from_key(False)])),
    groups=GROUPS,
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_squared_errors_are_those_of_rows_that_come_back(codec: Codec, groups: list[int], dtype: torch.dtype) -> None:
    """Those of quantised rows in expectation: their mean over many rows."""
    assume(sum(groups))
    expected = isinstance(codec, Standardised) or (isinstance(codec, Quant) and codec.tokens == 1)
    groups = [max(groups)] * KV_HEADS if isinstance(codec, LowRank) else groups
    layout = Layout(tuple(codec.group * n * (200 if expected else 1) for n in groups), isinstance(codec, LowRank))
    position = torch.randint(TOKENS, (layout.rows,), generator=torch.Generator().manual_seed(0))
    rows = Rows(layout, position, IDS[position], random(layout.rows, DIM, seed=2))
    x = random(layout.rows, DIM, seed=3).to(dtype)
    fixed = codec.fit(x, rows)
    back = codec.decode(codec.encode(x, rows, fixed), rows, fixed, torch.float32)
    found, real = codec.squared_error(x, rows), (back - x.float()).square().sum(-1)
    if expected:
        bits = codec.inner.bits if isinstance(codec, Standardised) else codec.bits  # type: ignore[attr-defined]
        assert float(found.mean()) == pytest.approx(float(real.mean()), rel={1: 0.6, 2: 0.2}.get(bits, 0.1))
    else:
        torch.testing.assert_close(
            found, real, rtol=0.02 if dtype is torch.bfloat16 else 1e-3, atol=0.1 if dtype is torch.bfloat16 else 1e-4
        )


def layer_of(parts: list[tuple[Tier, list[int], bool]], dtype: torch.dtype, multiplicity: bool) -> PackedLayer:
    """A layer with a slab of random rows for every (tier, counts, shared)."""
    slabs = []
    for i, (tier, counts, shared) in enumerate(parts):
        rows = rows_of(counts, shared, seed=i)
        assert rows.position is not None
        key, value = (random(rows.layout.rows, DIM, seed=10 * i + j).to(dtype) for j in (1, 2))
        many = random(rows.layout.rows, seed=i).exp() if multiplicity else None
        slabs.append(Slab.encode(tier, rows.layout, key, value, rows.position, TOKENS, IDS, log_multiplicity=many))
    return PackedLayer(tuple(slabs), IDS, torch.empty(KV_HEADS, 0, DIM, dtype=dtype))


TIERS = st.sampled_from(
    [
        EXACT,
        Tier("int4", Quant(4, 8), Quant(4, 8)),
        Tier("kivi", Quant(2, tokens=8), Quant(2, 8)),
        Tier("keys by group", Quant(4, tokens=4), Exact()),
        Tier("estimated", Exact(), from_key()),
        Tier("estimated from 4 bits", Quant(4), from_key()),
        Tier("turned", rotated(3), rotated(2)),
        Tier("pruned", Channels(9, random(KV_HEADS, DIM).square()), Exact()),
    ]
)
JOINT = st.sampled_from(
    [
        Tier("low-rank", low_rank(True), low_rank(False)),
        Tier("estimated together", Exact(), from_key(True, True)),
        Tier("estimated together from 4 bits", Quant(4), from_key(False, True)),
    ]
)
PARTS = st.lists(
    st.one_of(
        st.tuples(TIERS, GROUPS, st.just(False)),
        st.tuples(JOINT, st.integers(1, 6).map(lambda n: [n] * KV_HEADS), st.just(True)),
    ),
    max_size=3,
    unique_by=lambda part: part[0].name,
)


@settings(deadline=None, max_examples=100)
@given(parts=PARTS, new=st.integers(1, 3), before=st.integers(0, 2), many=st.booleans(), half=st.booleans())
def test_any_tiers_attend_as_the_oracle(
    parts: list[tuple[Tier, list[int], bool]], new: int, before: int, many: bool, half: bool
) -> None:
    """Heads with different rows, or none; a tail that is longer than what is new; multiplicities; a bfloat16 store."""
    parts = [(tier, [tier.group * n for n in groups], shared) for tier, groups, shared in parts if sum(groups)]
    dtype = torch.bfloat16 if half else torch.float32
    layer = layer_of(parts, dtype, many)
    tail = tuple(random(KV_HEADS, before + new, DIM, seed=i).to(dtype) for i in (7, 8))
    query, scale = random(2 * KV_HEADS, new, DIM, seed=9), DIM**-0.5
    dense = layer.dense()
    key, value = (torch.cat(x, 1).float() for x in zip((dense.key, dense.value), tail, strict=True))
    mask = torch.ones(new, before + new, dtype=torch.bool).tril(before)
    bias = torch.zeros(KV_HEADS, dense.key.shape[1]) if dense.bias is None else dense.bias
    full = torch.cat(
        [
            bias[:, None].expand(-1, new, -1),
            torch.zeros(new, before + new).masked_fill(~mask, -torch.inf).expand(KV_HEADS, -1, -1),
        ],
        -1,
    )
    expected = oracle_attention(query, key, value, scale, full.repeat_interleave(2, 0))
    ready = Ready.of(layer, Context(IDS, TOKENS))
    for _ in range(2):
        found = tiered_attention(query, ready, (tail[0], tail[1]), scale)
        torch.testing.assert_close(found, expected, atol=0.03 if half else 1e-4, rtol=0.03 if half else 1e-4)


# -- forks -------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def pack(name: str, budget: str = "0.3", **options: Any) -> tuple[Method, CompressedCache]:
    method = plugins.build_method(name, **options)
    seen = read_exactly(NETWORK, IDS, method.needs)
    allowance = Budget.parse(budget).allow(NETWORK.row_bytes() * TOKENS, TOKENS)
    return method, CompressedCache.pack(method.plan(seen, allowance), seen)


class _Watch(TorchDispatchMode):
    """The names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.__name__.partition(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["adakv", "kivi", "mikv"])
def test_a_step_waits_for_nothing_and_loops_over_no_heads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, cache = pack(name)
    fork = Fork(cache, method, tiered=True)
    monkeypatch.setattr(torch.nn.utils.rnn, "pad_sequence", None)  # what pads heads one by one
    with torch.no_grad(), _Watch() as watch:
        feed(NETWORK, [fork], IDS[None, :1])
    assert "bmm" in watch.names
    assert not watch.names & {"_local_scalar_dense", "nonzero", "unique_dim", "_unique2", "masked_select"}


def test_exact_rows_in_the_layers_dtype_are_not_copied() -> None:
    method, cache = pack("snapkv")
    [slab] = cache.layers[0].slabs
    stored = slab.key["x"].untyped_storage().data_ptr()

    class Seen(TorchDispatchMode):
        multiplied = copied = False

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            mine = any(isinstance(x, Tensor) and x.untyped_storage().data_ptr() == stored for x in args)
            name = func.__name__.partition(".")[0]
            self.multiplied |= mine and name == "bmm"
            self.copied |= mine and name in ("clone", "copy_", "_to_copy", "index_select", "cat")
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Seen() as seen:
        feed(NETWORK, [Fork(cache, method, tiered=True)], IDS[None, :1])
    assert seen.multiplied
    assert not seen.copied


@torch.inference_mode()
def test_working_bytes_are_what_is_kept_beside_the_store() -> None:
    row, room = NETWORK.row_bytes(), 64
    method, cache = pack("snapkv")
    even = Fork(cache, method, tiered=True)
    assert even.working_bytes == 0
    feed(NETWORK, [even], IDS[None, :3])
    assert even.working_bytes == room * row  # of the tail, not yet used
    decoded = Fork(cache, method)
    feed(NETWORK, [decoded], IDS[None, :3])
    assert decoded.working_bytes == room * row + cache.nbytes

    method, cache = pack("adakv")
    ragged = Fork(cache, method, tiered=True)
    layouts = [slab.layout for layer in cache.layers for slab in layer.slabs]
    assert not all(layout.uniform for layout in layouts)
    places = sum(layout.width * KV_HEADS for layout in layouts if not layout.uniform)
    assert ragged.working_bytes == places * (4 + 4)  # which row is there, and whether one is


@torch.inference_mode()
def test_tables_of_a_context_are_made_once_for_all_layers_and_forks() -> None:
    tier = Tier("estimated", Exact(), from_key())
    layers = tuple(layer_of([(tier, [9, 9], False)], torch.float32, False) for _ in range(2))
    _, cache = pack("full")
    cache = CompressedCache.of(layers, (None, None), IDS, TOKENS, NETWORK.rope)
    first = Fork(cache, Method(), tiered=True)
    feed(NETWORK, [first], IDS[None, :1])
    tables = {name: tuple(map(id, found)) for name, found in first.contexts[IDS.device].tables.items()}
    features, which = next(
        found
        for name, found in first.contexts[IDS.device].tables.items()
        if isinstance(name, tuple) and name[0] == "tokens"
    )
    assert features.shape == (len(IDS.unique()), 64)
    assert len(which) == TOKENS
    second = first.fork()
    feed(NETWORK, [first], IDS[None, :1])
    feed(NETWORK, [second], IDS[None, :1])
    assert {name: tuple(map(id, found)) for name, found in second.contexts[IDS.device].tables.items()} == tables


def test_methods_that_act_in_time_have_no_tiered_path() -> None:
    method, cache = pack("h2o", decode=True)
    with pytest.raises(ValueError, match="acts in time"):
        Fork(cache, method, tiered=True)


@pytest.mark.parametrize("name", ["adakv", "snapkv", "kivi"])
@torch.inference_mode()
def test_a_tiered_fork_freezes_and_forks_as_any(name: str) -> None:
    method, cache = pack(name)
    found = []
    for tiered in (False, True):
        parent = Fork(cache, method, tiered)
        feed(NETWORK, [parent], IDS[None, :5])
        child = parent.fork()
        feed(NETWORK, [parent], IDS[None, 5:9])
        frozen = parent.freeze()
        again = feed(NETWORK, [Fork(frozen, method, tiered)], IDS[None, 9:12])
        found.append(torch.cat([feed(NETWORK, [child], IDS[None, 20:23]), again], 1))
        assert parent.tail_bytes == 9 * NETWORK.row_bytes()
    torch.testing.assert_close(found[0], found[1], atol=2e-4, rtol=0)
