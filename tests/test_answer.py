"""Conversations, choices and stop texts: each against one pass of stock transformers over the whole text."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from kvbench import loop, plugins
from kvbench.answer import ended_by, units
from kvbench.budget import Budget
from kvbench.cell import Cell, ModelConfig, Settings
from kvbench.model import Model
from kvbench.prompt import Writer
from kvbench.store import read_cell
from kvbench.task import Context, Example, Task

TEXT = "the quick brown fox jumps over the lazy dog and runs away " * 3
CONFIG = ModelConfig(name="tiny", path="tiny", dtype="float32")


@dataclass(frozen=True)
class Talk(Task):
    """Two turns and a question apart, with choices if asked."""

    golden: bool = True
    choices: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()

    def contexts(self, writer: Writer, seed: int) -> Iterator[Context]:
        more: dict[str, Any] = {"max_new_tokens": 6, "choices": self.choices, "stop": self.stop}
        first = Example("a", " Who?", ("fox",), "a fox", history="a fox" if self.golden else None, **more)
        second = Example("b", " Where?", ("away",), "away", " It is", follows="a", **more)
        third = Example("c", " Why?", ("fun",), "fun", **more)
        yield Context("talk", "talk", writer.encode(TEXT), (first, second, third))

    def score(self, example: Example, answer: str) -> float:
        return float(len(answer) % 2)

    def score_choices(self, example: Example, logprobs: Sequence[float], greedy: Sequence[bool]) -> float:
        return float(logprobs[0] > logprobs[1])


@pytest.fixture(autouse=True)
def _tiny(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "load_model", lambda config: tiny)


@pytest.fixture(scope="module")
def stock(tiny: Model) -> Any:
    ours = tiny.network._model
    model = AutoModelForCausalLM.from_config(copy.deepcopy(ours.config), attn_implementation="sdpa").eval()
    model.load_state_dict(ours.state_dict())
    return model


def records(task: Talk, results: Path, method: str = "full", protocol: str = "blind") -> dict[str, dict[str, Any]]:
    cell = Cell(CONFIG, plugins.build_method(method), Budget.parse("0.5"), task, protocol)
    loop.run_cells([cell], Settings(results))
    return {record["id"]: record for record in read_cell(cell.folder(results))[1]}


@torch.inference_mode()
def logprobs(stock: Any, before: Sequence[int], ids: Sequence[int]) -> Tensor:
    """Of each token of `ids` after `before`, in one pass."""
    logits = stock(torch.tensor([[*before, *ids]])).logits[0, len(before) - 1 : -1]
    return logits.log_softmax(-1)[range(len(ids)), list(ids)]


def conversation(writer: Writer, said: Sequence[int]) -> list[int]:
    """Everything before the answer of the second turn."""
    first = writer.prompt(writer.encode(TEXT), " Who?")
    return [*first.context, *first.question, *first.tail, *said, *writer.follow_up(" Where?", " It is")]


@pytest.mark.parametrize("protocol", ["blind", "aware"])
def test_a_follow_up_sees_the_turn_before_and_its_golden_answer(
    tiny: Model, stock: Any, tmp_path: Path, protocol: str
) -> None:
    found = records(Talk(), tmp_path, protocol=protocol)
    before = conversation(tiny.writer, tiny.writer.encode("a fox"))
    expected = -float(logprobs(stock, before, tiny.writer.encode("away")).mean())
    assert found["b"]["answer_nll"] == pytest.approx(expected, abs=1e-4)
    alone = tiny.writer.prompt(tiny.writer.encode(TEXT), " Why?")
    expected = -float(logprobs(stock, [*alone.context, *alone.question, *alone.tail], tiny.writer.encode("fun")).mean())
    assert found["c"]["answer_nll"] == pytest.approx(expected, abs=1e-4)
    # Aware, a conversation is compressed with its first question, and the other question apart from it.
    more = len(tiny.writer.encode(" Who?")) if protocol == "aware" else 0
    context = len(tiny.writer.prompt(tiny.writer.encode(TEXT), "").context)
    assert found["a"]["tokens_context"] == found["b"]["tokens_context"] == context + more


def test_a_follow_up_may_see_the_models_own_answer(tiny: Model, stock: Any, tmp_path: Path) -> None:
    found = records(Talk(golden=False), tmp_path)
    said: list[int] = []  # a random model's bytes are no text: its answer is decoded again
    with torch.inference_mode():
        for _ in range(found["a"]["tokens_out"]):
            before = conversation(tiny.writer, said)[: -len(tiny.writer.follow_up(" Where?", " It is"))]
            said.append(int(stock(torch.tensor([before])).logits[0, -1].argmax()))
    said = [token for token in said if token not in tiny.stop]
    expected = -float(logprobs(stock, conversation(tiny.writer, said), tiny.writer.encode("away")).mean())
    assert found["b"]["answer_nll"] == pytest.approx(expected, abs=1e-4)


def test_a_conversation_broken_off_is_continued_to_the_same_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Talk(golden=False)
    whole = records(task, tmp_path / "whole", "snapkv")

    def broken(self: Talk, example: Example, answer: str) -> float:
        if example.id == "b":
            raise KeyboardInterrupt
        return float(len(answer) % 2)

    with monkeypatch.context() as patch:
        patch.setattr(Talk, "score", broken)
        with pytest.raises(KeyboardInterrupt):
            records(task, tmp_path / "broken", "snapkv")
    again = records(task, tmp_path / "broken", "snapkv")
    for name, record in whole.items():
        assert {k: v for k, v in record.items() if not k.endswith("_s")} == {
            k: v for k, v in again[name].items() if not k.endswith("_s")
        }


def test_choices_are_weighed_by_their_log_probabilities(tiny: Model, stock: Any, tmp_path: Path) -> None:
    choices = (" a fox", " a dog", " nobody at all")
    record = records(Talk(choices=choices), tmp_path)["a"]
    prompt = tiny.writer.prompt(tiny.writer.encode(TEXT), " Who?")
    before = [*prompt.context, *prompt.question, *prompt.tail]
    expected = [float(logprobs(stock, before, tiny.writer.encode(choice)).sum()) for choice in choices]
    assert record["choice_logprobs"] == pytest.approx(expected, abs=1e-3)
    assert record["answer"] == choices[max(range(3), key=expected.__getitem__)]
    assert record["score"] == float(expected[0] > expected[1])
    assert "tokens_out" not in record


def test_an_answer_ends_at_a_stop_text(tiny: Model, tmp_path: Path) -> None:
    free = records(Talk(), tmp_path / "free")["a"]["answer"]
    assert len(free) >= 3
    found = records(Talk(stop=("never said", free[1:3])), tmp_path / "stopped")["a"]
    assert found["answer"] == free[: free.index(free[1:3]) + 2]
    assert not ended_by(tiny, ())(tiny.writer.encode("anything"))
    assert ended_by(tiny, ())([*tiny.stop])


def test_plain_contexts_that_end_differently_are_compressed_apart(tiny: Model) -> None:
    """Without question and prefix the last token of the context is what is fed: another question needs it held."""
    bare, asked = Example("x", "", ("a",), "a"), Example("y", " Why?", ("a",), "a")
    context = Context("plain", "plain", tiny.writer.encode(TEXT), (bare, asked), chat=False)
    found = units(context, context.examples, "blind", tiny)
    assert len(found) == 2
    for unit in found:
        for turn in unit.turns:
            text = tiny.writer.decode([*unit.ids, *turn.fed])
            assert text.endswith(TEXT + turn.example.question)
