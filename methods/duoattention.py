"""DuoAttention."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvbench.artefact import Calibration
from kvbench.budget import Allowance
from kvbench.errors import UsageError
from kvbench.method import Family, Trust, Wrapper
from kvbench.plan import EXACT, Plan, keep_best
from kvbench.prefill import Seen
from kvbench.toolbox.allocation import retrieval_shares
from kvbench.toolbox.head_maps import RecallingHeads


@dataclass(frozen=True)
class DuoAttention(Wrapper):
    """Retrieval heads hold every token, the others sinks and a window (DuoAttention, Xiao et al., arXiv 2410.10819).

    Reconstructed: the paper trains a gate per KV head on passkeys; here heads are ranked, with no training, by how far
    the layer's output moves without their distant tokens while hidden passages are repeated. `gates=<file>` takes
    trained gates instead: a table with a line per layer and a column per KV head, as the authors publish. The budget
    says how many heads are retrieval heads: as many as fit while the others hold `sinks` + `window` rows, which shrink
    to half of an even share; what is left widens the windows. The paper's heads hold sinks and a window:
    `base=streamingllm`; with another base they hold its best tokens in place of the window, half of which at most are
    the last ones that it protects. Differs: acts once, after the context is read.
    """

    family: ClassVar[Family] = Family.allocator
    trust: ClassVar[Trust] = Trust.reconstructed

    base: str = "streamingllm"
    sinks: int = 128
    window: int = 256
    gates: str = ""

    @property
    def heads(self) -> RecallingHeads:
        return RecallingHeads(self.sinks, self.window)

    @property
    def calibrations(self) -> frozenset[Calibration]:
        return super().calibrations | (frozenset() if self.gates else frozenset({self.heads}))

    @property
    def protect(self) -> tuple[int, int]:
        return self.sinks, min(super().protect[1], self.window // 2)

    def protected(self, rows: int, tokens: int) -> tuple[int, int]:
        """They shrink with the rows of the heads that stream, in proportion."""
        share = min(1, rows / 2 / (self.sinks + self.window))
        first, last = self.protect
        return int(first * share), int(last * share)

    def importance(self, seen: Seen) -> Float[Tensor, "layers kv_heads"]:
        if not self.gates:
            return seen.artefacts[self.heads].tensors["error"]
        gates = torch.from_numpy(np.loadtxt(self.gates, dtype=np.float32, ndmin=2))
        if gates.shape != (len(seen.layers), seen.layers[0].key.shape[0]):
            raise UsageError(f"method.gates={self.gates} has {tuple(gates.shape)} gates: not those of this model")
        return gates

    def allocate(
        self, seen: Seen, scores: Sequence[Float[Tensor, "kv_heads tokens"]], rows: int
    ) -> Int[Tensor, "layers kv_heads"]:
        return retrieval_shares(self.importance(seen), rows, self.sinks + self.window, scores[0].shape[1])

    def plan(self, seen: Seen, budget: Allowance) -> Plan:
        scores = [self.scores(seen, layer) for layer in range(len(seen.layers))]
        even = budget.limit // budget.charged(EXACT.row_bytes(seen.dim, seen.dtype)[0], 0) // sum(map(len, scores))
        return keep_best(seen, scores, budget, self.allocate, self.protected(even, scores[0].shape[1]))
