"""MiKV: nobody is evicted, balanced keys lose less, important tokens stay exact."""

from __future__ import annotations

import pytest
import torch
from conftest import ids_of

from kvbench import plugins
from kvbench.budget import Budget
from kvbench.cache.codecs.balanced import Balanced
from kvbench.cache.codecs.base import Rows
from kvbench.cache.codecs.quant import Quant
from kvbench.cache.layout import Layout
from kvbench.cache.packed import CompressedCache
from kvbench.model import Model
from kvbench.plan import top_rows
from kvbench.prefill import Seen, read_exactly

TOKENS = 150


@pytest.fixture
def seen(tiny: Model) -> Seen:
    return read_exactly(tiny.network, ids_of(tiny.network, TOKENS), plugins.build_method("mikv").needs, "c")


def test_every_token_is_held_and_the_important_ones_exactly(seen: Seen) -> None:
    method = plugins.build_method("mikv", bits=4)
    full = seen.network.row_bytes() * TOKENS
    plan = method.plan(seen, Budget.parse("0.6").allow(full, TOKENS))
    cache = CompressedCache.pack(plan, seen)
    for i, layer in enumerate(plan.layers):
        assert set(layer.route.unique().tolist()) == {0, 1}  # none evicted
        important = int((layer.route[0] == 0).sum())
        assert torch.equal(layer.route == 0, top_rows(method.scores(seen, i), important, method.protect) == 0)
        slab = cache.layers[i].slabs[0]
        exact = slab.decode(None, torch.float32)[0]
        assert torch.equal(exact, seen.layers[i].key[layer.route == 0])


def test_the_balance_makes_channel_maxima_of_queries_and_keys_equal(seen: Seen) -> None:
    tier = plugins.build_method("mikv")._low(seen, 0)
    assert isinstance(tier.key, Balanced)
    key = seen.layers[0].key
    balanced_key = (key * tier.key.balance[:, None]).abs().amax(1)
    statistic = next(s for s in seen.statistics if type(s).__name__ == "QueryMaxima")
    query = seen.statistics[statistic][0].unflatten(0, (len(key), -1)).amax(1)
    torch.testing.assert_close(balanced_key, query / tier.key.balance, rtol=1e-4, atol=1e-6)


def test_a_balance_tames_an_outlying_channel() -> None:
    """2 bits over a block with one channel 50 times the others: balanced, the others keep their differences."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 64, generator=generator)
    x[:, 7] *= 50
    rows = Rows(Layout((40,), shared=True))
    balance = torch.ones(1, 64)
    balance[0, 7] = 1 / 50

    def error(codec: Quant | Balanced) -> float:
        fixed = codec.fit(x, rows)
        back = codec.decode(codec.encode(x, rows, fixed), rows, fixed, torch.float32)
        others = torch.arange(64) != 7
        return float((back - x)[:, others].square().mean())

    assert error(Balanced(Quant(2, 64), balance)) < 0.2 * error(Quant(2, 64))
