"""What a codec is: how the keys, or the values, of one tier's rows in one layer are stored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvbench.cache.layout import Layout

Stored = dict[str, Tensor]
Tensors = TypeVar("Tensors", bound=tuple[Tensor, ...])


@dataclass(frozen=True, eq=False)
class Context:
    """What codecs work out once for a context: for all its layers, and for all steps of attention over it."""

    token_ids: Int[Tensor, " tokens"]
    positions: int  # of its rows: below this
    tables: dict[Hashable, tuple[Tensor, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, token_ids: Int[Tensor, " tokens"], positions: int, devices: Iterable[torch.device]) -> Contexts:
        """One on each device."""
        return {device: cls(token_ids.to(device), positions) for device in devices}

    def every_position(self) -> Int[Tensor, " positions"]:
        return torch.arange(self.positions, device=self.token_ids.device)

    def once(self, name: Hashable, make: Callable[[], Tensors]) -> Tensors:
        """What `make` returns; it is called the first time and kept: working memory, beside the store."""
        if name not in self.tables:
            self.tables[name] = make()
        return self.tables[name]  # type: ignore[return-value]


Contexts = dict[torch.device, Context]


@dataclass(frozen=True)
class Rows:
    """What a codec may know of the rows it stores. A value codec also sees their keys, as they will be decoded."""

    layout: Layout
    position: Int[Tensor, " rows"] | None = None  # where `needs_position`
    token: Int[Tensor, " rows"] | None = None  # the token ids, where `needs_token`
    key: Float[Tensor, "rows dim"] | None = None  # for value codecs
    context: Context | None = None  # where what is asked is asked of many rows or often; then `token` is left out


class Codec(ABC):
    """Final subclasses are frozen dataclasses in kvbench/cache/codecs/, one per file.

    Byte formulas must match what `fit` and `encode` leave: the cache compares them with the measured storages.
    """

    @property
    def needs_position(self) -> bool:
        """Whether each row's position must be held."""
        return False

    @property
    def needs_token(self) -> bool:
        """Whether the context's token ids must be held (needs positions too)."""
        return False

    @property
    def needs_key(self) -> bool:
        """Whether a value is made from its row's key."""
        return False

    @property
    def group(self) -> int:
        """Rows of one KV head that are encoded together, as per-channel quantisation does."""
        return 1

    @property
    def shared(self) -> tuple[Tensor, ...]:
        """Tensors of a per-model artefact that decoding reads."""
        return ()

    def fixed_bytes(self, kv_heads: int, dim: int, dtype: torch.dtype) -> int:
        """Bytes that `fit` leaves per layer and context."""
        return 0

    @abstractmethod
    def group_bytes(self, dim: int, dtype: torch.dtype) -> tuple[int, int]:
        """(payload, metadata) bytes that `encode` leaves per group of rows."""

    def fit(self, x: Float[Tensor, "rows dim"], rows: Rows) -> Stored:
        """What is stored once per layer and context."""
        return {}

    @abstractmethod
    def encode(self, x: Float[Tensor, "rows dim"], rows: Rows, fixed: Stored) -> Stored:
        """What is stored per group: tensors whose first axis is the groups, in the order of the rows."""

    @abstractmethod
    def decode(self, stored: Stored, rows: Rows, fixed: Stored, like: torch.dtype) -> Float[Tensor, "rows dim"]:
        """The rows as attention sees them, in the model's dtype `like`."""

    def squared_error(self, x: Float[Tensor, "rows dim"], rows: Rows) -> Float[Tensor, " rows"]:
        """How far each row would come back from what it was, were all of them stored: what a router decides by.

        In float32; an expectation where that is cheaper than to encode.
        """
        fixed = self.fit(x, rows)
        back = self.decode(self.encode(x, rows, fixed), rows, fixed, torch.float32)
        return (back - x.float()).square().sum(-1)

    # -- attention over what is stored: exact up to rounding, without decoding where a codec can do better ---------

    def dot(
        self, query: Float[Tensor, "kv_heads new dim"], stored: Stored, rows: Rows, fixed: Stored
    ) -> Float[Tensor, "kv_heads new width"]:
        """Each head's `query` times its decoded rows, in float32."""
        return product(query, rows.layout.pad(self.decode(stored, rows, fixed, torch.float32)).mT)

    def mix(
        self, weights: Float[Tensor, "kv_heads new width"], stored: Stored, rows: Rows, fixed: Stored
    ) -> Float[Tensor, "kv_heads new dim"]:
        """`weights` @ the decoded rows of each head, in float32."""
        return product(weights, rows.layout.pad(self.decode(stored, rows, fixed, torch.float32)))


def product(
    a: Float[Tensor, "heads new some"], b: Float[Tensor, "heads some other"]
) -> Float[Tensor, "heads new other"]:
    """a @ b in float32; a GPU reads a narrower b as it is, a CPU widens it."""
    if b.dtype == torch.float32:
        return a @ b
    return torch.bmm(a.to(b.dtype), b, out_dtype=torch.float32) if b.is_cuda else a @ b.float()
