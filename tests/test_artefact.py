"""What is fitted once per model."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from kvbench.artefact import Calibration, load_or_fit
from kvbench.model import Model


@dataclass(frozen=True)
class Slow(Calibration):
    """Counts its fits, each of which takes a moment."""

    fits: ClassVar[list[float]] = []

    def fit(self, model: Model) -> tuple[dict[str, Tensor], dict[str, Any]]:
        self.fits.append(time.monotonic())
        time.sleep(0.3)
        return {"x": torch.ones(2)}, {}


@pytest.mark.usefixtures("own_cache")
def test_who_wants_the_same_at_the_same_time_waits_for_it(tiny: Model) -> None:
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: load_or_fit(Slow(), tiny), range(3)))
    assert len(Slow.fits) == 1
    assert len({one.digest for one in found}) == 1
