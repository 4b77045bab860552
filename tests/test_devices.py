"""A model whose layers are on several devices: pretended ones, which refuse to meet (tests/pretended.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, ids_of, tiny_network
from pretended import pretended, spread
from test_methods import DECODING, METHODS, near
from torch import Tensor

import kvbench
from kvbench import loop, plugins
from kvbench.artefact import Calibration, load_or_fit
from kvbench.budget import Budget
from kvbench.cache.fork import Fork, acts_in_time
from kvbench.cache.hf import Network
from kvbench.cache.packed import CompressedCache
from kvbench.cell import Cell, ModelConfig, Settings
from kvbench.decode import follow, greedy, rows_together
from kvbench.method import Method
from kvbench.model import Model
from kvbench.prefill import Reader, read_exactly
from kvbench.prompt import Writer
from kvbench.store import read_cell
from kvbench.toolbox.head_maps import CopyingHeads, RecallingHeads
from kvbench.toolbox.low_rank import Directions
from kvbench.toolbox.planes import PlaneAgreement
from kvbench.toolbox.retrieval_heads import LayerErrors, SemanticHeads
from kvbench.toolbox.value_maps import ValueMaps

TOKENS = 80
SEVERAL = ["cuda:0", "cuda:1", "cuda:2"]
FACTS = {"weights": "random-0", "device": "pretended", "torch_threads": 1}


@pytest.fixture(autouse=True)
def pretending() -> Iterator[None]:
    with pretended(), torch.inference_mode():
        yield


def spread_model(devices: list[str]) -> Any:
    model = tiny_network(num_hidden_layers=3)._model
    spread(model, devices)
    return model


def whole(devices: list[str]) -> Model:
    tokenizer = byte_tokenizer()
    config = ModelConfig(name="three", path="three", dtype="float32")
    network = Network(spread_model(devices))
    return Model(config, network, Writer(tokenizer), frozenset({tokenizer.eos_token_id}), FACTS)


@pytest.fixture(scope="module")
def one() -> Model:
    """On one GPU: what is computed there may differ from what a CPU does."""
    with pretended():
        return whole(SEVERAL[:1])


@pytest.fixture(scope="module")
def several() -> Model:
    with pretended():
        return whole(SEVERAL)


def same(first: Any, second: Any) -> bool:
    """Whether all numbers are equal, bit for bit."""
    if isinstance(first, Tensor):
        return first.shape == second.shape and torch.equal(first.cpu(), second.cpu())
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


# -- what is pretended -------------------------------------------------------------------------------------------------

HERE, THERE = torch.device("cuda", 0), torch.device("cuda", 1)


def mixing(here: Tensor, there: Tensor, cpu: Tensor) -> dict[str, Callable[[], Any]]:
    return {
        "a sum": lambda: here + there,
        "with the CPU": lambda: here + cpu,
        "a product": lambda: here[None] @ there,
        "cat": lambda: torch.cat([here, there]),
        "stacked numbers": lambda: torch.stack([here.sum(), there.sum()]),
        "a stacked number of the CPU": lambda: torch.stack([here.sum(), cpu.sum()]),
        "in place": lambda: here.add_(there),
        "a view": lambda: here[1:] * there.view(1, 3)[0, 1:],
        "an index": lambda: here[there.long()],
        "an index into the CPU's": lambda: cpu[here.long()],
        "what is assigned": lambda: here.__setitem__(slice(0, 3), there),
        "a number": lambda: here + there.sum(),
        "gather": lambda: here.gather(0, cpu.long()),
        "a keyword": lambda: torch.where(here > 0, here, other=there),
        "a module": lambda: torch.nn.functional.embedding(there.long(), here[:, None]),
    }


@pytest.mark.parametrize("what", mixing(*[torch.ones(3)] * 3))
def test_devices_that_meet_are_caught(what: str) -> None:
    cpu = torch.zeros(3)
    with pytest.raises(RuntimeError, match="mixes c"):
        mixing(cpu.to(HERE), cpu.to("cuda:1"), cpu)[what]()


def test_what_may_meet_does() -> None:
    cpu = torch.arange(3)
    here = cpu.float().to(HERE)
    assert here.device == here[cpu].device == here[cpu > 1].device == HERE  # indices on the CPU go with anything
    assert (here * cpu.sum()).device == here[None].mT.device == here.topk(2).indices.device == HERE  # and numbers
    assert torch.zeros(3).device == here.cpu().device == torch.device("cpu")
    assert (
        torch.zeros(3, device=THERE).device == here.to(cpu.to(1)).device == here.new_zeros(1, device=1).device == THERE
    )
    assert here.to(HERE) is here
    assert here.to(THERE).data_ptr() != here.data_ptr() != here.to(HERE, copy=True).data_ptr()
    assert here.is_cuda
    assert not cpu.is_cuda


def test_a_method_that_mixes_is_caught(several: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Network, "gather", lambda network, parts: list(parts))
    with pytest.raises(RuntimeError, match="mixes cuda:0, cuda:1, cuda:2"):
        answered(METHODS["adakv"], several, several)


# -- the same on one device and on several -----------------------------------------------------------------------------


def answered(method: Method, model: Model, fitted: Model) -> list[Any]:
    """All that a method makes of a context at two budgets: bytes, a question, two answers in one batch."""
    network = model.network
    ids = ids_of(network, TOKENS).to(network.device)
    seen = read_exactly(network, ids, method.needs, "c", chunk=64)
    artefacts = {c: load_or_fit(c, replace(fitted, network=network)) for c in method.calibrations}
    seen = replace(seen, artefacts=artefacts)
    caches = []
    for budget in ("0.1", "0.5"):
        allowance = Budget.parse(near(method, seen, budget)).allow(network.row_bytes() * TOKENS, TOKENS)
        if method.own_prefill:
            caches.append(method.prefill(Reader(network, ids, method.needs, "c", artefacts, model), allowance))
        else:
            caches.append(CompressedCache.pack(method.plan(seen, allowance), seen))
    found: list[Any] = [[(cache.nbytes, cache.offloaded, cache.planned) for cache in caches]]
    for cache, tiered in zip(caches, (False, not acts_in_time(method)), strict=True):
        fork = Fork(cache, method, tiered)
        first, branches = follow(network, fork, ids_of(network, 3, seed=2).to(network.device), [[1, 2], [4]])
        forks = [fork, fork.fork()]
        found += [first, [x.logits for x in branches]]
        found.append(greedy(network, forks, torch.stack([first, -first]), lambda _: False, 3, rows=3))
        found.append([[*map(int, part)] for x in forks for part in (x.usage.held, x.usage.read, x.usage.moved)])
        for one in forks:
            for layer, device in zip(one.layers, network.placement, strict=True):
                assert {x.device for x in (*layer.packed.tensors(), *layer.working())} == {device}
    return found


EVERY = (
    METHODS | DECODING | {"tiered": plugins.build_method("vector", key_bits=4, retain=("int8", "int4"), one_price=True)}
)


@pytest.mark.usefixtures("own_cache", "corpora")
@pytest.mark.parametrize("name", EVERY)
def test_a_method_answers_alike(name: str, one: Model, several: Model) -> None:
    method = EVERY[name]
    assert len(several.network.devices) == 3
    assert same(answered(method, one, one), answered(method, several, one))


FITS = [
    CopyingHeads(32),
    Directions(("pydoc",), tokens=512, sequence=128),
    LayerErrors(0.25, 8, 5, ("essays",), 1, 64, 8),
    PlaneAgreement(16, ("essays",), 1, 64, 4),
    RecallingHeads(4, 16, ("essays",), 1, 128, 2, 8),
    SemanticHeads(lengths=(64,), depths=(0.5,)),
    ValueMaps(("pydoc",), 512, 128),
]


@pytest.mark.usefixtures("own_cache", "corpora")
@pytest.mark.parametrize("calibration", FITS, ids=lambda x: type(x).__name__)
def test_a_fit_is_the_same(calibration: Calibration, one: Model, several: Model) -> None:
    (first, about), (second, also) = (calibration.fit(model) for model in (one, several))
    assert about == also
    assert first.keys() == second.keys()
    assert all(same(first[name], second[name]) for name in first)


@pytest.mark.usefixtures("own_cache", "corpora")
def test_a_sweep_has_the_same_records(
    one: Model, several: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole cells, answers in one batch."""
    assert rows_together(several.network, 4) == 4
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**30))
    task = plugins.load("tasks", "lm")(context=TOKENS, continuation=4, max_new_tokens=6)
    cells = [Cell(one.config, METHODS[name], Budget.parse("0.4"), task) for name in ("full", "adakv", "fastkv")]
    for model in (one, several):
        monkeypatch.setattr(loop, "load_model", lambda config, model=model: model)
        loop.run_cells(cells, Settings(tmp_path / str(len(model.network.devices)), limit=2), alone=False)
    for cell in cells:
        first, second = (read_cell(cell.folder(tmp_path / devices)) for devices in ("1", "3"))
        assert first[0]["status"] == second[0]["status"] == "done"
        assert first[1] == second[1]
        assert len(first[1]) == 2


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("method", ["snapkv", "tova", "louiskv"])
def test_generate(method: str) -> None:
    """A dispatched model of the user's own: accelerate's hooks are as they were."""
    said = []
    for devices in (SEVERAL[:1], SEVERAL):
        model = spread_model(devices)
        model.set_attn_implementation("sdpa")
        before, ids = vars(model).get("forward"), ids_of(tiny_network(), TOKENS)[None].to(HERE)
        with kvbench.compress(model, method, 0.4) as held:
            said.append(model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0))
        assert held.bytes_held <= 0.4 * held.bytes_full
        assert vars(model).get("forward") is before
    assert same(*said)
