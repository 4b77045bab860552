"""The embedded model end to end; skipped where it has not been fetched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import kvbench
from kvbench import fetch, plugins
from kvbench.artefact import location
from kvbench.budget import Budget
from kvbench.cache.fork import Fork
from kvbench.cache.packed import CompressedCache
from kvbench.cell import Cell, ModelConfig, Settings
from kvbench.config import build_plugin
from kvbench.decode import feed, greedy
from kvbench.errors import UsageError
from kvbench.loop import run_cells
from kvbench.model import Model, load_model
from kvbench.prefill import read_exactly
from kvbench.store import read_cell

CONFIG = ModelConfig(name="smollm2-135m-q4_1", path="embedded:smollm2-135m-q4_1", dtype="float32")

# Every process of the run starts with this: whoever looks beyond this machine is refused, and told on.
GUARD = """
import os, socket

def guard(name):
    real = getattr(socket.socket, name)
    def guarded(self, address, *rest):
        local = self.family == socket.AF_UNIX or str(address[0]).startswith(("127.", "::1", "localhost"))
        return real(self, address, *rest) if local else refuse(name, address)
    setattr(socket.socket, name, guarded)

def refuse(what, where):
    with open(os.environ["NETWORK_CALLS"], "a") as file:
        print(what, where, file=file)
    raise OSError(f"no network in this test: {what} {where}")

guard("connect")
guard("connect_ex")
resolve = socket.getaddrinfo
socket.getaddrinfo = lambda host, *rest, **named: (
    resolve(host, *rest, **named) if host in (None, "localhost", "127.0.0.1", "::1") else refuse("resolve", host)
)
"""


@pytest.fixture(scope="module", autouse=True)
def _is_fetched() -> Iterator[None]:
    threads = torch.get_num_threads()
    try:
        fetch.embedded_model()
        fetch.corpus("essays")
    except UsageError as error:
        pytest.skip(str(error))
    torch.set_num_threads(1)  # two threads that have to share a busy machine's cores wait for each other
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(CONFIG)


def niah(**options: Any) -> Any:
    return build_plugin("tasks", "niah", options)


def test_budget_1_reproduces_stock_transformers(model: Model) -> None:
    (context,) = islice(niah(context=512).contexts(model.writer, 0), 1)
    example = context.examples[0]
    prompt = model.writer.prompt(context.ids, example.question, example.answer_prefix)
    compressed, fed = (torch.tensor(part) for part in prompt.split("blind"))
    ids = torch.cat([compressed, fed])[None]
    assert ids.shape == (1, 512)
    stock: Any = AutoModelForCausalLM.from_pretrained(fetch.embedded_model(), dtype=torch.float32)
    method = plugins.build_method("snapkv")
    with torch.inference_mode():
        expected = stock(ids).logits[:, len(compressed) :]
        seen = read_exactly(model.network, compressed, method.needs)
        full = model.network.row_bytes() * len(compressed)
        cache = CompressedCache.pack(method.plan(seen, Budget.parse("1").allow(full, len(compressed))), seen)
        assert cache.nbytes == full
        fork = Fork(cache, method)
        logits = feed(model.network, [fork], fed[None])
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
        [answer] = greedy(model.network, [fork], logits[:, -1], lambda _: False, 16)
        out = stock.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False, eos_token_id=None
        )
    assert answer == out[0, 512:].tolist()
    assert example.references[0] in model.writer.decode(answer)


def test_the_needle_is_found_and_lost(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The full cache finds it at 1k; without the middle of the context its number can only be guessed."""
    monkeypatch.setattr("kvbench.loop.load_model", lambda config: model)
    # Not near an end, which is what StreamingLLM keeps.
    task = niah(context=1024, max_new_tokens=16, depths=[0.3, 0.6])
    cells = [Cell(CONFIG, plugins.build_method(m), Budget.parse("0.05"), task) for m in ("full", "streamingllm")]
    run_cells(cells, Settings(tmp_path, 2))
    full, streaming = (read_cell(cell.folder(tmp_path))[1] for cell in cells)
    for exact, evicted in zip(full, streaming, strict=True):
        assert (exact["score"], exact["kl_full"], exact["agree_full"]) == (1, 0, 1)
        assert evicted["score"] == 0
        assert evicted["answer_nll"] > exact["answer_nll"] + 1
        assert evicted["kl_full"] > 0.5
        assert 0.045 * evicted["bytes_full"] < evicted["bytes_held"] <= 0.05 * evicted["bytes_full"]
        assert exact["bytes_full"] == 2 * 30 * 3 * 64 * 4 * exact["tokens_context"]


def test_the_main_job_needs_no_network_and_leaves_its_records_alone(model: Model, tmp_path: Path) -> None:
    half = replace(model, config=replace(CONFIG, dtype="bfloat16"))
    if not location(plugins.build_method("vector").value_maps, half).exists():
        pytest.skip("VECTOR's maps are not fitted: run `python scripts/calibrate.py model=smollm2-135m`")
    guard, home, calls = tmp_path / "guard", tmp_path / "here", tmp_path / "network-calls"
    guard.mkdir()
    home.mkdir()
    (guard / "sitecustomize.py").write_text(GUARD)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_", "WANDB_"))}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(guard), str(Path(kvbench.__file__).parent.parent)]),
        "NETWORK_CALLS": str(calls),
        "OMP_NUM_THREADS": "1",
    }

    def python(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=200)

    probe = python("-c", "import socket; socket.create_connection(('198.51.100.1', 80), 1)")
    assert "no network in this test" in probe.stderr  # the guard is in place
    calls.unlink()

    options = "method=vector budget=0.1 task=niah task.context=512 task.max_new_tokens=8 limit=1"
    ended = python("-m", "kvbench.run", *options.split())
    assert ended.returncode == 0, ended.stderr
    assert "vector" in ended.stdout
    assert not calls.exists(), calls.read_text()
    assert [path.name for path in home.iterdir()] == ["results"]
    (file,) = home.glob("results/niah/smollm2-135m-q4_1/vector-0.1-*/header.json")
    header, (record,) = read_cell(file.parent)
    assert (header["status"], header["examples"]) == ("done", 1)
    assert json.loads(file.read_text()) == header
    assert 0.085 * record["bytes_full"] < record["bytes_held"] <= 0.1 * record["bytes_full"]
    assert set(record["tiers"]) == {"exact", "approximate"}
    assert record["bytes_shared"] > 0
    assert record["answer_nll"] > 0
