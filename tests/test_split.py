"""What calibration may read is in no task: told by the texts themselves, whatever the task did with them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import islice

import pytest
from conftest import byte_tokenizer

from kvbench import corpora, plugins
from kvbench.config import build_plugin
from kvbench.errors import UsageError
from kvbench.prompt import Writer

PIECE = 200  # characters; what two texts share by chance is shorter
BLOCK = PIECE // 2  # every piece of 200 has one of the calibration text's consecutive 100s in it
SOURCES = ("essays", "squad", "hotpotqa")
SEEDS, CONTEXTS = (0, 1, 7), 4


def plain(text: str) -> str:
    return " ".join(text.split())


@functools.cache
def blocks() -> dict[int, tuple[int, int]]:
    """Hash of a block -> (calibration document, where the block begins)."""
    found = {}
    for number, text in enumerate(calibration()):
        for start in range(0, len(text) - BLOCK + 1, BLOCK):
            found[hash(text[start : start + BLOCK])] = number, start
    return found


@functools.cache
def calibration() -> tuple[str, ...]:
    return tuple(plain(text) for source in SOURCES for text in corpora.documents(source, "calibration"))


def shared(text: str) -> set[str]:
    """The pieces of `text` that calibration may have read."""
    found = set()
    for i in range(len(text) - BLOCK + 1):
        number, start = blocks().get(hash(text[i : i + BLOCK]), (-1, 0))
        if number < 0:
            continue
        other, a, b, end = calibration()[number], i, start, i
        while a and b and text[a - 1] == other[b - 1]:
            a, b = a - 1, b - 1
        while end < len(text) and b + end - a < len(other) and text[end] == other[b + end - a]:
            end += 1
        if end - a >= PIECE:
            found.add(text[a:end])
    return found


class Bytes(Writer):
    """A token for each byte, without a tokenizer's work: whole corpora are read here."""

    def __init__(self) -> None:
        super().__init__(byte_tokenizer())
        self._adds_blank = False

    def _plain(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        return [tuple(text.encode()) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")


@pytest.fixture(scope="module")
def writer() -> Writer:
    return Bytes()


@pytest.mark.usefixtures("corpora")
def test_a_shared_piece_is_found() -> None:
    """That the test below can fail: wherever the piece begins, and whatever is around it."""
    for source in SOURCES:
        text = plain(max(corpora.documents(source, "calibration"), key=len))
        for start in (0, 57):
            piece = text[start : start + PIECE]
            (found,) = shared(f"Read this. {piece} And answer.")
            assert piece in found
    assert not shared("The quick brown fox. " * 100)


@pytest.mark.usefixtures("corpora")
@pytest.mark.parametrize("name", plugins.files("tasks"))
def test_no_task_has_a_piece_of_the_calibration_texts(name: str, writer: Writer) -> None:
    drawn = 0
    try:
        task = build_plugin("tasks", name, {})
        for seed in SEEDS:
            for context in islice(task.contexts(writer, seed), CONTEXTS):
                parts = [writer.decode(context.ids), *(e.question for e in context.examples)]
                for text in map(plain, parts):
                    assert not shared(text), context.id
                drawn += 1
    except UsageError as error:
        pytest.skip(f"{name}: {error}")  # data that are not on this machine
    assert drawn


@pytest.mark.usefixtures("corpora")
@pytest.mark.parametrize("source", ["essays", "squad"])
def test_niah_has_none_whatever_its_haystack(source: str, writer: Writer) -> None:
    task = build_plugin("tasks", "niah", {"haystack": source, "context": 20_000})
    for context in islice(task.contexts(writer, 3), 3):
        assert not shared(plain(writer.decode(context.ids))), context.id
