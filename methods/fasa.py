"""FASA."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, UInt8
from torch import Tensor

from kvbench.artefact import Calibration
from kvbench.budget import Allowance
from kvbench.cache.fork import Event, Selection
from kvbench.errors import UsageError
from kvbench.method import Axis, Base, Family, Method, Trust
from kvbench.plan import Plan, keep_all
from kvbench.prefill import Seen
from kvbench.toolbox.planes import PlaneAgreement
from kvbench.toolbox.reading import best_within, keep_all_with, layer_reading


@dataclass(frozen=True)
class FASA(Method):
    """Hold everything, read the tokens that a query head's dominant rotary planes rank first (FASA, arXiv 2602.03152).

    Dominant are the `share` of a query head's planes that alone find most of the tokens that all of them find; fitted
    once per model. A plane is a pair of dimensions that turn together (the released code takes neighbours).
    Every query head reads its own tokens, as many as the other heads of its group; what the group reads is within the
    budget, and so are the dominant dimensions of all keys, those of any head of the group. Differs: all tokens after
    the context choose, the question's too; `dense=1`, the released code's first layer that reads everything, is not the
    default, since at small budgets it is much of what may be read; planes are ranked by their 256 best of 2,048 tokens
    of texts of no task, whatever the budget.
    """

    family: ClassVar[Family] = Family.retrieval
    trust: ClassVar[Trust] = Trust.parity
    holds: ClassVar[str] = "all tokens, exact, and which planes are dominant"
    axis: ClassVar[Axis] = Axis.READ
    budget_base: ClassVar[Base] = Base.seen
    selects: ClassVar[bool] = True
    fixed_rate: ClassVar[bool] = True  # below the dominant dimensions and a token per query head there is nothing

    share: float = 0.25
    dense: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1 or self.dense < 0:
            raise UsageError(f"method.share={self.share} method.dense={self.dense}: above 0 to 1, and at least 0")

    @property
    def calibrations(self) -> frozenset[Calibration]:
        return frozenset({PlaneAgreement()})

    def plan(self, seen: Seen, budget: Allowance) -> Plan:
        agreement = seen.artefacts[PlaneAgreement()].tensors["agreement"]
        best = agreement.topk(max(round(self.share * agreement.shape[2]), 1), dim=-1).indices.to(torch.uint8)
        network, layers = seen.network, len(seen.layers)
        widths = [
            int(dimensions(x, seen.dim).unflatten(0, (network.kv_heads, -1)).any(1).sum()) * seen.dtype.itemsize
            for x in best
        ]
        mean = math.ceil(
            sum(widths[self.dense :]) / max(layers - self.dense, 1)
        )  # so that all layers read as many rows
        least = mean * (len(seen.token_ids) + 1) + network.heads // network.kv_heads * network.row_bytes() // layers
        reading = layer_reading(seen, budget, least, self.dense)
        if reading.everything:
            return keep_all(seen)
        own = (x.to(y.key.device, copy=True) for x, y in zip(best, seen.layers, strict=True))
        each = enumerate(zip(own, widths, strict=True))
        return keep_all_with(seen, (None if i < self.dense else (reading, mean, x, w) for i, (x, w) in each))

    def select(self, state: Any, event: Event) -> tuple[Any, Selection]:
        if state is None or state[0].all(event.slots):
            return state, Selection()
        reading, mean, planes, width = state
        kv_heads, _, dim = event.key.shape
        query = event.query[:, 0].float() * dimensions(planes, dim)
        scores = (query.unflatten(0, (kv_heads, -1)) @ event.key.float().mT).flatten(0, 1)
        rows = max(reading.rows(event, mean * event.slots), len(query) // kv_heads)  # one for each query head
        return state, Selection(best_within(scores, kv_heads, rows)[:, None], scanned=width * event.slots)


def dimensions(planes: UInt8[Tensor, "heads planes"], dim: int) -> Bool[Tensor, "heads dim"]:
    """Where the two dimensions of each plane are."""
    every = torch.zeros(len(planes), dim // 2, dtype=torch.bool, device=planes.device)
    return every.scatter(1, planes.long(), True).repeat(1, 2)
