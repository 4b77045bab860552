"""The directions in which a model's keys and values vary most, found once per model."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvbench.artefact import Calibration
from kvbench.cache.rope import unrotate
from kvbench.measure.progress import Progress
from kvbench.prefill import read_exactly
from kvbench.toolbox.value_maps import sequences

if TYPE_CHECKING:
    from kvbench.model import Model


@dataclass(frozen=True)
class Directions(Calibration):
    """`key` and `value`: per layer and group of `heads` KV heads, orthonormal columns, the most energetic first.

    Their first r columns B make Y B B' the best approximation of rank r of all rows Y = X W of the calibration text
    (keys before their rotary embedding). That is the singular value decomposition of the whitened weights: with
    X'X = S'S, S W = U D B', and S^-1 U_r D_r B_r' = W B_r B_r'. `key.energy` and `value.energy` say what share of the
    sum of squares each column has.
    """

    texts: tuple[str, ...]
    heads: int = 4
    tokens: int = 65536
    sequence: int = 2048

    def fit(self, model: Model) -> tuple[dict[str, Tensor], dict[str, Any]]:
        network = model.network
        groups = network.kv_heads // group_size(network.kv_heads, self.heads)
        features = network.kv_heads // groups * network.dim
        shape = (network.layers, groups, features, features)
        sums = {kind: torch.zeros(shape, dtype=torch.float64, device=network.device) for kind in ("key", "value")}
        digest = hashlib.sha256()
        count = max(self.tokens // self.sequence, 1)
        with torch.inference_mode(), Progress(f"fitting directions of {model.config.name}", count) as bar:
            for ids in itertools.islice(sequences(model, self.texts, self.sequence), count):
                digest.update(ids.cpu().numpy().tobytes())
                for i, x in enumerate(read_exactly(network, ids).layers):
                    for kind, rows in (("key", unrotate(x.key, *network.rope(x.position))), ("value", x.value.float())):
                        wide = rows.unflatten(0, (groups, -1)).transpose(1, 2).flatten(2)
                        sums[kind][i] += (wide.mT @ wide).double().to(network.device)
                bar.advance()
        tensors = {}
        for kind, total in sums.items():
            energy, columns = torch.linalg.eigh(total)
            tensors[kind] = columns.flip(-1).float()
            tensors[f"{kind}.energy"] = (energy.flip(-1) / energy.sum(-1, keepdim=True)).float()
        return tensors, {"text_sha256": digest.hexdigest()}


def group_size(kv_heads: int, heads: int) -> int:
    """KV heads in a group: the largest divisor of their number that is at most `heads`."""
    return max(size for size in range(1, min(heads, kv_heads) + 1) if kv_heads % size == 0)
