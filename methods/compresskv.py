"""CompressKV."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvbench.artefact import Calibration
from kvbench.errors import UsageError
from kvbench.method import Family, Method, Scale, Trust
from kvbench.prefill import Seen, Statistic
from kvbench.toolbox.retrieval_heads import LayerErrors, SemanticHeads, best_heads, heads_scores, layer_rows
from kvbench.toolbox.statistics import WindowAttention


@dataclass(frozen=True)
class CompressKV(Method):
    """Keep what a layer's semantic retrieval heads attend to, for all its heads (CompressKV, arXiv 2508.02401).

    Those heads are the share `heads` of a layer's query heads (the paper: 4 of 32) that look most at a needle while
    repeating it. Their attention in the last `window` queries, average-pooled over `pool` tokens, chooses one set of
    tokens for the layer. Layers that lose more get more rows: at least 32, at most three times the mean. Differs: both
    are calibrated on texts of no task (the paper measures its layers on LongBench), with answers given to the model.
    """

    family: ClassVar[Family] = Family.scorer
    trust: ClassVar[Trust] = Trust.paper
    query_aware: ClassVar[bool] = True
    scale: ClassVar[Scale] = Scale.mass

    heads: float = 0.125
    window: int = 8
    pool: int = 5

    def __post_init__(self) -> None:
        if not 0 < self.heads <= 1:
            raise UsageError(f"method.heads={self.heads} is not a share of the heads")
        if self.window < 1 or self.pool < 1 or self.pool % 2 == 0:
            raise UsageError(f"method.window={self.window} method.pool={self.pool}: both at least 1, pool odd")

    @property
    def needs(self) -> frozenset[Statistic]:
        return frozenset({WindowAttention(self.window)})

    @property
    def layer_errors(self) -> LayerErrors:
        return LayerErrors(self.heads, self.window, self.pool)

    @property
    def calibrations(self) -> frozenset[Calibration]:
        return frozenset({SemanticHeads(), self.layer_errors})

    @property
    def protect(self) -> tuple[int, int]:
        return (0, self.window)

    def scores(self, seen: Seen, layer: int) -> Float[Tensor, "kv_heads tokens"]:
        chosen = best_heads(seen.artefacts[SemanticHeads()].tensors["heads"], self.heads)[layer]
        attention = seen.statistics[WindowAttention(self.window)][layer]
        scores = heads_scores(attention, chosen, self.window, self.pool)
        return scores.expand(seen.layers[layer].key.shape[0], -1)

    def allocate(
        self, seen: Seen, scores: Sequence[Float[Tensor, "kv_heads tokens"]], rows: int
    ) -> Int[Tensor, "layers kv_heads"]:
        kv_heads, tokens = scores[0].shape
        errors = seen.artefacts[self.layer_errors].tensors["errors"].tolist()
        counts = layer_rows(errors, rows // kv_heads, tokens)
        return torch.tensor(counts)[:, None].expand(-1, kv_heads)
