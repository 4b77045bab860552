"""R² of value maps on a task's contexts."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import load_script
from sweeps import prepared

from kvbench.artefact import load_or_fit
from kvbench.config import convert
from kvbench.model import load_model
from kvbench.prefill import read_exactly
from kvbench.sweep import composed_words
from kvbench.toolbox.value_maps import SINKS


@pytest.mark.usefixtures("own_cache", "corpora")
def test_r2_is_the_explained_share_of_the_values_spread(tmp_path: Path) -> None:
    script = load_script("value_maps_r2")
    with prepared(tmp_path) as words:
        options = [*words, f"results={tmp_path}", "method=vector", "method.calibration_tokens=1024", "limit=1"]
        configs = [composed_words([*options, f"method.texts=[{text}]"]) for text in ("pydoc", "stdlib")]
        script.measure(configs, print)
        cell = convert(configs[0]).cell
        model = load_model(cell.model)
        ids = next(iter(cell.task.contexts(model.writer, cell.seed))).ids
    table = pd.read_csv(tmp_path / "value_maps_r2.csv")
    network = model.network
    assert len(table) == 2 * 2 * 2 * 2 * network.layers * network.kv_heads
    [calibration] = cell.method.calibrations
    maps = load_or_fit(calibration, model).tensors
    with torch.inference_mode():
        x = read_exactly(network, torch.tensor(ids)).layers[1]
    key, value = x.key[0, SINKS:], x.value[0, SINKS:]
    cos, sin = network.rope(x.position[SINKS:])
    first, second = key.chunk(2, -1)
    back = (key * cos + torch.cat([second, -first], -1) * sin) / (cos.square() + sin.square())
    estimate = back @ maps["key.head.1.weight"][0].float() + maps["key.head.1.bias"][0].float()
    expected = 1 - (value - estimate).square().sum() / (value - value.mean(0)).square().sum()
    [found] = table[
        (table["fitted to"] == "pydoc")
        & (table["features"] == "key")
        & (table["maps"] == "head")
        & ~table["intercept"]
        & (table["layer"] == 1)
        & (table["head"] == 0)
    ]["r2"]
    assert found == pytest.approx(float(expected), abs=2e-3)
