"""Draft models: smaller ones with the same tokens, or the model itself."""

from __future__ import annotations

from functools import lru_cache

from jaxtyping import Int
from torch import Tensor

from kvbench.cache.fork import Fork
from kvbench.cache.hf import Network
from kvbench.cache.packed import CompressedCache
from kvbench.cell import ModelConfig
from kvbench.decode import feed, greedy
from kvbench.errors import UsageError
from kvbench.method import Method
from kvbench.model import Model, load_model
from kvbench.plan import keep_all
from kvbench.prefill import Reader, read_exactly

SELF = "self"


def draft_network(draft: str, reader: Reader) -> Network:
    """The network called `draft`: `self` or what `model.path` takes. Raises UsageError if its tokens are others."""
    if draft == SELF:
        return reader.network
    dtype = str(reader.network.dtype).removeprefix("torch.")
    model = _load(draft, dtype, str(reader.network.device))
    if reader.model and reader.model.writer.tokenizer.get_vocab() != model.writer.tokenizer.get_vocab():
        raise UsageError(f"method.draft={draft} has another vocabulary than {reader.model.config.name}")
    return model.network


@lru_cache(maxsize=1)
def _load(path: str, dtype: str, device: str) -> Model:
    return load_model(ModelConfig(path, path, dtype=dtype, device=device))


def lookahead(reader: Reader, network: Network, new: int) -> Int[Tensor, " new"]:
    """The draft's greedy continuation of the context; fewer tokens where it ends its turn, or has read but one."""
    ids = reader.token_ids
    if not new or len(ids) < 2:
        return ids[:0]
    stop = reader.model.stop if reader.model else frozenset()
    with reader.drafting(network):
        seen = read_exactly(network, ids[:-1])
        cache = CompressedCache.pack(keep_all(seen), seen)
        fork = Fork(cache, Method())
        first = feed(network, [fork], ids[None, -1:], last_only=True)[:, -1]
        [found] = greedy(network, [fork], first, lambda answer: answer[-1] in stop, new)
    reader.holds(cache.nbytes + fork.tail_bytes)
    return ids.new_tensor(found)
