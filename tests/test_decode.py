"""Answers that advance in one batch are, bit for bit, those that are decoded alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import ids_of

from kvbench import plugins
from kvbench.budget import Allowance, Budget
from kvbench.cache.fork import Fork
from kvbench.cache.hf import Network
from kvbench.cache.packed import CompressedCache
from kvbench.decode import feed, follow, follow_each, greedy, rows_together
from kvbench.method import Method
from kvbench.model import Model
from kvbench.plan import Plan, keep_all
from kvbench.prefill import Seen, read_exactly


def contexts(network: Network, number: int, plan: Callable[[Seen], Plan] = keep_all) -> list[CompressedCache]:
    """Caches of contexts of different lengths."""
    found = [read_exactly(network, ids_of(network, 20 + 7 * i, seed=i)) for i in range(number)]
    return [CompressedCache.pack(plan(seen), seen) for seen in found]


def started(network: Network, caches: list[CompressedCache]) -> tuple[list[Fork], torch.Tensor]:
    """Forks that have read one more token, alone, and the logits after it."""
    forks = [Fork(cache, Method()) for cache in caches]
    return forks, torch.cat([feed(network, [fork], torch.tensor([[5]]))[:, -1] for fork in forks])


@torch.inference_mode()
def test_an_answer_in_company_is_the_answer_alone(tiny: Model) -> None:
    network = tiny.network
    assert rows_together(network, 4) == 4  # or the rest of this test proves nothing
    caches = contexts(network, 6)
    forks, logits = started(network, caches)
    together = greedy(network, forks, logits, lambda ids: ids[-1] % 7 == 0, 12, rows=4)
    for i, cache in enumerate(caches):
        [fork], first = started(network, [cache])
        assert greedy(network, [fork], first, lambda ids: ids[-1] % 7 == 0, 12, rows=4) == [together[i]]
        assert torch.equal(fork.layers[-1].tail[1], forks[i].layers[-1].tail[1])  # to the last bit
    assert len({len(answer) for answer in together}) > 1  # some ended early


@torch.inference_mode()
def test_idle_rows_change_nothing_but_rounding(tiny: Model) -> None:
    caches = contexts(tiny.network, 2)
    forks, logits = started(tiny.network, caches)
    others, _ = started(tiny.network, caches)
    token = logits.argmax(-1, keepdim=True)
    found = feed(tiny.network, forks, token, rows=8)
    torch.testing.assert_close(found, feed(tiny.network, others, token), atol=1e-4, rtol=0)
    assert found.shape[:2] == (2, 1)


def test_a_machine_where_company_changes_bits_decodes_alone(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Network.hidden

    def coupled(self: Network, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        return real(self, ids, *rest) + 1e-6 * ids.sum()

    monkeypatch.setattr(Network, "hidden", coupled)
    assert rows_together(tiny.network, 8) == 1


@torch.inference_mode()
@pytest.mark.parametrize("method", ["full", "snapkv"])
def test_branches_see_what_goes_before_them_and_not_each_other(tiny: Model, method: str) -> None:
    """One pass over a question and several continuations of it, or one pass each: the same logits and fork."""
    network = tiny.network
    made = plugins.build_method(method)
    seen = read_exactly(network, ids_of(network, 60), made.needs)
    cache = CompressedCache.pack(made.plan(seen, Budget.parse("0.5").allow(60 * network.row_bytes(), 60)), seen)
    ids, branches = ids_of(network, 9, seed=1), [(5, 6, 7, 8), (9,), (5, 6, 3)]
    fork, plain = Fork(cache, made), Fork(cache, made)
    first, found = follow(network, fork, ids, branches)
    expected = feed(network, [plain], ids[None])[0, -1]
    torch.testing.assert_close(first, expected, atol=1e-4, rtol=0)
    for branch, logits in zip(branches, [x.logits for x in found], strict=True):
        assert len(logits) == len(branch)
        torch.testing.assert_close(logits[0], expected, atol=1e-4, rtol=0)
        if len(branch) > 1:
            alone = feed(network, [plain.fork()], torch.tensor([branch[:-1]]))[0]
            torch.testing.assert_close(logits[1:], alone, atol=1e-4, rtol=0)
    token = torch.tensor([[4]])
    assert fork.tail_bytes == plain.tail_bytes
    torch.testing.assert_close(feed(network, [fork], token), feed(network, [plain], token), atol=1e-4, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("size", [2, 3])
def test_forks_that_read_token_by_token_advance_together(tiny: Model, size: int) -> None:
    """Company changes no bit, and rows only rounding; a fork that reads all at once keeps its place among them."""
    network, method = tiny.network, plugins.build_method("streamingllm", decode=True)
    half = Allowance(10 * network.row_bytes())
    stepping = [Fork(cache, method) for cache in contexts(network, size, lambda seen: method.plan(seen, half))]
    plain = Fork(contexts(network, 1)[0], Method())
    ids, branches = ids_of(network, 5, seed=1), [(5, 6, 7, 8), (9,)]
    forks = [stepping[0], plain, *stepping[1:]]
    alone = [next(follow_each(network, [fork.fork()], ids, branches, rows=4)) for fork in forks]
    by_itself = [follow(network, fork.fork(), ids, branches) for fork in forks]
    together = list(follow_each(network, forks, ids, branches, rows=4))
    for (first, found), (same, expected), (near, rounded) in zip(together, alone, by_itself, strict=True):
        assert torch.equal(first, same)
        torch.testing.assert_close(first, near, atol=1e-4, rtol=0)
        for one, other, third in zip(found, expected, rounded, strict=True):
            assert torch.equal(one.logits, other.logits)
            assert one.usage == other.usage == third.usage
    assert [fork.next_position for fork in forks] == [25, 25, *(32 + 7 * i for i in range(size - 1))]
