"""What the eviction scorers keep, against attention matrices written out in full, and how a route is filled."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import ids_of, tiny_network
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from kvbench import plugins
from kvbench.budget import Allowance, Budget
from kvbench.cache.hf import Network
from kvbench.method import Method
from kvbench.plan import EVICTED, shrink, top_rows
from kvbench.prefill import Observed, Seen, read_exactly
from kvbench.toolbox.statistics import WindowAttention

TOKENS = 100


@pytest.fixture(scope="module")
def network() -> Network:
    return tiny_network()


@torch.inference_mode()
def see(network: Network, method: Method, tokens: int = TOKENS, chunk: int = 65536, name: str = "c") -> Seen:
    return read_exactly(network, ids_of(network, tokens), method.needs, name, chunk)


def kept(method: Method, seen: Seen, tokens: int) -> list[Tensor]:
    """Per layer: which tokens each KV head keeps of a budget of `tokens`."""
    budget = Budget.parse(f"{tokens}tok").allow(seen.network.row_bytes() * len(seen.token_ids), len(seen.token_ids))
    return [layer.route != EVICTED for layer in method.plan(seen, budget).layers]


# -- SnapKV ------------------------------------------------------------------------------------------------------------


def eager_scores(network: Network, tokens: int, window: int, pool: int) -> list[Tensor]:
    """SnapKV's scores from stock transformers' full attention matrices."""
    config: Any = copy.deepcopy(network._model.config)
    stock = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    stock.load_state_dict(network._model.state_dict())
    with torch.inference_mode():
        matrices = stock(ids_of(network, tokens)[None], output_attentions=True).attentions
    found = []
    for matrix in matrices:
        rows = matrix[0, :, -window:].mean(1)  # heads, tokens
        group = torch.stack([rows[2 * g : 2 * g + 2].mean(0) for g in range(network.kv_heads)])
        near = [range(max(t - pool // 2, 0), min(t + pool // 2 + 1, tokens)) for t in range(tokens)]
        found.append(torch.stack([group[:, list(places)].mean(1) for places in near], 1))
    return found


@pytest.mark.parametrize("chunk", [65536, 64, 37, 9, 1], ids="chunks of {}".format)
@pytest.mark.parametrize(("tokens", "window", "pool"), [(TOKENS, 16, 5), (TOKENS, 1, 1), (TOKENS, 99, 7), (12, 16, 3)])
def test_snapkv_scores_are_those_of_the_full_attention_matrix(
    network: Network, tokens: int, window: int, pool: int, chunk: int
) -> None:
    method = plugins.build_method("snapkv", window=window, pool=pool)
    seen = see(network, method, tokens, chunk)
    for layer, expected in enumerate(eager_scores(network, tokens, window, pool)):
        torch.testing.assert_close(method.scores(seen, layer), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tokens", [20, 32, 60, 99])
def test_snapkv_keeps_its_window_and_the_best_of_the_rest(network: Network, tokens: int) -> None:
    method = plugins.build_method("snapkv", window=10, pool=1)
    seen = see(network, method)
    for layer, keep in enumerate(kept(method, seen, tokens)):
        assert keep[:, -10:].all()
        assert (keep.sum(1) == tokens).all()
        scores = method.scores(seen, layer)[:, :-10]
        for row, chosen in zip(scores, keep[:, :-10], strict=True):
            assert tokens == 99 or row[chosen].min() >= row[~chosen].max()


def test_snapkv_keeps_a_context_shorter_than_its_window_by_the_newest_half(network: Network) -> None:
    method = plugins.build_method("snapkv", window=64)
    seen = see(network, method, 40)
    for keep in kept(method, seen, 20):
        assert keep[:, -10:].all()
        assert (keep.sum(1) == 20).all()


@pytest.mark.parametrize("position", [0, 1, 23, 57, 70])
def test_snapkv_keeps_a_planted_key(network: Network, position: int) -> None:
    """A key parallel to one query of the window is kept, by the KV head of that query alone."""
    method = plugins.build_method("snapkv", window=16, pool=1)
    heads, kv_heads, dim = network.heads, network.kv_heads, network.dim
    draw = torch.Generator().manual_seed(position)
    query = torch.randn(heads, TOKENS, dim, generator=draw)
    key = torch.randn(kv_heads, TOKENS, dim, generator=draw) * 0.3
    key[1, position] = 20 * query[3, -5] / query[3, -5].norm()
    key[0, position] = -query[:2, -16:].mean((0, 1))  # what the other head would rather not see
    observed = Observed(0, query, key, key, 0, TOKENS, dim**-0.5)
    need = WindowAttention(16)
    state = need.observe(None, observed)
    seen = replace(see(network, method), statistics={need: (state, state)})
    for keep in kept(method, seen, 34):
        assert keep[1, position]
        assert method.scores(seen, 0)[1].argmax() == position
        assert method.scores(seen, 0)[0].argmax() != position


# -- StreamingLLM ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sinks", "tokens"), [(4, 8), (4, 50), (0, 7), (1, 99), (20, 41), (3, TOKENS), (0, 1)])
def test_streamingllm_keeps_the_first_and_the_last(network: Network, sinks: int, tokens: int) -> None:
    method = plugins.build_method("streamingllm", sinks=sinks)
    seen = see(network, method)
    expected = [*range(sinks), *range(TOKENS - (tokens - sinks), TOKENS)] if tokens < TOKENS else list(range(TOKENS))
    for keep in kept(method, seen, tokens):
        for row in keep:
            assert row.nonzero()[:, 0].tolist() == expected


def test_streamingllm_shrinks_its_sinks_to_half(network: Network) -> None:
    method = plugins.build_method("streamingllm", sinks=30)
    for keep in kept(method, see(network, method), 20):
        assert keep.nonzero()[:, 1].unique().tolist() == [*range(10), *range(TOKENS - 10, TOKENS)]


# -- Random ------------------------------------------------------------------------------------------------------------


def test_random_favours_no_position(network: Network) -> None:
    method = plugins.build_method("random")
    seen, contexts, keep = see(network, method), 400, 25
    counts = torch.zeros(network.layers, network.kv_heads, TOKENS)
    for i in range(contexts):
        counts += torch.stack(kept(method, replace(seen, context_id=f"context-{i}"), keep))
    mean, spread = contexts * keep / TOKENS, (contexts * keep / TOKENS * (1 - keep / TOKENS)) ** 0.5
    assert (counts - mean).abs().max() < 4.5 * spread  # of 400 counts: once in 700 choices of seeds
    assert 0.7 < float(counts.std() / spread) < 1.3
    both = counts.sum((0, 1))  # neither over the layers and heads together: they are drawn apart
    assert (both - 4 * mean).abs().max() < 4 * 2 * spread


def test_random_draws_by_context_layer_head_and_seed(network: Network) -> None:
    method = plugins.build_method("random")
    seen = see(network, method)
    first = kept(method, seen, 30)
    torch.rand(5)
    again = kept(method, see(network, method, chunk=16), 30)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0][0], first[0][1])
    for other in (
        kept(method, replace(seen, context_id="d"), 30),
        kept(plugins.build_method("random", seed=1), seen, 30),
    ):
        assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_random_protects_what_it_is_told_to(network: Network) -> None:
    method = plugins.build_method("random", sinks=4, window=8)
    for keep in kept(method, see(network, method), 40):
        assert keep[:, :4].all()
        assert keep[:, -8:].all()
        assert (keep.sum(1) == 40).all()


def test_a_smaller_budget_keeps_a_part_of_what_a_larger_one_keeps(network: Network) -> None:
    """Scores don't depend on the budget."""
    for name in ("random", "snapkv", "streamingllm"):
        method = plugins.build_method(name, **({"window": 10} if name == "snapkv" else {}))
        seen = see(network, method)
        for small, large in zip(kept(method, seen, 30), kept(method, seen, 60), strict=True):
            assert (large | ~small).all(), name


# -- filling a route ---------------------------------------------------------------------------------------------------

SIZES = st.tuples(st.integers(0, 40), st.integers(0, 40)), st.integers(1, 70), st.integers(1, 60)


@settings(deadline=None, max_examples=300)
@given(*SIZES, st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 3))
def test_top_rows_keeps_as_many_as_it_says_and_what_is_protected(
    protect: tuple[int, int], keep: int, tokens: int, dtype: torch.dtype, kind: int
) -> None:
    draw = torch.Generator().manual_seed(tokens)
    scores = [
        torch.zeros(2, tokens),  # nothing but ties
        torch.rand(2, tokens, generator=draw),
        torch.rand(2, tokens, generator=draw) * 3e38,  # no score can outbid protection
        1 + torch.rand(2, tokens, generator=draw) * 1e-3,  # equal in bfloat16
    ][kind].to(dtype)
    route = top_rows(scores, keep, protect)
    assert route.dtype == torch.int8
    assert set(route.unique().tolist()) <= {0, EVICTED}
    assert (route == 0).sum(1).tolist() == [min(keep, tokens)] * 2
    first, last = shrink(protect, keep, tokens)
    assert (route[:, :first] == 0).all()
    assert (route[:, tokens - last :] == 0).all()
    middle, chosen = scores[:, first : tokens - last], route[:, first : tokens - last] == 0
    for row, mine in zip(middle, chosen, strict=True):
        assert mine.all() or not mine.any() or row[mine].min() >= row[~mine].max()


@settings(deadline=None, max_examples=500)
@given(*SIZES)
def test_protection_is_kept_where_it_fits_and_takes_half_at_most(
    protect: tuple[int, int], keep: int, tokens: int
) -> None:
    first, last = shrink(protect, keep, tokens)
    assert first >= 0
    assert last >= 0
    if keep >= tokens:
        assert (first, last) == (0, 0)
    elif sum(protect) <= keep // 2:
        assert (first, last) == protect
    else:
        assert first <= protect[0]
        assert last <= protect[1]
        assert first + last == keep // 2


def test_rows_are_bounded_by_the_allowance(network: Network) -> None:
    method = plugins.build_method("streamingllm")
    seen = see(network, method)
    for limit in range(network.row_bytes(), 12 * network.row_bytes(), 131):
        rows = [int((layer.route == 0).sum(1).max()) for layer in method.plan(seen, Allowance(limit)).layers]
        assert rows == [limit // network.row_bytes()] * network.layers
