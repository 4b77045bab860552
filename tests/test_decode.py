"""Answers that advance in one batch are, bit for bit, those that are decoded alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import ids_of

from kvbench.cache.fork import Fork
from kvbench.cache.hf import Network
from kvbench.cache.packed import CompressedCache
from kvbench.decode import feed, greedy, rows_together
from kvbench.method import Method
from kvbench.model import Model
from kvbench.plan import keep_all
from kvbench.prefill import read_exactly


def contexts(network: Network, number: int) -> list[CompressedCache]:
    """Full caches of different lengths."""
    found = [read_exactly(network, ids_of(network, 20 + 7 * i, seed=i)) for i in range(number)]
    return [CompressedCache.pack(keep_all(seen), seen) for seen in found]


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
