"""Texts, and their split: a quarter of the documents is for calibration, and no task ever draws from it.

So nothing that a method fitted to a model's text can have seen what it is tested on.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from kvbench.errors import UsageError
from kvbench.fetch import corpus

Part = Literal["task", "calibration"]

CALIBRATION_TEXTS = ("essays", "squad", "hotpotqa", "pydoc", "stdlib")  # prose, questions and code: the default mix

_DATE = r"(?:January|February|March|April|May|June|July|August|September|October|November|December) (?:19|20)\d\d"
# RULER's file has the essays glued together, and each begins with its date. A date inside a sentence follows a blank or
# a bracket, or a word at the end of a line, and goes on with neither a line end nor a capital.
_ESSAY = re.compile(
    rf"(?<![\s,(]){_DATE}(?=[A-Z\"(_\n]|  \n)"  # glued to the end of the essay before
    rf"|(?<!\w\n)(?<=\n){_DATE}(?=[A-Z\"(_\n]|  \n)"
    rf"|(?<![^\n\w.]){_DATE},? \(?(?:rev|corrected)"
)
_CLAUSE_END = re.compile(r"(?<=[.!?;:,]) ")
_BLOCK = 8_000  # characters: about 2,000 tokens


def calibration_part(document: str) -> bool:
    """Whether a document is reserved for calibration: decided by its text alone, a quarter of all."""
    return hashlib.sha256(document.encode()).digest()[0] % 4 == 0


@functools.cache
def documents(source: str, part: Part) -> tuple[str, ...]:
    """One side of a source, in a fixed order: `essays`, `squad`, `hotpotqa`, a .txt file or folder, or hub data.

    Hub data is `hub:<id>@<revision>[:<config>]`, the column `text` of its split `train`. `pydoc` and `stdlib` have a
    calibration side only. Raises UsageError when the data is missing or that side is empty.
    """
    if source in _CALIBRATION_ONLY:
        if part == "task":
            raise UsageError(f"{source} is for calibration only")
        return _CALIBRATION_ONLY[source]()
    if source.startswith("hub:"):
        found = _hub_texts(source)
    else:
        found = _SOURCES[source]() if source in _SOURCES else text_file(source)
    task = tuple(document for document in found if not calibration_part(document))
    found = task if part == "task" else _unquoted([d for d in found if calibration_part(d)], task)
    if not found:
        raise UsageError(f"{source} is too short: none of it falls on the {part} side")
    return found


def _unquoted(documents: Sequence[str], task: Sequence[str]) -> tuple[str, ...]:
    """Those of which no clause of some length is also in a text of the task side: essays quote each other."""
    known = {clause for document in task for clause in _clauses(document)}
    return tuple(document for document in documents if known.isdisjoint(_clauses(document)))


def _clauses(document: str) -> Iterator[str]:
    text = " ".join(document.split())  # a quotation's lines may break elsewhere
    return (clause for clause in _CLAUSE_END.split(text) if len(clause) >= 60)


def text_hash(texts: Iterable[str]) -> str:
    """SHA-256 of texts in their order: what identifies a task's data in a record's header."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


@functools.cache
def essays() -> tuple[str, ...]:
    """Paul Graham's 213 dated essays, in RULER's order; a few undated ones are at the end of the one before them.

    No essay is there twice; two of them share a quarter to a third of their text, as quotations, with another one.
    """
    text = _json("essays")["text"]
    starts = [match.start() for match in _ESSAY.finditer(text)]
    return tuple(text[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True))


@functools.cache
def squad_articles() -> tuple[str, ...]:
    """The articles of SQuAD v2 dev in file order: title and paragraphs."""
    return tuple(
        "\n\n".join([article["title"].replace("_", " "), *(part["context"] for part in article["paragraphs"])])
        for article in _json("squad")["data"]
    )


@functools.cache
def hotpotqa_articles() -> tuple[str, ...]:
    """The different paragraphs of HotpotQA dev, `title\\ntext`, as they first appear: about 66,000."""
    return tuple(
        dict.fromkeys(
            f"{title}\n{''.join(sentences)}" for row in _json("hotpotqa") for title, sentences in row["context"]
        )
    )


@functools.cache
def text_file(path: str) -> tuple[str, ...]:
    """A .txt file, or all of a folder (sorted), cut at line ends into documents of about 8,000 characters."""
    place = Path(path).expanduser()
    files = sorted(place.glob("**/*.txt")) if place.is_dir() else [place]
    if not files or not files[0].is_file():
        raise UsageError(f"{path} is neither a text file, nor a folder of .txt files, nor one of {', '.join(_SOURCES)}")
    found = []
    for file in files:
        block = ""
        for line in _read(file).splitlines(keepends=True):
            block += line
            if len(block) >= _BLOCK:
                found.append(block)
                block = ""
        found.append(block)
    return tuple(block for block in found if block.strip())


@functools.cache
def pydoc_topics() -> tuple[str, ...]:
    """The topics of `help()`: Python's language reference, of the running version."""
    from pydoc_data.topics import topics

    return tuple(topics[name] for name in sorted(topics))


@functools.cache
def stdlib_source() -> tuple[str, ...]:
    """The modules and packages of the running Python's standard library as source code, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
    files = sorted(file.relative_to(root) for file in root.glob("**/*.py"))
    texts = ((root / file).read_text(encoding="utf-8") for file in files if not skipped.intersection(file.parts))
    return tuple(text for text in texts if text.strip())


def _hub_texts(source: str) -> tuple[str, ...]:
    from kvbench.hub import rows

    try:
        return tuple(row["text"] for row in rows(source, "train"))
    except KeyError as error:
        raise UsageError(f"{source} has no column `text`") from error


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def _json(name: str) -> Any:
    return json.loads(corpus(name).read_text(encoding="utf-8"))


_SOURCES: dict[str, Callable[[], tuple[str, ...]]] = {
    "essays": essays,
    "squad": squad_articles,
    "hotpotqa": hotpotqa_articles,
}
_CALIBRATION_ONLY = {"pydoc": pydoc_topics, "stdlib": stdlib_source}
