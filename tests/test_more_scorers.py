"""What further eviction scorers keep, against their papers' formulas written out with loops."""

from __future__ import annotations

from dataclasses import replace

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
from kvbench.prefill import Seen, read_exactly

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
