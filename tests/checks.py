"""What must hold for any compressed cache, whatever made it: shared by the conformance suite and the toys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from conftest import ids_of

from kvbench.cache.fork import Fork
from kvbench.cache.hf import Network
from kvbench.cache.packed import CompressedCache
from kvbench.decode import feed
from kvbench.method import Method

NEW = 7


@torch.inference_mode()
def forks_never_see_each_other(network: Network, cache: CompressedCache, method: Method) -> None:
    """Two forks of one cache, and a fork of a fork that went on for a turn."""
    first, second = ids_of(network, NEW, seed=3)[None], ids_of(network, NEW, seed=4)[None]
    alone = feed(network, [Fork(cache, method)], second)
    parent = Fork(cache, method)
    feed(network, [parent], first)
    child = parent.fork()
    feed(network, [parent], first)  # the parent goes on after the fork
    continued = feed(network, [child], second)
    assert torch.equal(feed(network, [Fork(cache, method)], second), alone)
    fresh = Fork(cache, method)
    feed(network, [fresh], first)
    assert torch.equal(feed(network, [fresh], second), continued)
    assert not torch.equal(alone, continued)


@torch.inference_mode()
def batch_equals_solo(network: Network, caches: Sequence[CompressedCache], method: Method) -> None:
    """Forks of different caches, fed in one batch."""
    new = torch.stack([ids_of(network, NEW, seed=5 + i) for i in range(len(caches))])
    together = feed(network, [Fork(c, method) for c in caches], new)
    alone = [feed(network, [Fork(c, method)], n[None])[0] for c, n in zip(caches, new, strict=True)]
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-4, rtol=0)


@torch.inference_mode()
def block_equals_single(network: Network, cache: CompressedCache, method: Method) -> None:
    """Tokens fed at once, or one by one."""
    new = ids_of(network, NEW, seed=7)[None]
    block = feed(network, [Fork(cache, method)], new)
    fork = Fork(cache, method)
    single = torch.cat([feed(network, [fork], new[:, i : i + 1]) for i in range(NEW)], 1)
    torch.testing.assert_close(block, single, atol=1e-4, rtol=0)
