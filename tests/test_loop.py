"""The loop: what a record says, and that it says the same alone, in company, and after any interruption."""

from __future__ import annotations

import copy
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, tiny_network
from torch import Tensor
from transformers import AutoModelForCausalLM

from kvbench import loop, plugins
from kvbench.budget import Budget
from kvbench.cache.hf import Network
from kvbench.cell import Cell, ModelConfig, Settings
from kvbench.errors import UsageError
from kvbench.model import Model
from kvbench.prompt import Writer
from kvbench.store import CellStore, read_cell
from kvbench.task import Context, Example, Task

CONFIG = ModelConfig(name="tiny", path="tiny", dtype="float32")
FACTS = {"weights": "random-0", "device": "cpu", "torch_threads": torch.get_num_threads()}
NAMES = """id context_id cluster_id score answer answer_nll kl_full agree_full diverges_at bytes_held bytes_full
bytes_budget bytes_payload bytes_metadata bytes_shared bytes_offloaded bytes_tail bytes_decode bytes_decode_peak
bytes_read bytes_moved length_shift tokens_context tokens_kept tokens_target tokens_out tokens_out_full
tiers info"""


@dataclass(frozen=True)
class Toy(Task):
    """Random letters, two questions each."""

    number: int = 4  # contexts; 0: endless
    length: int = 90
    max_new_tokens: int = 5

    def contexts(self, writer: Writer, seed: int) -> Iterator[Context]:
        for i in range(self.number) if self.number else count():
            draw = random.Random(f"{seed}-{i}")
            name = f"toy-{seed}-{i}"
            text = "".join(draw.choices("abcdefgh ", k=self.length))
            examples = tuple(
                Example(
                    id=f"{name}-{j}",
                    question=f"\nWhat is {j}{'?' * (j + 1)}",
                    references=(text[j],),
                    target=f" {text[j : j + 4]}.",
                    answer_prefix=" It is",
                    max_new_tokens=self.max_new_tokens,
                    info={"turn": j},
                )
                for j in range(2)
            )
            yield Context(name, f"document-{i % 3}", writer.encode(text), examples)

    def score(self, example: Example, answer: str) -> float:
        return sum(map(ord, example.references[0] + answer)) % 11 / 10


def cell(method: str = "snapkv", budget: str = "0.3", task: Toy | None = None, **options: Any) -> Cell:
    own = {"window": 8} if method == "snapkv" else {}
    made = plugins.build_method(method, **(own | options.pop("method_options", {})))
    return Cell(CONFIG, made, Budget.parse(budget), task or Toy(), **options)


def run(cells: Cell | Sequence[Cell], results: Path, limit: int | None = None, redo: bool = False) -> None:
    cells = [cells] if isinstance(cells, Cell) else cells
    loop.run_cells(cells, Settings(results, limit, redo))


def records(one: Cell, results: Path) -> list[dict[str, Any]]:
    return read_cell(one.folder(results))[1]


def header(one: Cell, results: Path) -> dict[str, Any]:
    return read_cell(one.folder(results))[0]


def written(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def refuse_to_load(config: ModelConfig) -> Model:
    raise AssertionError("a model was loaded")


@pytest.fixture(scope="module")
def tiny(tiny: Model) -> Model:
    return replace(tiny, facts=FACTS)


@pytest.fixture(autouse=True)
def _tiny_is_the_model(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "load_model", lambda config: tiny)


@pytest.fixture(scope="module")
def undisturbed(tiny: Model, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The records of `cell()`, all 8."""
    results = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "load_model", lambda config: tiny)
        run(cell(), results)
    return records(cell(), results)


# -- what a record says ------------------------------------------------------------------------------------------------


def test_a_record_has_every_name_that_scripts_rely_on(tiny: Model, tmp_path: Path) -> None:
    run(cell(), tmp_path)
    found = records(cell(), tmp_path)
    assert [record["id"] for record in found] == [f"toy-0-{i}-{j}" for i in range(4) for j in range(2)]
    row = tiny.network.row_bytes()
    defined = set(re.findall(r"`(\w+)`", (Path(__file__).parent.parent / "docs" / "metrics.md").read_text()))
    for record in found:
        assert set(NAMES.split()) <= set(record) <= defined
        assert (record["diverges_at"] is None) == (record["agree_full"] == 1)
        assert record["id"].startswith(record["context_id"] + "-")
        assert record["cluster_id"] == f"document-{int(record['context_id'][-1]) % 3}"
        assert 0 <= record["score"] <= 1
        assert record["bytes_full"] == row * record["tokens_context"]
        assert record["bytes_held"] == record["bytes_payload"] + record["bytes_metadata"] <= record["bytes_budget"]
        assert record["bytes_held"] == row * record["tokens_kept"] > record["bytes_budget"] - row
        assert sum(record["tiers"].values()) == record["tokens_kept"]
        assert 1 <= record["tokens_out"] <= 5
        assert record["kl_full"] > 0
        assert 0 <= record["agree_full"] <= 1
    done = header(cell(), tmp_path)
    assert (done["status"], done["examples"], done["exhausted"]) == ("done", 8, True)


def test_the_full_cache_is_no_distance_from_itself(tmp_path: Path) -> None:
    run(cell("full"), tmp_path)
    for record in records(cell("full"), tmp_path):
        assert record["kl_full"] == 0
        assert record["agree_full"] == 1
        assert record["bytes_held"] == record["bytes_full"]
        assert record["tokens_out"] == record["tokens_out_full"]


@pytest.mark.parametrize("method", ["snapkv", "random", "streamingllm"])
def test_budget_1_is_the_full_cache_bit_for_bit(method: str, tmp_path: Path) -> None:
    one, full = (cell(name, "1", task=Toy(2)) for name in (method, "full"))
    run(one, tmp_path)
    run(full, tmp_path)
    assert records(one, tmp_path) == records(full, tmp_path)


def test_without_an_answer_nll_and_kl_stay_the_same(undisturbed: list[dict[str, Any]], tmp_path: Path) -> None:
    silent = cell(generate=False)
    run(silent, tmp_path)
    gone = {"score", "answer", "tokens_out", "length_shift"}
    expected = [{key: value for key, value in record.items() if key not in gone} for record in undisturbed]
    assert records(silent, tmp_path) == expected


def test_protocols_read_the_same_tokens_and_compress_other_ones(tiny: Model, tmp_path: Path) -> None:
    blind, aware = cell("full", protocol="blind"), cell("full", protocol="aware")
    run(blind, tmp_path)
    run(aware, tmp_path)
    row = tiny.network.row_bytes()
    for a, b in zip(records(blind, tmp_path), records(aware, tmp_path), strict=True):
        question = len(f"\nWhat is {a['info']['turn']}?") + a["info"]["turn"]
        assert a["id"] == b["id"]
        assert a["context_id"] == b["context_id"]
        assert b["tokens_context"] == a["tokens_context"] + question
        assert a["tokens_context"] + a["bytes_tail"] // row == b["tokens_context"] + b["bytes_tail"] // row
        # One exact cache, split elsewhere: only rounding differs.
        assert a["answer_nll"] == pytest.approx(b["answer_nll"], abs=1e-4)
        assert a["answer"] == b["answer"]


# -- against stock transformers ----------------------------------------------------------------------------------------


def stock_logprobs(tiny: Model, ids: Sequence[int], kept: Tensor | None = None, context: int = 0) -> Tensor:
    """Log-probabilities of the token after each of `ids`: stock transformers, one pass, eager attention.

    `kept`: which of the first `context` tokens the tokens after these still see.
    """
    config: Any = copy.deepcopy(tiny.network._model.config)
    stock = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    stock.load_state_dict(tiny.network._model.state_dict())
    seen = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    if kept is not None:
        seen[context:, :context] &= kept
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    with torch.inference_mode():
        return stock(torch.tensor([list(ids)]), attention_mask=mask[None, None]).logits[0].float().log_softmax(-1)


def parts(tiny: Model, example_id: str) -> tuple[Example, tuple[int, ...], tuple[int, ...]]:
    """(example, compressed tokens, tokens fed after) under `blind`."""
    for context in Toy().contexts(tiny.writer, 0):
        for example in context.examples:
            if example.id == example_id:
                prompt = tiny.writer.prompt(context.ids, example.question, example.answer_prefix)
                return example, *prompt.split("blind")
    raise AssertionError(example_id)


def nll(tiny: Model, before: tuple[int, ...], target: str, **mask: Any) -> float:
    ids = tiny.writer.encode(target)
    logprobs = stock_logprobs(tiny, before + ids, **mask)[len(before) - 1 : -1]
    return float(-logprobs[range(len(ids)), list(ids)].mean())


def test_answer_nll_is_that_of_stock_transformers(tiny: Model, tmp_path: Path) -> None:
    run(cell("full"), tmp_path)
    for record in records(cell("full"), tmp_path):
        example, compressed, fed = parts(tiny, record["id"])
        assert record["answer_nll"] == pytest.approx(nll(tiny, compressed + fed, example.target), abs=1e-4)


def test_kl_agreement_and_nll_of_an_evicted_cache_by_hand(tiny: Model, tmp_path: Path) -> None:
    """StreamingLLM's cache is one attention mask: the context's tokens see all, later ones the first and last."""
    made = cell("streamingllm", "0.2")
    run(made, tmp_path)
    for record in records(made, tmp_path):
        example, compressed, fed = parts(tiny, record["id"])
        context, start = len(compressed), len(compressed) + len(fed)
        keep = int(record["tokens_kept"])
        kept = torch.zeros(context, dtype=torch.bool)
        kept[:4] = kept[context - keep + 4 :] = True

        answer: list[int] = []
        while len(answer) < example.max_new_tokens and not tiny.stop.intersection(answer[-1:]):
            answer.append(int(stock_logprobs(tiny, (*compressed, *fed, *answer))[-1].argmax()))
        assert record["tokens_out_full"] == len(answer)
        every = compressed + fed + tuple(answer)
        full = stock_logprobs(tiny, every)[start - 1 : -1]
        evicted = stock_logprobs(tiny, every, kept, context)[start - 1 : -1]
        kl = [sum(p.exp() * (p - q) for p, q in zip(f, e, strict=True)) for f, e in zip(full, evicted, strict=True)]
        agree = [f.argmax() == e.argmax() for f, e in zip(full, evicted, strict=True)]
        assert record["kl_full"] == pytest.approx(float(sum(kl)) / len(kl), abs=1e-4)
        assert record["agree_full"] == pytest.approx(float(sum(agree)) / len(agree))
        expected = nll(tiny, compressed + fed, example.target, kept=kept, context=context)
        assert record["answer_nll"] == pytest.approx(expected, abs=1e-4)


# -- seconds and peak memory -------------------------------------------------------------------------------------------

TIMES = {
    "prefill_s",
    "statistics_s",
    "compress_s",
    "ttft_s",
    "tpot_s",
    "tpot_p95_s",
    "total_s",
    "bytes_peak",
    "segment",
} | {"bytes_compress_peak", "joules", "joules_token", "joules_note"}


def timing(one: Cell, results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (one.folder(results) / "timing.jsonl").read_text().splitlines()]


def test_the_first_examples_are_timed_alone_and_no_record_changes(
    undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    company = [cell(), cell("streamingllm", "0.5"), cell("full")]
    loop.run_cells(company, Settings(tmp_path, timed=3))
    lines = (company[0].folder(tmp_path) / "examples.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == undisturbed
    defined = set(re.findall(r"`(\w+)`", (Path(__file__).parent.parent / "docs" / "metrics.md").read_text()))
    for one in company:
        found = timing(one, tmp_path)
        assert [record.pop("id") for record in found] == ["toy-0-0-0", "toy-0-1-0", "toy-0-2-0"]  # first questions
        for record in found:
            assert set(record) == TIMES <= defined
            assert (record["statistics_s"] > 0) == (one is company[0])  # only SnapKV asks for one
            assert min(record["prefill_s"], record["compress_s"], record["tpot_s"]) > 0
            assert record["ttft_s"] > record["prefill_s"] + record["statistics_s"] + record["compress_s"]
            assert record["bytes_peak"] > 2**20
            assert record["segment"] == 0
    assert [record["id"] for record in records(cell(), tmp_path) if "tpot_s" in record] == [
        "toy-0-0-0",
        "toy-0-1-0",
        "toy-0-2-0",
    ]


def test_timing_is_continued_and_added_to_finished_cells(
    undisturbed: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(cell(), tmp_path)
    assert timing(cell(), tmp_path) == []
    stop = Stop(monkeypatch, CellStore, "append_timing")
    stop.at = 2
    with pytest.raises(KeyboardInterrupt):
        loop.run_cells([cell()], Settings(tmp_path, timed=2))
    stop.at = 0
    assert header(cell(), tmp_path)["status"] == "running"
    loop.run_cells([cell()], Settings(tmp_path, timed=2))
    assert [record["segment"] for record in timing(cell(), tmp_path)] == [1, 2]
    assert header(cell(), tmp_path)["status"] == "done"
    monkeypatch.setattr(loop, "load_model", refuse_to_load)
    loop.run_cells([cell()], Settings(tmp_path, timed=2))  # nothing to do
    assert [{k: v for k, v in r.items() if k not in TIMES} for r in records(cell(), tmp_path)] == undisturbed


# -- alone, in company, interrupted ------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["blind", "aware"])
def test_a_cell_in_company_is_the_cell_alone(protocol: str, tmp_path: Path) -> None:
    common: Any = {"task": Toy(2), "protocol": protocol}
    company = [
        cell("full", **common),
        cell("random", **common),
        cell("snapkv", **common),
        cell("snapkv", "0.6", **common),
        cell("snapkv", method_options={"window": 16}, **common),
        cell("streamingllm", "4KiB", **common),
        cell("lazyeviction", "0.6", **common),
        cell("fasa", **common),
    ]
    run(company, tmp_path / "company")
    for one in company:
        run(one, tmp_path / "alone")
        assert records(one, tmp_path / "company") == records(one, tmp_path / "alone")


@pytest.mark.usefixtures("own_cache", "corpora")
def test_a_calibrated_cell_in_company_is_the_cell_alone(tmp_path: Path) -> None:
    company = [cell("snapkv", task=Toy(2)), cell("vector", task=Toy(2)), cell("vector", "0.6", task=Toy(2))]
    run(company, tmp_path / "company")
    run(company[1], tmp_path / "alone")
    assert records(company[1], tmp_path / "company") == records(company[1], tmp_path / "alone")
    assert records(company[1], tmp_path / "alone")[0]["bytes_shared"] > 0
    assert header(company[1], tmp_path / "alone")["about"]["artefacts"]


def test_a_cell_joins_others_that_are_further(undisturbed: list[dict[str, Any]], tmp_path: Path) -> None:
    run(cell("random"), tmp_path)
    run(cell(), tmp_path, limit=3)
    run([cell("random"), cell("full"), cell()], tmp_path)
    assert records(cell(), tmp_path) == undisturbed
    assert len(records(cell("full"), tmp_path)) == 8
    assert len(header(cell("random"), tmp_path)["segments"]) == 1  # was finished: left alone


class Stop:
    """Raises KeyboardInterrupt at the n-th call of what it wraps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        self.calls, self.at = 0, 0
        real = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == self.at:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)


@pytest.mark.parametrize(
    ("owner", "name"), [(Toy, "score"), (Network, "hidden"), (CellStore, "append"), (CellStore, "finish")], ids=str
)
def test_an_interrupted_run_continues_to_the_same_records(
    owner: type, name: str, undisturbed: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = Stop(monkeypatch, owner, name)
    run(cell(), tmp_path / "count")
    total = stop.calls
    draw = random.Random(name)
    for attempt in range(min(total, 3)):
        results, interruptions = tmp_path / str(attempt), 0
        while True:  # again and again, until it gets through
            stop.calls, stop.at = 0, draw.randint(1, total)
            try:
                run(cell(), results)
            except KeyboardInterrupt:
                interruptions += 1
                if written(results):
                    found = read_cell(cell().folder(results))
                    assert found[0]["status"] == "running"
                    assert found[1] == undisturbed[: len(found[1])]
                if interruptions == 4:
                    stop.at = 0
                    run(cell(), results)
                    break
            else:
                break
        assert records(cell(), results) == undisturbed
        assert header(cell(), results)["status"] == "done"


def killed(results: str, at: int) -> None:
    """Runs `cell()` in a process that is killed while example number `at` is scored."""
    tokenizer = byte_tokenizer()
    tiny = Model(CONFIG, tiny_network(), Writer(tokenizer), frozenset({tokenizer.eos_token_id}), FACTS)
    loop.load_model = lambda config: tiny
    score, calls = Toy.score, count(1)

    def deadly(self: Toy, example: Example, answer: str) -> float:
        if next(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return score(self, example, answer)

    Toy.score = deadly  # type: ignore[method-assign]
    run(cell(), Path(results))


def test_a_killed_process_is_continued_to_the_same_records(
    undisturbed: list[dict[str, Any]], tmp_path: Path, tiny: Model
) -> None:
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_loop as t; "
    command = [sys.executable, "-c", code + f"t.killed({str(tmp_path)!r}, 6)"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parent.parent)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert header(cell(), tmp_path)["status"] == "running"
    assert records(cell(), tmp_path) == undisturbed[:5]
    with (cell().folder(tmp_path) / "examples.jsonl").open("a") as file:
        file.write('{"id": "toy-0-2-1", "sco')  # a line that the kill cut in two
    run(cell(), tmp_path)
    assert records(cell(), tmp_path) == undisturbed
    segments = header(cell(), tmp_path)["segments"]
    assert [segment["first_example"] for segment in segments] == ["toy-0-0-0", "toy-0-2-1"]


# -- limits, finished cells, refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [(1, 4, None), (3, 5, 8), (2, 2, 7, None), (7, None)], ids=str)
def test_a_larger_limit_continues(
    limits: tuple[int | None, ...], undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    for limit in limits:
        run(cell(), tmp_path, limit)
        assert records(cell(), tmp_path) == undisturbed[:limit]
        found = header(cell(), tmp_path)
        assert found["examples"] == (limit or 8)
        assert found["exhausted"] == ((limit or 8) == 8)
    assert len(header(cell(), tmp_path)["segments"]) == len(set(limits))


def test_a_limit_beyond_the_task_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(cell(), tmp_path, limit=100)
    assert header(cell(), tmp_path)["exhausted"]
    monkeypatch.setattr(loop, "load_model", refuse_to_load)
    run(cell(), tmp_path, limit=1000)
    run(cell(), tmp_path)


def test_an_endless_task_ends_at_its_limit(tmp_path: Path) -> None:
    endless = cell("full", task=Toy(0))
    run(endless, tmp_path, limit=3)
    assert len(records(endless, tmp_path)) == 3
    assert not header(endless, tmp_path)["exhausted"]


@pytest.mark.parametrize("limit", [3, None])
def test_a_finished_cell_is_run_again_only_if_asked(
    limit: int | None, undisturbed: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Model
) -> None:
    run(cell(), tmp_path, limit)
    before = {path: path.read_bytes() for path in written(tmp_path)}
    with monkeypatch.context() as patch:
        patch.setattr(loop, "load_model", refuse_to_load)
        run(cell(), tmp_path, limit)
        run(cell(), tmp_path, 2)  # a smaller limit takes nothing away
        assert {path: path.read_bytes() for path in written(tmp_path)} == before
        with pytest.raises(AssertionError, match="loaded"):
            run(cell(), tmp_path, limit, redo=True)
    calls = Stop(monkeypatch, Toy, "score")
    run(cell(), tmp_path, limit, redo=True)
    assert calls.calls == (limit or 8)
    assert records(cell(), tmp_path) == undisturbed[:limit]
    assert len(header(cell(), tmp_path)["segments"]) == 1


def test_a_budget_below_the_smallest_plan_is_refused(tiny: Model, tmp_path: Path) -> None:
    smallest = tiny.network.row_bytes()  # one token in each layer and KV head
    for made in (cell("streamingllm", "1B"), cell("snapkv", "0.001"), cell("random", f"{smallest - 1}B")):
        with pytest.raises(UsageError, match=rf"smallest plan of .*: {smallest:,} bytes"):
            run(made, tmp_path)
        assert written(tmp_path) == []
    run(cell("random", f"{smallest}B"), tmp_path, limit=1)
    assert records(cell("random", f"{smallest}B"), tmp_path)[0]["bytes_held"] == smallest


def around(tiny: Model) -> int:
    """Tokens that a Toy's longest example needs besides its context."""
    (context,) = Toy(1).contexts(tiny.writer, 0)
    return max(tiny.writer.overhead(e.question, e.answer_prefix) + e.max_new_tokens for e in context.examples)


def test_a_context_that_the_model_cannot_read_is_refused(tiny: Model, tmp_path: Path) -> None:
    most = tiny.network.max_positions
    long = cell(task=Toy(1, length=most - around(tiny) + 1))
    with pytest.raises(UsageError, match=rf"needs {most + 1:,} tokens .* reads {most:,}.* shorter"):
        run(long, tmp_path)
    assert written(tmp_path) == []


def test_a_context_that_just_fits_is_read(tiny: Model, tmp_path: Path) -> None:
    network = tiny_network(max_position_embeddings=160)
    short = replace(tiny, network=network)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "load_model", lambda config: short)
        just = cell(task=Toy(1, length=160 - around(tiny)))
        run(just, tmp_path)
        assert len(records(just, tmp_path)) == 2


def test_a_header_of_another_version_is_refused_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(cell(), tmp_path, limit=2)
    file = cell().folder(tmp_path) / "header.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))
    before = {path: path.read_bytes() for path in written(tmp_path)}
    monkeypatch.setattr(loop, "load_model", refuse_to_load)
    for limit in (2, None):
        with pytest.raises(UsageError, match="has format 99"):
            run(cell(), tmp_path, limit)
    assert {path: path.read_bytes() for path in written(tmp_path)} == before


def test_other_weights_do_not_continue_a_cell(tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(cell(), tmp_path, limit=2)
    other = replace(tiny, facts=tiny.facts | {"weights": "random-1"})
    monkeypatch.setattr(loop, "load_model", lambda config: other)
    with pytest.raises(UsageError, match="begun with another model"):
        run(cell(), tmp_path)
    assert len(records(cell(), tmp_path)) == 2


def test_the_full_cache_is_bounded_by_itself(tmp_path: Path) -> None:
    run(cell("full", "0.1"), tmp_path)
    assert all(record["bytes_budget"] == record["bytes_full"] for record in records(cell("full"), tmp_path))


def test_in_a_sweep_what_cant_be_run_is_marked_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    company = [cell("snapkv", "1B"), cell("random", "0.4"), cell("streamingllm", "0.4")]
    broken = type(company[1].method)

    def out_of_memory(*_: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(broken, "scores", out_of_memory)
    loop.run_cells(company, Settings(tmp_path), alone=False)
    headers = [read_cell(c.folder(tmp_path))[0] for c in company]
    assert [header["status"] for header in headers] == ["infeasible", "failed", "done"]
    assert "smallest plan of snapkv" in headers[0]["reason"]
    assert "random at budget=0.4: MemoryError: no room" in headers[1]["reason"]
    assert "kvbench: budget=1B" in capsys.readouterr().err


def test_in_a_sweep_another_processs_cell_is_told_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    company = [cell("random", "0.4"), cell("streamingllm", "0.4")]
    with CellStore.open(company[0], tmp_path, {}, None):  # as another process would hold it
        loop.run_cells(company, Settings(tmp_path), alone=False)
    assert "another process is writing" in capsys.readouterr().err
    assert [header(c, tmp_path)["status"] for c in company] == ["running", "done"]
