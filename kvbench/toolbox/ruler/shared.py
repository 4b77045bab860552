"""What RULER's sets share: answers and scores, a context with its one example, texts that fit a length."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from kvbench.errors import UsageError
from kvbench.prompt import Writer
from kvbench.task import Context, Example
from kvbench.toolbox.needles import listing

_NEW_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}


class Wording(NamedTuple):
    """What stands before and after what is read. Where RULER has a line end before the question, it is part of it."""

    intro: str
    question: str
    prefix: str


def family(name: str) -> str:
    """`niah`, `vt`, `cwe`, `fwe` or `qa`."""
    return name.partition("_")[0]


def new_tokens(name: str) -> int:
    """The longest answer to a set, in tokens, that its authors allow."""
    return _NEW_TOKENS[family(name)]


def target(name: str, references: Sequence[str]) -> str:
    """The answer to a set, as it goes on after the answer prefix: as in the solved example where there is one."""
    match family(name):
        case "vt":
            return " " + " ".join(references)
        case "cwe":
            return " " + numbered(references)
        case "qa":
            return f" {references[0]}"
        case _:
            return f" {listing(references)}."


def score(name: str, references: Sequence[str], answer: str) -> float:
    """string_match_part for qa: is one reference in the answer? Otherwise string_match_all: the share that is."""
    found = [reference.lower() in answer.lower() for reference in references]
    return float(any(found)) if family(name) == "qa" else sum(found) / len(found)


def numbered(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def too_short(name: str, context: int, least: int) -> UsageError:
    return UsageError(f"task.context={context} is too short for {name}: use {least} or more")


def make_context(
    name: str, ids: Sequence[int], asked: str, prefix: str, references: Sequence[str], length: int, **info: Any
) -> Context:
    """A context with its one example; a set's name is what its examples' names begin with."""
    set_ = name.partition("-")[0]
    example = Example(
        id=name,
        question=asked,
        references=tuple(references),
        target=target(set_, references),
        answer_prefix=prefix,
        max_new_tokens=new_tokens(set_),
        info={"set": set_, "context": length, **info},
    )
    return Context(id=name, cluster_id=name, ids=tuple(ids), examples=(example,))


@functools.lru_cache(maxsize=2**17)
def token_count(writer: Writer, text: str) -> int:
    return len(writer.encode(text))


def fit(
    writer: Writer, text: Callable[[int], str], guess: int, least: int, most: int, room: int
) -> tuple[int, tuple[int, ...]] | None:
    """The largest number whose text has at most `room` tokens, and these; None if not even `least` fits.

    `guess` is found from parts that were tokenised apart: nearly always right, so a text is tokenised twice.
    """
    number = min(max(guess, least), most)
    ids = writer.encode(text(number))
    while len(ids) > room:
        number -= 1
        if number < least:
            return None
        ids = writer.encode(text(number))
    while number < most and len(more := writer.encode(text(number + 1))) <= room:
        number, ids = number + 1, more
    return number, ids
