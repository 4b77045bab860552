"""KIVI, TurboQuant, Mustafar, ThinK and Palu: their codecs and bytes against the formulas, written out with loops."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from conftest import ids_of, tiny_network
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvbench import plugins
from kvbench.artefact import Artefact, load_or_fit
from kvbench.budget import Allowance, Budget
from kvbench.cache.codecs.base import Codec, Rows
from kvbench.cache.codecs.channels import Channels
from kvbench.cache.codecs.low_rank import LowRank, rotate
from kvbench.cache.codecs.quant import Quant, pack, unpack
from kvbench.cache.codecs.rotated import Rotated, lloyd_max, random_rotation
from kvbench.cache.codecs.sparse import Sparse
from kvbench.cache.fork import Fork
from kvbench.cache.layout import Layout
from kvbench.cache.packed import CompressedCache, nbytes
from kvbench.cache.rope import unrotate
from kvbench.compressor import tier_rows
from kvbench.decode import feed
from kvbench.errors import UsageError
from kvbench.method import Method
from kvbench.model import Model
from kvbench.plan import EVICTED, Infeasible, Plan, keep_all, top_rows
from kvbench.prefill import Observed, Seen, Statistic, read_exactly
from kvbench.toolbox.low_rank import Directions, group_size
from kvbench.toolbox.value_maps import sequences

TOKENS = 192
NETWORK = tiny_network()
DIM, KV_HEADS, LAYERS = NETWORK.dim, NETWORK.kv_heads, NETWORK.layers


@torch.inference_mode()
def see(method: Method, tokens: int = TOKENS, extra: tuple[Statistic, ...] = (), chunk: int = 65536) -> Seen:
    return read_exactly(NETWORK, ids_of(NETWORK, tokens), {*method.needs, *extra}, "c", chunk)


def compress(method: Method, seen: Seen, budget: str | int = "1") -> tuple[Plan, CompressedCache]:
    full = NETWORK.row_bytes() * len(seen.token_ids)
    allowance = Allowance(budget) if isinstance(budget, int) else Budget.parse(budget).allow(full, len(seen.token_ids))
    plan = method.plan(seen, allowance)
    return plan, CompressedCache.pack(plan, seen)


def in_order(plan: Plan, cache: CompressedCache, layer: int) -> tuple[Tensor, Tensor]:
    """The decoded keys and values of a layer that holds every token, token by token as they came."""
    route, dense = plan.layers[layer].route, cache.layers[layer].dense()
    back = torch.cat([(route[0] == i).nonzero()[:, 0] for i in range(len(plan.layers[layer].tiers))]).argsort()
    return dense.key[:, back], dense.value[:, back]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotated(bits: int, dim: int = DIM, seed: int = 0) -> Rotated:
    return Rotated(bits, random_rotation(dim, seed), lloyd_max(bits, dim))


def low_rank(rank: int, rope: bool = False) -> LowRank:
    basis = torch.linalg.qr(random(1, 2 * DIM, 2 * DIM)).Q[:, :, : 2 * rank].clone()
    return LowRank(basis, rank, NETWORK.rope if rope else None)


def rows_of(groups: list[int], group: int, shared: bool = False) -> Rows:
    layout = Layout(tuple(n * group for n in groups), shared)
    return Rows(layout, torch.cat([torch.arange(n) * 3 for n in layout.counts]))


# -- what every codec promises -----------------------------------------------------------------------------------------

CODECS = [
    Quant(2, tokens=8),
    Quant(4, tokens=32),
    Sparse(5),
    Sparse(DIM),
    Channels(9, random(2, DIM).square()),
    rotated(1),
    rotated(3),
    low_rank(3),
    low_rank(7, rope=True),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: type(codec).__name__)
@settings(deadline=None, max_examples=15)
@given(groups=st.lists(st.integers(0, 4), min_size=2, max_size=2))
def test_bytes_are_as_the_formula_says(codec: Codec, dtype: torch.dtype, groups: list[int]) -> None:
    shared = isinstance(codec, LowRank)
    rows = rows_of([groups[0]] * 2 if shared else groups, codec.group, shared)
    x = random(rows.layout.rows, DIM).to(dtype)
    if not len(x):
        return
    fixed = codec.fit(x, rows)
    stored = codec.encode(x, rows, fixed)
    assert nbytes(stored.values()) == sum(codec.group_bytes(DIM, dtype)) * len(x) // codec.group
    assert nbytes(fixed.values()) == codec.fixed_bytes(2, DIM, dtype)
    assert {len(part) for part in stored.values()} == {len(x) // codec.group}
    decoded = codec.decode(stored, rows, fixed, dtype)
    assert decoded.shape == x.shape
    assert decoded.dtype == dtype


@pytest.mark.parametrize(
    "codec", [rotated(2), low_rank(5), low_rank(5, rope=True)], ids=lambda codec: type(codec).__name__
)
def test_the_linear_shortcut_equals_explicit_rows(codec: Codec) -> None:
    rows = rows_of([9, 9], 1, shared=True)
    stored = codec.encode(random(18, DIM), rows, {})
    weights = random(2, 4, 9).softmax(-1)
    explicit = weights @ rows.layout.pad(codec.decode(stored, rows, {}, torch.float32))
    torch.testing.assert_close(codec.mix(weights, stored, rows, {}), explicit, atol=1e-5, rtol=1e-5)


@given(st.integers(0, 6), st.integers(1, 4), st.integers(0, 2**31))
def test_three_bits_are_packed_without_loss(rows: int, bytes_: int, seed: int) -> None:
    codes = torch.randint(0, 8, (rows, 8 * bytes_), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, 3)
    assert packed.nbytes == rows * 3 * bytes_
    assert torch.equal(unpack(packed, 3), codes)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("kivi", {"bits": 3}),
        ("kivi", {"group": 6, "residual": 12}),
        ("kivi", {"residual": 100}),
        ("turboquant", {"bits": 5}),
        ("mustafar", {"sparsity": 1.0}),
        ("mustafar", {"window": -1}),
        ("think", {"ratio": 1.5}),
        ("think", {"window": 0}),
        ("palu", {"ratio": 0.0}),
        ("palu", {"heads": 0}),
    ],
)
def test_options_that_make_no_sense_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        plugins.build_method(name, **options)


# -- KIVI --------------------------------------------------------------------------------------------------------------


def quantised(block: Tensor, bits: int) -> Tensor:
    """The paper's formula for one block, with the zero and the scale in 16 bits."""
    zero = float(block.min().half())
    scale = float(((block.max() - zero) / (2**bits - 1)).half())
    return torch.tensor([round((float(x) - zero) / scale) * scale + zero for x in block])


def kivi_rows(key: Tensor, value: Tensor, bits: int, group: int, residual: int) -> tuple[Tensor, Tensor, int, int]:
    """Keys and values of one KV head as KIVI holds them after a prefill, and how many of each are quantised."""
    tokens, dim = key.shape
    keys = tokens - tokens % max(residual, group)
    values = max(tokens - residual, 0) // group * group
    key, value = key.clone(), value.clone()
    for channel in range(dim):
        for start in range(0, keys, group):
            key[start : start + group, channel] = quantised(key[start : start + group, channel], bits)
    for token in range(values):
        for start in range(0, dim, group):
            value[token, start : start + group] = quantised(value[token, start : start + group], bits)
    return key, value, keys, values


@pytest.mark.parametrize(
    ("tokens", "bits", "group", "residual"),
    [(96, 2, 8, 16), (101, 4, 8, 32), (90, 2, 16, 16), (30, 4, 32, 64), (70, 2, 4, 0)],
)
def test_kivi_holds_what_the_paper_says(tokens: int, bits: int, group: int, residual: int) -> None:
    method = plugins.build_method("kivi", bits=bits, group=group, residual=residual)
    seen = see(method, tokens)
    plan, cache = compress(method, seen)
    for i, x in enumerate(seen.layers):
        found_key, found_value = in_order(plan, cache, i)
        for head in range(KV_HEADS):
            key, value, keys, values = kivi_rows(x.key[head], x.value[head], bits, group, residual)
            torch.testing.assert_close(found_key[head], key, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(found_value[head], value, atol=1e-5, rtol=1e-5)
            assert torch.equal(found_key[head, keys:], x.key[head, keys:])
            assert torch.equal(found_value[head, values:], x.value[head, values:])
            assert tokens - keys < max(residual, group)
            assert min(residual, tokens) <= tokens - values < residual + group
            assert keys == 0 or not torch.equal(found_key[head, :keys], x.key[head, :keys])


@pytest.mark.parametrize(("tokens", "bits", "residual"), [(192, 2, 32), (176, 4, 64), (160, 2, 128), (96, 4, 96)])
def test_kivi_weighs_what_the_papers_formula_says(tokens: int, bits: int, residual: int) -> None:
    group = 16
    method = plugins.build_method("kivi", bits=bits, group=group, residual=residual)
    cache = compress(method, see(method, tokens))[1]
    assert cache.nbytes == _kivi_bytes(tokens, bits, group, residual)


def _kivi_bytes(tokens: int, bits: int, group: int, residual: int) -> float:
    """The paper's formula; tokens and residual are multiples of the group, and the group divides the channels."""
    keys, values = tokens - tokens % max(residual, group), max(tokens - residual, 0)
    exact = (tokens - keys + tokens - values) * 4
    return LAYERS * KV_HEADS * DIM * ((keys + values) * (bits / 8 + 4 / group) + exact)


@settings(deadline=None, max_examples=50)
@given(st.sampled_from([2, 4]), st.sampled_from([8, 32]), st.floats(1e-3, 1e2), st.floats(-100, 100))
def test_by_channel_quantisation_errs_by_half_a_step_of_its_channel(
    bits: int, tokens: int, spread: float, centre: float
) -> None:
    codec, rows = Quant(bits, tokens=tokens), Rows(Layout((tokens, 0)))
    scale = torch.logspace(-2, 2, DIM)  # outlier channels do not spoil the others
    x = random(tokens, DIM) * spread * scale + centre
    back = codec.decode(codec.encode(x, rows, {}), rows, {}, torch.float32)
    width = x.amax(0) - x.amin(0)
    rounding = (x.abs().amax(0) + width) * 2**-10 + 2**-20  # minimum and step are float16
    assert ((back - x).abs().amax(0) <= width / (2**bits - 1) / 2 * 1.01 + rounding).all()


def test_a_constant_channel_survives_quantisation() -> None:
    codec, rows = Quant(2, tokens=8), Rows(Layout((8, 8)))
    x = random(16, DIM)
    x[:, 3] = 0.5
    back = codec.decode(codec.encode(x, rows, {}), rows, {}, torch.float32)
    assert (back[:, 3] == 0.5).all()


def test_kivi_takes_what_the_budget_allows() -> None:
    method = plugins.build_method("kivi", group=8, residual=64)
    seen = see(method)
    sizes = {name: compress(replace(method, bits=bits), seen)[1].nbytes for name, bits in (("4-bit", 4), ("2-bit", 2))}
    full = NETWORK.row_bytes() * TOKENS
    assert sizes["2-bit"] < sizes["4-bit"] < full
    for name, size in sizes.items():
        cache = compress(method, seen, size)[1]
        assert cache.nbytes == size
        assert name in tier_rows(cache)
        assert compress(method, seen, size - 1)[1].nbytes < size
    smaller = compress(method, seen, sizes["2-bit"] - 1)[1]
    residuals = [r for r in range(56, -1, -8) if _kivi_bytes(TOKENS, 2, 8, r) < sizes["2-bit"]]
    assert tier_rows(smaller)["2-bit"] == TOKENS - residuals[0]  # the residual gives way, group by group
    assert compress(method, seen, full - 1)[1].nbytes == sizes["4-bit"]
    assert compress(method, seen, full)[1].nbytes == full


@pytest.mark.parametrize(
    ("name", "options"),
    [("kivi", {"group": 8}), ("kivi", {"bits": 4}), ("turboquant", {}), ("turboquant", {"bits": 3})],
)
def test_the_smallest_size_is_told(name: str, options: dict[str, Any]) -> None:
    method = plugins.build_method(name, **options)
    seen = see(method)
    with pytest.raises(Infeasible) as refused:
        compress(method, seen, 1)
    assert compress(method, seen, refused.value.smallest)[1].nbytes == refused.value.smallest
    with pytest.raises(Infeasible):
        compress(method, seen, refused.value.smallest - 1)


# -- TurboQuant --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "error"), [(1, 0.363), (2, 0.117), (3, 0.0345), (4, 0.0095)])
def test_turboquant_errs_as_the_paper_says(bits: int, error: float) -> None:
    dim = 128
    x = random(10_000, dim)
    x = x / x.norm(dim=-1, keepdim=True)
    codec, rows = rotated(bits, dim), Rows(Layout((10_000,)))
    stored = codec.encode(x, rows, {})
    back = codec.decode(stored, rows, {}, torch.float32)
    found = float((back - x).square().sum(-1).mean())
    assert abs(found / error - 1) < 0.03
    assert abs(float(back.norm(dim=-1).mean()) / (1 - found) ** 0.5 - 1) < 0.01
    assert nbytes(stored.values()) == 10_000 * (dim * bits // 8 + 2)


@pytest.mark.parametrize("dim", [16, 64, 128])
def test_the_rotation_is_orthogonal_and_drawn_once(dim: int) -> None:
    rotation = random_rotation(dim, 0)
    assert (rotation.mT @ rotation - torch.eye(dim)).abs().max() < 1e-5
    torch.rand(3)
    assert torch.equal(random_rotation(dim, 0), rotation)
    assert not torch.allclose(random_rotation(dim, 1), rotation, atol=0.1)


def test_every_context_and_layer_shares_the_rotation() -> None:
    method = plugins.build_method("turboquant", bits=2)
    seen = see(method)
    first, second = (method.plan(s, Allowance(10**9)) for s in (seen, replace(seen, context_id="another")))
    rotations = {codec.rotation.data_ptr() for x in first.layers for codec in (x.tiers[0].key, x.tiers[0].value)}
    assert len(rotations) == 1
    assert torch.equal(first.layers[0].tiers[0].key.rotation, second.layers[1].tiers[0].value.rotation)
    assert CompressedCache.pack(first, seen).shared_bytes == DIM * DIM * 4 + 4 * 4


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_turboquant_holds_the_nearest_centroids(bits: int) -> None:
    """x = rho R' c, c the nearest centroid of each coordinate of R x / rho; centroids are the means of their cells."""
    method = plugins.build_method("turboquant", bits=bits)
    seen = see(method, 40)
    plan, cache = compress(method, seen)
    rotation = random_rotation(DIM, 0).double()
    centroids = lloyd_max(bits, DIM).double()
    for i, x in enumerate(seen.layers):
        for found, exact in zip(in_order(plan, cache, i), (x.key, x.value), strict=True):
            for head, token in itertools.product(range(KV_HEADS), range(0, 40, 7)):
                row = exact[head, token].double()
                turned = rotation @ (row / row.norm())
                nearest = torch.stack([centroids[(centroids - y).abs().argmin()] for y in turned])
                expected = rotation.mT @ nearest * row.norm()
                torch.testing.assert_close(found[head, token].double(), expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(("bits", "dim"), [(1, 16), (2, 64), (3, 64), (4, 128)])
def test_the_quantiser_is_the_best_for_its_law(bits: int, dim: int) -> None:
    """Lloyd-Max on draws: each centroid is the mean of what is nearest to it."""
    u = random(200_000, dim, seed=1)
    y = (u / u.norm(dim=-1, keepdim=True))[:, 0]
    centroids = lloyd_max(bits, dim)
    nearest = (y[:, None] - centroids).abs().argmin(1)
    means = torch.stack([y[nearest == i].mean() for i in range(2**bits)])
    torch.testing.assert_close(means, centroids, atol=0.03 / math.sqrt(dim), rtol=0)
    torch.testing.assert_close(centroids, -centroids.flip(0), atol=1e-4, rtol=0)


@pytest.mark.parametrize("share", [0.17, 0.15, 0.12, 0.09, 0.07])
def test_turboquant_takes_the_bits_that_fit(share: float) -> None:
    method = plugins.build_method("turboquant")
    (name,) = tier_rows(compress(method, see(method), str(share))[1])
    fitting = [b for b in (1, 2, 3, 4) if DIM * b / 8 + 2 <= share * DIM * 4]
    assert name == f"{max(fitting)}-bit"


# -- Mustafar ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.5, 0.7, 0.9])
def test_mustafar_keeps_the_largest_entries_of_each_row(sparsity: float) -> None:
    method = plugins.build_method("mustafar", sparsity=sparsity, window=20)
    seen = see(method)
    plan, cache = compress(method, seen)
    keep = DIM - math.floor(sparsity * DIM)
    for i, x in enumerate(seen.layers):
        for found, exact in zip(in_order(plan, cache, i), (x.key, x.value), strict=True):
            assert torch.equal(found[:, -20:], exact[:, -20:])
            for head, token in itertools.product(range(KV_HEADS), range(0, TOKENS - 20)):
                row = exact[head, token]
                largest = sorted(range(DIM), key=lambda c: -abs(float(row[c])))[:keep]
                expected = [float(row[c]) if c in largest else 0.0 for c in range(DIM)]
                assert found[head, token].tolist() == expected
    rows = LAYERS * KV_HEADS
    assert cache.nbytes == rows * ((TOKENS - 20) * 2 * (keep * 4 + DIM // 8) + 20 * 2 * DIM * 4)


@given(st.integers(1, DIM), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 2**31), st.booleans())
@settings(deadline=None)
def test_a_sparse_row_has_as_many_entries_as_promised(keep: int, dtype: torch.dtype, seed: int, ties: bool) -> None:
    x = random(6, DIM, seed=seed).to(dtype)
    x = x.sign() if ties else x
    codec, rows = Sparse(keep), Rows(Layout((6,)))
    stored = codec.encode(x, rows, {})
    back = codec.decode(stored, rows, {}, dtype)
    assert (unpack(stored["bitmap"], 1).sum(-1) == keep).all()
    assert torch.equal(back[back != 0], x[back != 0])  # bit by bit
    assert ((back != 0).sum(-1) == keep).all()
    again = codec.encode(back, rows, {})
    assert torch.equal(codec.decode(again, rows, {}, dtype), back)


@pytest.mark.parametrize(("sparsity", "share"), [(0.7, 0.385), (0.5, 0.57)])
def test_mustafar_without_padding_weighs_what_it_should(sparsity: float, share: float) -> None:
    """64 channels in 16 bits, 2,048 tokens of which 32 are exact."""
    codec = Sparse(64 - math.floor(64 * sparsity))
    held = (2048 - 32) * sum(codec.group_bytes(64, torch.bfloat16)) + 32 * 128
    assert abs(held / (2048 * 128) - share) < 0.002


# -- ThinK -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Queries(Statistic):
    """Every query of the context."""

    def observe(self, state: Tensor | None, seen: Observed) -> Tensor:
        return seen.query if state is None else torch.cat([state, seen.query], 1)


@pytest.mark.parametrize("chunk", [65536, 50])
@pytest.mark.parametrize(
    ("ratio", "window", "recent", "tokens"), [(0.5, 32, 32, 120), (0.4, 10, 0, 64), (0.6, 90, 8, 33)]
)
def test_think_keeps_the_channels_with_the_most_energy(
    ratio: float, window: int, recent: int, tokens: int, chunk: int
) -> None:
    method = plugins.build_method("think", ratio=ratio, window=window, recent=recent)
    seen = see(method, tokens, (Queries(),), chunk)
    plan, cache = compress(method, seen)
    pruned, group = math.floor(ratio * DIM), NETWORK.heads // KV_HEADS
    for i, x in enumerate(seen.layers):
        key, value = in_order(plan, cache, i)
        assert torch.equal(value, x.value)
        old = tokens - recent
        assert torch.equal(key[:, old:], x.key[:, old:])
        for head in range(KV_HEADS):
            queries = seen.statistics[Queries()][i][head * group : (head + 1) * group, -window:]
            worth = [float(queries[..., c].square().sum() * x.key[head, :old, c].square().sum()) for c in range(DIM)]
            kept = sorted(range(DIM), key=lambda c: -worth[c])[: DIM - pruned]
            expected = torch.zeros(old, DIM)
            expected[:, kept] = x.key[head, :old, kept]
            assert torch.equal(key[head, :old], expected)
    rows = (tokens - recent) * (DIM - pruned) + recent * DIM + tokens * DIM
    assert cache.nbytes == LAYERS * (4 * KV_HEADS * rows + KV_HEADS * DIM // 8)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 8), st.integers(0, 2**31))
def test_the_channels_dropped_are_worth_the_least(keep: int, seed: int) -> None:
    """Of all sets of their size; and dot products are those with zeros in their place."""
    x, energy, query = random(5, 8, seed=seed), random(1, 8, seed=seed + 1).square(), random(3, 8, seed=seed + 2)
    codec, rows = Channels(keep, energy), Rows(Layout((5,)))
    fixed = codec.fit(x, rows)
    stored = codec.encode(x, rows, fixed)
    kept = unpack(fixed["channels"], 1)[0].nonzero()[:, 0].tolist()
    worth = energy[0] * x.square().sum(0)
    best = max(float(worth[list(c)].sum()) for c in itertools.combinations(range(8), keep))
    assert len(kept) == keep
    assert float(worth[kept].sum()) == pytest.approx(best, rel=1e-5)
    pruned = query[:, kept] @ stored["x"].mT
    torch.testing.assert_close(query @ codec.decode(stored, rows, fixed, torch.float32).mT, pruned)


def test_channels_of_nothing_but_zeros_cost_nothing() -> None:
    x = random(7, DIM)
    x[:, [1, 4, 9]] = 0
    codec, rows = Channels(DIM - 3, torch.ones(1, DIM)), Rows(Layout((7,)))
    fixed = codec.fit(x, rows)
    assert torch.equal(codec.decode(codec.encode(x, rows, fixed), rows, fixed, torch.float32), x)


# -- Mustafar and ThinK under a budget ---------------------------------------------------------------------------------

THIN = [("mustafar", "sparsity", 0.7), ("think", "ratio", 0.5)]


@pytest.mark.parametrize(("name", "option", "most"), THIN)
def test_nothing_thinned_is_the_full_cache(name: str, option: str, most: float) -> None:
    method = plugins.build_method(name, **{option: 0.0})
    seen = see(method)
    plan, cache = compress(method, seen, 10**9)
    for i, x in enumerate(seen.layers):
        key, value = in_order(plan, cache, i)
        assert torch.equal(key, x.key)
        assert torch.equal(value, x.value)


@pytest.mark.parametrize("base", ["snapkv", "knorm"])
@pytest.mark.parametrize(("name", "option", "most"), THIN)
def test_below_the_thinnest_rows_the_base_evicts(name: str, option: str, most: float, base: str) -> None:
    method = plugins.build_method(name, base=base)
    seen = see(method)
    window, exact = 32, 2 * DIM * 4
    for share in (0.02, 0.05, 0.1, 0.2, 0.3):
        plan, _ = compress(method, seen, str(share))
        tier = plan.layers[0].tiers[0]
        thin = sum(tier.row_bytes(DIM, torch.float32))
        room = int(share * TOKENS * exact) - (DIM // 8 if name == "think" else 0)
        for i, layer in enumerate(plan.layers):
            kept = layer.route != EVICTED
            keep = int(kept[0].sum())
            whole = int((layer.route == 1)[0].sum())
            assert whole == min(window, keep // 2 - min(method.protect[0], keep // 2))
            assert (layer.route[:, TOKENS - whole :] == 1).all()
            assert keep * thin + whole * (exact - thin) <= room < (keep + 1) * thin + (whole + 1) * (exact - thin)
            protect = (method.protect[0], max(method.protect[1], window))
            assert torch.equal(kept, top_rows(method.scorer.scores(seen, i), keep, protect) == 0)
    assert method.protect == (0, 64 if base == "snapkv" else 0)


@pytest.mark.parametrize(("name", "option", "most"), THIN)
@settings(deadline=None, max_examples=40)
@given(share=st.floats(0.01, 1))
def test_as_little_is_thinned_as_the_budget_asks_for(name: str, option: str, most: float, share: float) -> None:
    method = plugins.build_method(name, base="knorm")
    seen = _SEEN[name]
    plan, cache = compress(method, seen, f"{share:.6f}")
    limit = share * NETWORK.row_bytes() * TOKENS
    assert cache.nbytes <= limit + 1
    tier = plan.layers[0].tiers[0]
    thinned = {t.name for t in plan.layers[0].tiers} != {"exact"}
    kept = sum(tier_rows(cache).values())
    if thinned and kept == TOKENS:  # one entry or channel more, with the least window, would not have fitted
        keep = tier.key.keep  # type: ignore[attr-defined]
        more = replace(method, **{option: 1 - (keep + 1) / DIM})
        assert keep == DIM - 1 or compress(more, seen, 10**9)[1].nbytes > limit - 1
        assert keep >= DIM - math.floor(most * DIM)
    elif thinned:
        thinnest = replace(method, **{option: most})
        assert compress(thinnest, seen, 10**9)[1].nbytes > limit - 1
    else:
        assert share >= 0.9999


_SEEN = {name: see(plugins.build_method(name, base="knorm")) for name, _, _ in THIN}


# -- Palu --------------------------------------------------------------------------------------------------------------


def directions_of(rows: Tensor) -> dict[str, Tensor]:
    """What `Directions` finds of one group's rows, by their singular value decomposition."""
    _, s, vh = torch.linalg.svd(rows.double(), full_matrices=False)
    return {"basis": vh.mT.float(), "energy": (s.square() / s.square().sum()).float()}


def wide(x: Tensor) -> Tensor:
    return x.transpose(0, 1).flatten(1)


def with_bases(method: Any, seen: Seen) -> Seen:
    """The context, and bases fitted to itself."""
    keys = [wide(unrotate(x.key, *NETWORK.rope(x.position))) for x in seen.layers]
    parts = {"key": keys, "value": [wide(x.value) for x in seen.layers]}
    tensors = {k: torch.stack([directions_of(rows)["basis"][None] for rows in all_]) for k, all_ in parts.items()}
    return replace(seen, artefacts={method.directions: Artefact(tensors, {}, "")})


@pytest.mark.parametrize("rank", [1, 5, 12, DIM])
def test_the_error_is_what_the_dropped_directions_had(rank: int) -> None:
    """Eckart and Young: the relative squared error is the dropped share of the squared singular values."""
    seen = see(Method())
    x = seen.layers[1]
    rows = Rows(Layout((TOKENS,) * KV_HEADS, shared=True), x.position.repeat(KV_HEADS))
    for exact, rope in ((x.key, NETWORK.rope), (x.value, None)):
        target = wide(unrotate(exact, *NETWORK.rope(x.position)) if rope else exact)
        found = directions_of(target)
        codec = LowRank(found["basis"][None, :, : KV_HEADS * rank].clone(), rank, rope)
        flat = exact.flatten(0, 1)
        back = codec.decode(codec.encode(flat, rows, {}), rows, {}, torch.float32)
        error = float((back - flat).square().sum() / flat.square().sum())
        assert error == pytest.approx(float(found["energy"][KV_HEADS * rank :].sum()), abs=1e-5, rel=1e-3)


def test_the_bases_are_those_of_the_whitened_weights() -> None:
    """Whitening: with X'X = S'S, the best W' of rank r for |X W - X W'| is S^-1 times the truncated S W."""
    x = random(300, 24).double() @ random(24, 24, seed=1).double()
    weight = random(24, 32, seed=2).double()
    s = torch.linalg.cholesky(x.mT @ x).mT
    u, d, vh = torch.linalg.svd(s @ weight, full_matrices=False)
    for rank in (1, 6, 20):
        whitened = torch.linalg.solve(s, u[:, :rank] * d[:rank] @ vh[:rank])
        y = x @ weight
        basis = directions_of(y)["basis"][:, :rank].double()
        torch.testing.assert_close(y @ basis @ basis.mT, x @ whitened, atol=1e-3, rtol=1e-4)


def test_rotate_undoes_unrotate() -> None:
    cos, sin = NETWORK.rope(torch.arange(50))
    x = random(2, 50, DIM)
    torch.testing.assert_close(rotate(unrotate(x, cos, sin), cos, sin), x)


@pytest.mark.parametrize(("ratio", "ranks"), [(0.5, (7, 9)), (0.25, (4, 4)), (0.7, (9, 13)), (1.0, (DIM, DIM))])
def test_palu_holds_its_ranks(ratio: float, ranks: tuple[int, int]) -> None:
    method = plugins.build_method("palu", ratio=ratio)
    seen = with_bases(method, see(method))
    plan, cache = compress(method, seen, 10**9)
    assert [c.rank for c in (plan.layers[0].tiers[0].key, plan.layers[0].tiers[0].value)] == list(ranks)  # type: ignore[attr-defined]
    assert cache.nbytes == LAYERS * TOKENS * (KV_HEADS * sum(ranks) * 4 + 2)
    assert cache.shared_bytes == LAYERS * KV_HEADS * DIM * KV_HEADS * sum(ranks) * 4


def test_palu_at_full_rank_gives_the_logits_of_the_full_cache() -> None:
    method = plugins.build_method("palu", ratio=1.0)
    seen = with_bases(method, see(method))
    cache = compress(method, seen, 10**9)[1]
    full = CompressedCache.pack(keep_all(seen), seen)
    new = ids_of(NETWORK, 8, seed=2)[None]
    with torch.inference_mode():
        expected = feed(NETWORK, [Fork(full, Method())], new)
        for tiered in (False, True):
            found = feed(NETWORK, [Fork(cache, method, tiered)], new)
            torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


@settings(deadline=None, max_examples=40)
@given(share=st.floats(0.08, 0.999))
def test_palu_takes_the_ranks_that_fit(share: float) -> None:
    method = plugins.build_method("palu")
    seen = with_bases(method, see(method, 64))
    limit = int(share * NETWORK.row_bytes() * 64)
    plan, cache = compress(method, seen, limit)
    key, value = (c.rank for c in (plan.layers[0].tiers[0].key, plan.layers[0].tiers[0].value))  # type: ignore[attr-defined]
    assert cache.nbytes <= limit
    assert cache.nbytes + LAYERS * KV_HEADS * 64 * 4 > limit or key + value == 2 * DIM - 1
    assert abs(value - 0.6 * (key + value)) < 1 or value == DIM


@pytest.mark.parametrize(("kv_heads", "heads", "size"), [(8, 4, 4), (3, 4, 3), (6, 4, 3), (5, 4, 1), (2, 1, 1)])
def test_groups_are_whole(kv_heads: int, heads: int, size: int) -> None:
    assert group_size(kv_heads, heads) == size


@pytest.mark.usefixtures("own_cache", "corpora")
@pytest.mark.parametrize("heads", [1, 4])
def test_directions_are_the_singular_vectors_of_the_calibration_rows(tiny: Model, heads: int) -> None:
    calibration = Directions(("essays",), heads=heads, tokens=512, sequence=128)
    tensors = load_or_fit(calibration, tiny).tensors
    network, size = tiny.network, group_size(KV_HEADS, heads)
    with torch.inference_mode():
        texts = [read_exactly(network, ids) for ids in itertools.islice(sequences(tiny, ("essays",), 128), 4)]
    assert len(texts) == 4
    for layer, group in itertools.product(range(LAYERS), range(KV_HEADS // size)):
        here = slice(group * size, (group + 1) * size)
        for kind in ("key", "value"):
            rows = []
            for seen in texts:
                x = seen.layers[layer]
                exact = unrotate(x.key, *network.rope(x.position)) if kind == "key" else x.value
                rows.append(wide(exact[here]))
            expected = directions_of(torch.cat(rows))
            basis = tensors[kind][layer, group]
            torch.testing.assert_close(
                tensors[f"{kind}.energy"][layer, group], expected["energy"], atol=1e-4, rtol=1e-3
            )
            for rank in (1, 4):
                ours, theirs = (b[:, :rank] @ b[:, :rank].mT for b in (basis, expected["basis"]))
                torch.testing.assert_close(ours, theirs, atol=1e-2, rtol=0)
