"""Loading models: weights from a folder, or drawn for a shape alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, tiny_network

from kvbench.cell import ModelConfig
from kvbench.errors import UsageError
from kvbench.model import load_model


@pytest.fixture
def config(tmp_path: Path) -> ModelConfig:
    """A folder with a shape and a tokenizer, and no weights."""
    tiny_network()._model.config.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    return ModelConfig(name="tiny", path=str(tmp_path), weights="random", dtype="float32", chat=False)


def test_random_weights_need_no_weights(config: ModelConfig) -> None:
    """The same draw every time, of the shape that the folder describes."""
    first, second = load_model(config), load_model(config)
    assert first.facts["weights"] == "random"
    assert first.network.row_bytes() == tiny_network().row_bytes()
    pairs = list(zip(first.network._model.parameters(), second.network._model.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    with pytest.raises(UsageError, match="weights of tiny are not to be had"):
        load_model(replace(config, weights="trained"))


def test_random_weights_are_another_model(config: ModelConfig) -> None:
    assert config.identity() != replace(config, weights="trained").identity()
    assert "weights" not in replace(config, weights="trained").identity()  # as before there was a choice


def test_a_model_is_spread_where_there_are_gpus(config: ModelConfig) -> None:
    """By accelerate: without a GPU it stays in one place. Random weights are drawn on one device."""
    model = tiny_network()._model
    model.save_pretrained(config.path)
    trained = replace(config, weights="trained")
    spread = load_model(replace(trained, device="spread"))
    assert spread.network.devices == (torch.device("cpu"),)
    assert spread.facts["device"] == "cpu"
    pairs = list(zip(spread.network._model.parameters(), model.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    with pytest.raises(UsageError, match=r"model.device=spread is for trained weights"):
        load_model(replace(config, device="spread"))
