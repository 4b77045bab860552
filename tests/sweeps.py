"""Sweeps of cells that run in a moment, by the command line: a tiny model in a folder, and a toy of a task."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import byte_tokenizer, tiny_network

from kvbench.store import cells, read_cell

TASK = '''
from __future__ import annotations
import os, random, time
from collections.abc import Iterator
from dataclasses import dataclass
from kvbench.prompt import Writer
from kvbench.task import Context, Example, Task

@dataclass(frozen=True)
class Letters(Task):
    """Random letters, two questions each."""
    number: int = 4
    wait: float = 0.0  # seconds before each context

    def contexts(self, writer: Writer, seed: int) -> Iterator[Context]:
        info = {"device": os.environ.get("CUDA_VISIBLE_DEVICES")}
        for i in range(self.number):
            time.sleep(self.wait)
            text = "".join(random.Random(f"{seed}-{i}").choices("abcdefgh ", k=90))
            examples = tuple(
                Example(f"{seed}-{i}-{j}", f" What is {j}?", (text[j],), target=text[j], max_new_tokens=5, info=info)
                for j in range(2)
            )
            yield Context(f"{seed}-{i}", f"{i}", writer.encode(text), examples)

    def score(self, example: Example, answer: str) -> float:
        return sum(map(ord, answer)) % 11 / 10
'''
SWEEP = ["-m", "method=random,streamingllm", "budget=0.3", "seed=0,1"]  # two groups of two cells


@contextmanager
def prepared(folder: Path) -> Iterator[list[str]]:
    """Makes the model and the task; yields the words that choose them, also in processes that are started meanwhile."""
    (folder / "tasks").mkdir()
    (folder / "tasks" / "letters.py").write_text(TASK)
    package = importlib.import_module("kvbench.tasks")
    path = list(package.__path__)
    tiny_network()._model.save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    model = ["model.name=tiny", f"model.path={folder / 'model'}", "model.dtype=float32", "model.device=cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVBENCH_PLUGINS", str(folder))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield ["task=letters", *model, "tracker.mode=disabled", "timed=0"]
    package.__path__[:] = path  # for the tests that look at every plugin
    sys.modules.pop("kvbench.tasks.letters", None)


def timeless(results: Path) -> dict[str, list[dict[str, Any]]]:
    """The records of every cell, by its folder, without what a clock measured."""
    found = {}
    for folder in cells(results):
        records = read_cell(folder)[1]
        kept = [{key: value for key, value in one.items() if not key.endswith("_s")} for one in records]
        found[str(folder.relative_to(results))] = kept
    return found


def states(results: Path) -> list[str]:
    return [read_cell(folder)[0]["status"] for folder in cells(results)]
