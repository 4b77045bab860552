"""What further eviction scorers keep, against their papers' formulas written out with loops."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import pytest
import torch
from conftest import ids_of, tiny_network
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvbench import plugins
from kvbench.budget import Budget
from kvbench.cache.hf import Network
from kvbench.cache.rope import unrotate
from kvbench.method import Method
from kvbench.plan import EVICTED
from kvbench.prefill import Observed, Seen, Statistic, read_exactly
from kvbench.toolbox.statistics import ColumnSums

TOKENS = 100
NETWORK = tiny_network()


@torch.inference_mode()
def see(method: Method, tokens: int = TOKENS, chunk: int = 65536, network: Network = NETWORK) -> Seen:
    return read_exactly(network, ids_of(network, tokens), method.needs, "c", chunk)


def kept(method: Method, seen: Seen, tokens: int) -> list[Tensor]:
    """Per layer: which tokens each KV head keeps of a budget of `tokens`."""
    budget = Budget.parse(f"{tokens}tok").allow(seen.network.row_bytes() * len(seen.token_ids), len(seen.token_ids))
    return [layer.route != EVICTED for layer in method.plan(seen, budget).layers]


def with_keys(seen: Seen, key: Tensor) -> Seen:
    """The same context, had the first layer these keys."""
    return replace(seen, layers=(replace(seen.layers[0], key=key), *seen.layers[1:]))


def random_keys(seed: int, tokens: int = TOKENS) -> Tensor:
    return torch.randn(NETWORK.kv_heads, tokens, NETWORK.dim, generator=torch.Generator().manual_seed(seed))


def best(scores: list[float], keep: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda t: scores[t], reverse=True)[:keep])


def assert_keeps(method: Method, seen: Seen, layer: int, keep: int, expected: list[list[float]]) -> None:
    """Of `keep` tokens, each KV head keeps those with the highest expected scores."""
    for row, scores in zip(kept(method, seen, keep)[layer], expected, strict=True):
        assert row.nonzero()[:, 0].tolist() == best(scores, keep)


# -- Knorm and KeyDiff: keys alone -------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 20, 50, 99])
def test_knorm_keeps_the_smallest_norms(keep: int) -> None:
    method = plugins.build_method("knorm")
    seen = see(method)
    for layer, x in enumerate(seen.layers):
        norms = [[-(sum(c * c for c in token) ** 0.5) for token in head] for head in x.key.double().tolist()]
        assert_keeps(method, seen, layer, keep, norms)
        for head, row in zip(x.key.norm(dim=-1), kept(method, seen, keep)[layer], strict=True):
            assert head[row].max() <= head[~row].min()


def test_knorm_does_not_see_rotations() -> None:
    method = plugins.build_method("knorm")
    seen = see(method)
    x = seen.layers[0]
    before = with_keys(seen, unrotate(x.key, *NETWORK.rope(x.position)))
    torch.testing.assert_close(method.scores(before, 0), method.scores(seen, 0), atol=1e-4, rtol=0)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31), st.sampled_from(["knorm", "keydiff"]), st.integers(1, TOKENS - 1))
def test_position_does_not_count(seed: int, name: str, keep: int) -> None:
    """Keys in another order: the same ones are kept."""
    method = plugins.build_method(name)
    key = random_keys(seed)
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(seed))
    seen = see(method)
    here, there = (kept(method, with_keys(seen, k), keep)[0] for k in (key, key[:, order]))
    assert torch.equal(here[:, order], there)


@pytest.mark.parametrize("keep", [1, 20, 50, 99])
def test_keydiff_keeps_what_differs_from_the_mean_direction(keep: int) -> None:
    method = plugins.build_method("keydiff")
    seen = see(method)
    for layer, x in enumerate(seen.layers):
        expected = []
        for head in x.key.double():
            unit = [token / (token @ token) ** 0.5 for token in head]
            anchor = sum(unit) / TOKENS
            expected.append([-float(u @ anchor / (anchor @ anchor) ** 0.5) for u in unit])
        assert_keeps(method, seen, layer, keep, expected)


def test_keydiff_keeps_the_odd_one_out() -> None:
    method = plugins.build_method("keydiff")
    key = random_keys(0, 1).expand(-1, TOKENS, -1).clone()
    key[:, 37] = random_keys(1, 1)[:, 0]
    keep = kept(method, with_keys(see(method), key), 1)[0]
    assert keep.nonzero()[:, 1].tolist() == [37, 37]


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31))
def test_keydiff_does_not_see_norms(seed: int) -> None:
    method, seen = plugins.build_method("keydiff"), see(plugins.build_method("keydiff"))
    key = random_keys(seed)
    stretch = torch.rand(key.shape[:2], generator=torch.Generator().manual_seed(seed))[..., None] * 9 + 0.1
    scores = [method.scores(with_keys(seen, k), 0) for k in (key, key * stretch)]
    torch.testing.assert_close(*scores, atol=1e-5, rtol=0)
    norms = [plugins.build_method("knorm").scores(with_keys(seen, k), 0) for k in (key, key * stretch)]
    assert not torch.allclose(*norms)


# -- H2O and TOVA: attention seen --------------------------------------------------------------------------------------


def attention(seen: Seen, query: Tensor, layer: int) -> Tensor:
    """Every query's causal softmax weights, row by row: (heads, queries, tokens), float64."""
    key = seen.layers[layer].key.double()
    heads, tokens, dim = query.shape
    found = torch.zeros(heads, tokens, tokens, dtype=torch.float64)
    for head in range(heads):
        own = key[head // (heads // len(key))]
        for i in range(tokens):
            weights = (own[: i + 1] @ query[head, i].double() / dim**0.5).exp()
            found[head, i, : i + 1] = weights / weights.sum()
    return found


@dataclass(frozen=True)
class Queries(Statistic):
    """The queries themselves."""

    def observe(self, state: Tensor | None, seen: Observed) -> Tensor:
        return seen.query if state is None else torch.cat([state, seen.query], 1)


@torch.inference_mode()
def queries_of(tokens: int = TOKENS) -> tuple[Tensor, ...]:
    """Each layer's queries, after the rotary embedding: (heads, tokens, dim)."""
    return read_exactly(NETWORK, ids_of(NETWORK, tokens), [Queries()]).statistics[Queries()]


@pytest.mark.parametrize("chunk", [65536, 64, 7], ids="chunks of {}".format)
@pytest.mark.parametrize("tokens", [TOKENS, 300])  # 300: more than one block of queries
def test_h2o_sums_what_every_query_attends_to(tokens: int, chunk: int) -> None:
    method = plugins.build_method("h2o")
    seen = see(method, tokens, chunk)
    for layer, query in enumerate(queries_of(tokens)):
        sums = attention(seen, query, layer).sum(1)
        found = seen.statistics[ColumnSums()][layer]
        torch.testing.assert_close(found.double(), sums, atol=1e-4, rtol=0)
        torch.testing.assert_close(found.sum(1), torch.full((4,), float(tokens)))  # each query has 1 to give
        group = [(sums[2 * g] + sums[2 * g + 1]).tolist() for g in range(2)]
        for keep in (10, 31, 80):
            recent = keep // 2
            for row, scores in zip(kept(method, seen, keep)[layer], group, strict=True):
                hitters = best(scores[: tokens - recent], keep - recent)
                assert row.nonzero()[:, 0].tolist() == [*hitters, *range(tokens - recent, tokens)]


@pytest.mark.parametrize("chunk", [65536, 64, 7], ids="chunks of {}".format)
def test_tova_keeps_what_the_newest_query_attends_to_in_the_mean_of_all_heads(chunk: int) -> None:
    method = plugins.build_method("tova")
    seen = see(method, chunk=chunk)
    for layer, query in enumerate(queries_of()):
        expected = attention(seen, query, layer)[:, -1].mean(0)
        scores = method.scores(seen, layer)
        torch.testing.assert_close(scores.double(), expected.expand(2, -1), atol=1e-6, rtol=0)
        torch.testing.assert_close(scores.sum(1), torch.ones(2))
        for keep in (1, 20, 50, 99):
            assert_keeps(method, seen, layer, keep, [expected.tolist()] * 2)
    first, second = kept(method, seen, 20)
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], second[0])


# -- Expected Attention ------------------------------------------------------------------------------------------------


@functools.cache
def rotation(position: int) -> Tensor:
    """The rotary embedding at a position as a matrix: pairs (i, i + dim / 2) turn by position * 10000^(-2i / dim)."""
    dim = NETWORK.dim
    matrix = torch.zeros(dim, dim, dtype=torch.float64)
    for i in range(dim // 2):
        angle = torch.tensor(position * 10000.0 ** (-2 * i / dim), dtype=torch.float64)
        j = i + dim // 2
        matrix[i, i], matrix[i, j] = angle.cos(), -angle.sin()
        matrix[j, i], matrix[j, j] = angle.sin(), angle.cos()
    return matrix


@functools.cache
def average_rotation(future: int, tokens: int) -> Tensor:
    return sum((rotation(tokens + p) for p in range(future)), torch.zeros_like(rotation(0))) / future


def gaussian(query: Tensor, sinks: int) -> tuple[Tensor, Tensor]:
    """Mean and covariance of one head's queries but the first ones, before their rotary embedding, in float64."""
    tokens = range(sinks, len(query))
    before = [rotation(t).T @ query[t].double() for t in tokens]
    mean = sum(before, torch.zeros(NETWORK.dim, dtype=torch.float64)) / len(tokens)
    return mean, sum(((q - mean).outer(q - mean) for q in before), torch.zeros_like(rotation(0))) / len(tokens)


def expected_weights(key: Tensor, mean: Tensor, covariance: Tensor, future: int, tokens: int) -> Tensor:
    """One head's exp(z) of each key."""
    average = average_rotation(future, tokens)
    mean, covariance = average @ mean, average @ covariance @ average.T
    dim = len(mean)
    return torch.stack([(k @ mean / dim**0.5 + k @ covariance @ k / (2 * dim)).exp() for k in key.double()])


@pytest.mark.parametrize("options", [{}, {"sinks": 0, "future": 3}, {"value_norm": False}, {"epsilon": 0.02}])
@pytest.mark.parametrize("chunk", [65536, 64, 3], ids="chunks of {}".format)
def test_expected_attention_is_the_mean_weight_of_gaussian_queries(options: dict[str, float], chunk: int) -> None:
    method = plugins.build_method("expected_attention", **options)
    set_to = {"sinks": 4, "future": 512, "epsilon": 0.0, "value_norm": True} | options
    sinks = int(set_to["sinks"])
    seen = see(method, chunk=chunk)
    for layer, query in enumerate(queries_of()):
        x = seen.layers[layer]
        expected = []
        for g in range(2):
            weights = []
            for head in (2 * g, 2 * g + 1):
                raw = expected_weights(x.key[g, sinks:], *gaussian(query[head], sinks), int(set_to["future"]), TOKENS)
                weights.append(raw / raw.sum())
            score = (weights[0] + weights[1]) / 2 + set_to["epsilon"]
            if set_to["value_norm"]:
                score = torch.stack([s * v.norm() for s, v in zip(score, x.value[g, sinks:].double(), strict=True)])
            expected.append(score)
        scores = method.scores(seen, layer)
        torch.testing.assert_close(scores[:, sinks:].double(), torch.stack(expected), atol=1e-6, rtol=1e-4)
        if not set_to["value_norm"]:
            torch.testing.assert_close(scores[:, sinks:].sum(1), torch.ones(2))
        for keep in (10, 40, 90):
            for row, score in zip(kept(method, seen, keep)[layer], expected, strict=True):
                others = [sinks + t for t in best(score.tolist(), keep - sinks)]
                assert row.nonzero()[:, 0].tolist() == [*range(sinks), *others]


def test_expected_attention_without_spread_is_the_next_mean_query() -> None:
    method = plugins.build_method("expected_attention", future=1, value_norm=False)
    seen = see(method)
    (need,) = method.needs
    fixed = tuple((mean, torch.zeros_like(covariance)) for mean, covariance in seen.statistics[need])
    seen = replace(seen, statistics={need: fixed})
    for layer, query in enumerate(queries_of()):
        key = seen.layers[layer].key[:, 4:].double()
        rows = [rotation(TOKENS) @ gaussian(query[head], 4)[0] for head in range(4)]
        weights = [(key[head // 2] @ row / NETWORK.dim**0.5).softmax(-1) for head, row in enumerate(rows)]
        expected = torch.stack([(weights[0] + weights[1]) / 2, (weights[2] + weights[3]) / 2])
        torch.testing.assert_close(method.scores(seen, layer)[:, 4:].double(), expected, atol=1e-6, rtol=0)


def test_expected_attention_agrees_with_drawn_queries() -> None:
    """Up to the softmax: the mean of exp(q.k / sqrt(dim)) over 20,000 Gaussian queries."""
    method = plugins.build_method("expected_attention", value_norm=False, sinks=0)
    (need,) = method.needs
    seen = see(method)
    seen = with_keys(seen, random_keys(3) * 0.3)
    draw = torch.Generator().manual_seed(0)
    spread = torch.randn(4, NETWORK.dim, NETWORK.dim, generator=draw) * 0.05
    mean = torch.randn(4, NETWORK.dim, generator=draw) * 0.1
    covariance = spread @ spread.mT
    seen = replace(seen, statistics={need: ((mean, covariance),) * 2})
    average = average_rotation(512, TOKENS)
    expected = torch.zeros(2, TOKENS, dtype=torch.float64)
    for head in range(4):
        noise = torch.randn(20000, NETWORK.dim, generator=draw)
        query = (mean[head] + noise @ spread[head].T).double() @ average.T
        weight = (query @ seen.layers[0].key[head // 2].double().T).exp().mean(0)
        expected[head // 2] += weight / weight.sum() / 2
    torch.testing.assert_close(method.scores(seen, 0).double(), expected, atol=0, rtol=0.01)
    flat = replace(seen, statistics={need: ((mean, covariance * 0),) * 2})
    assert not torch.allclose(method.scores(flat, 0).double(), expected, atol=0, rtol=0.01)  # the covariance counts


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 12])
def test_expected_attention_reads_contexts_of_hardly_more_than_sinks(tokens: int) -> None:
    method = plugins.build_method("expected_attention")
    scores = method.scores(see(method, tokens), 0)
    assert scores.shape == (2, tokens)
    assert (scores > 0).all()
    assert scores.isfinite().all()


# -- LagKV -------------------------------------------------------------------------------------------------------------


def lag_scores(key: Tensor, value: Tensor, lag: int, sinks: int) -> list[list[float]]:
    """One head's scores of each partition that has a full one behind it."""
    parts = (len(key) - sinks) // lag
    found = []
    for p in range(parts - 1):
        own = range(sinks + p * lag, sinks + (p + 1) * lag)
        each = []
        for x in (key.double(), value.double()):
            reference = x[sinks + (p + 1) * lag : sinks + (p + 2) * lag]
            low, high = reference.min(0).values, reference.max(0).values
            spread = torch.stack([((x[t] - low) / (high - low)).std() for t in own]).exp()
            each.append(spread / spread.sum())
        found.append(((each[0] + each[1]) / 2).tolist())
    return found


@pytest.mark.parametrize(("lag", "sinks"), [(8, 4), (10, 0), (16, 2)])
@pytest.mark.parametrize("tokens", [70, TOKENS, 131])
def test_lagkv_keeps_an_equal_share_of_each_partition(tokens: int, lag: int, sinks: int) -> None:
    method = plugins.build_method("lagkv", lag=lag, sinks=sinks)
    seen = see(method, tokens)
    parts = (tokens - sinks) // lag
    stay = lag + (tokens - sinks) % lag
    scores = [
        [lag_scores(key, value, lag, sinks) for key, value in zip(x.key, x.value, strict=True)] for x in seen.layers
    ]
    for each in range(1, lag):
        keep = sinks + (parts - 1) * each + stay  # the paper's length
        if keep < 2 * (sinks + stay):
            continue
        for layer, heads in zip(kept(method, seen, keep), scores, strict=True):
            for row, head in zip(layer, heads, strict=True):
                expected = [*range(sinks), *range(tokens - stay, tokens)]
                for p, partition in enumerate(head):
                    expected += [sinks + p * lag + t for t in best(partition, each)]
                assert row.nonzero()[:, 0].tolist() == sorted(expected)


def test_lagkv_gives_the_newest_partitions_what_does_not_divide() -> None:
    method = plugins.build_method("lagkv", lag=10, sinks=0)  # nine partitions are ranked, one stays
    seen = see(method)
    for keep in (37, 41):
        for row in torch.cat(kept(method, seen, keep)):
            counts = [int(part.sum()) for part in row.split(10)]
            assert counts == [(keep - 10) // 9] * (9 - (keep - 10) % 9) + [(keep - 10) // 9 + 1] * ((keep - 10) % 9) + [
                10
            ]


@pytest.mark.parametrize(("tokens", "keep"), [(300, 100), (200, 61), (20, 9)])
def test_lagkv_lets_what_stays_shrink_to_half(tokens: int, keep: int) -> None:
    method = plugins.build_method("lagkv")
    for row in torch.cat(kept(method, see(method, tokens), keep)):
        assert row[:4].all()
        assert row[tokens - (keep // 2 - 4) :].all()
        assert int(row.sum()) == keep
        middle = row[4 : 4 + 128] if tokens == 300 else row[4 : tokens - (keep - 4)]
        assert int(middle.sum()) == (keep - keep // 2 if tokens == 300 else 0)  # nothing ranked: the newest


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31))
def test_lagkv_does_not_see_how_a_channel_is_scaled(seed: int) -> None:
    method = plugins.build_method("lagkv", lag=16)
    draw = torch.Generator().manual_seed(seed)
    key = random_keys(seed)
    scale, shift = torch.rand(NETWORK.dim, generator=draw) * 4 + 0.2, torch.randn(NETWORK.dim, generator=draw)
    seen = see(method)
    spread = [method._spread(k, 5) for k in (key, key * scale + shift)]
    torch.testing.assert_close(*spread, atol=1e-5, rtol=0)
    one, other = (method.scores(with_keys(seen, k), 0) for k in (key, random_keys(seed + 1)))
    assert not torch.equal(one, other)


def test_lagkv_survives_channels_that_are_constant() -> None:
    method = plugins.build_method("lagkv", lag=16)
    key = random_keys(0)
    key[..., 3] = 1.5
    assert method._spread(key, 5).isfinite().all()
    key[:, 40:, 3] = 2.5  # constant in the partition that follows alone
    assert method._spread(key, 5).isfinite().all()
    assert torch.equal(method._spread(torch.zeros_like(key), 5), torch.full((2, 5, 16), 1 / 16))


def test_lagkv_ranks_a_partition_by_itself_and_the_next_alone() -> None:
    """What comes later changes nothing: reading on ranks further partitions, and those ranked stay as they were."""
    method = plugins.build_method("lagkv", lag=16)
    long, short = (method.scores(see(method, tokens), 0)[:, 4:36].floor() for tokens in (TOKENS, 60))
    assert torch.equal(long, short)
