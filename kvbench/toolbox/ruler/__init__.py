"""The 13 sets of RULER (arXiv:2404.06654), generated with the model's own tokenizer. What differs: tasks/ruler.py.

A stream is endless and random: its i-th example depends on the set, the length, the seed and i only.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from kvbench import corpora
from kvbench.prompt import Writer
from kvbench.task import Context
from kvbench.toolbox.needles import NOISE, Hunt, documents
from kvbench.toolbox.ruler.questions import qa
from kvbench.toolbox.ruler.shared import family, new_tokens, score, target, too_short
from kvbench.toolbox.ruler.variables import vt, vt_least
from kvbench.toolbox.ruler.words import cwe, cwe_least, cwe_words, fwe, fwe_least

__all__ = ["SETS", "data", "family", "new_tokens", "score", "stream", "target"]

_HUNTS: dict[str, dict[str, Any]] = {
    "niah_single_1": {"haystack": "noise"},
    "niah_single_2": {},
    "niah_single_3": {"value": "uuid"},
    "niah_multikey_1": {"keys": 4},
    "niah_multikey_2": {"haystack": "needles"},
    "niah_multikey_3": {"haystack": "needles", "uuid_keys": True, "value": "uuid"},
    "niah_multivalue": {"values": 4},
    "niah_multiquery": {"keys": 4, "ask": 4},
}
SETS = (*_HUNTS, "vt", "cwe", "fwe", "qa_1", "qa_2")


def data(name: str) -> tuple[str, ...]:
    """The texts that a set is drawn from."""
    match family(name):
        case "niah":
            return documents(Hunt(0, **_HUNTS[name]).haystack)
        case "qa":
            return corpora.documents("squad" if name == "qa_1" else "hotpotqa", "task")
        case _:
            return (NOISE,) if name == "vt" else cwe_words() if name == "cwe" else ()


def stream(name: str, context: int, writer: Writer, seed: int) -> Iterator[Context]:
    """A set's examples with prompts of at most `context` tokens. Raises UsageError if the shortest is longer."""
    if family(name) == "qa":
        return qa(name, context, writer, seed)
    names = (f"{name}-{seed}-{i:05d}" for i in itertools.count())
    if name in _HUNTS:
        hunt = Hunt(context, **_HUNTS[name])
        least = hunt.least(writer)
        found = (_niah(hunt, one, writer, seed, i) for i, one in enumerate(names))
    elif name == "cwe":
        least, found = cwe_least(writer), (cwe(one, context, writer) for one in names)
    elif name == "vt":
        least, found = vt_least(writer), (vt(one, context, writer) for one in names)
    else:
        least, found = fwe_least(writer), (fwe(one, context, writer) for one in names)
    if context < least:
        raise too_short(name, context, least)
    return found


def _niah(hunt: Hunt, name: str, writer: Writer, seed: int, index: int) -> Context:
    found = hunt.draw(writer, name, seed, index)
    (example,) = found.examples
    info = {"set": name.partition("-")[0], "context": hunt.context, "depths": example.info["depths"]}
    return replace(found, examples=(replace(example, info=info),))
