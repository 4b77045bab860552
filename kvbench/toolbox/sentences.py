"""Where sentences end, as a model's tokenizer cuts text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from kvbench.artefact import Calibration

if TYPE_CHECKING:
    from kvbench.model import Model

_MARKS = tuple(".!?\n。！？…")


@dataclass(frozen=True)
class SentenceEnds(Calibration):
    """The tokens (`ids`) whose text ends with a full stop, a question or exclamation mark, or a line end.

    Blanks at its end don't count. Read off the vocabulary: no text is needed.
    """

    def fit(self, model: Model) -> tuple[dict[str, Tensor], dict[str, Any]]:
        texts = (model.writer.decode([i]) for i in range(model.network.vocabulary))
        ids = [i for i, text in enumerate(texts) if text.rstrip(" ").endswith(_MARKS)]
        return {"ids": torch.tensor(ids, dtype=torch.int32)}, {}


def sentences(ids: Int[Tensor, " tokens"], ends: Int[Tensor, " ends"]) -> Int[Tensor, " tokens"]:
    """The sentence of each token, counted from 0; a token that ends one belongs to it."""
    end = torch.isin(ids, ends.to(ids))
    return end.cumsum(0) - end.long()
