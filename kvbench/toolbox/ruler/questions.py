"""Questions over paragraphs: qa_1 and qa_2."""

from __future__ import annotations

import functools
import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from kvbench import corpora
from kvbench.errors import UsageError
from kvbench.fetch import corpus
from kvbench.prompt import Writer
from kvbench.task import Context
from kvbench.toolbox.ruler.shared import Wording, fit, make_context, token_count, too_short

_TASK = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
)
_QA = Wording(
    f"{_TASK}The following are given documents.",
    f"\n\n{_TASK}Question: {{query}}",
    " Answer:",
)


@dataclass(frozen=True)
class _Question:
    id: str
    cluster: str
    text: str
    answers: tuple[str, ...]
    gold: tuple[str, ...]  # the paragraphs with the answer
    near: tuple[str, ...]  # those which come next


@functools.cache
def _squad() -> tuple[_Question, ...]:
    """The answerable questions about articles of the task side, in file order."""
    found = []
    articles = json.loads(corpus("squad").read_text(encoding="utf-8"))["data"]
    for article, text in zip(articles, corpora.squad_articles(), strict=True):
        if corpora.calibration_part(text):
            continue
        paragraphs = tuple(dict.fromkeys(part["context"] for part in article["paragraphs"]))
        for part in article["paragraphs"]:
            near = tuple(paragraph for paragraph in paragraphs if paragraph != part["context"])
            found += [
                _Question(
                    id=asked["id"],
                    cluster=f"squad-{article['title']}",
                    text=asked["question"],
                    answers=tuple(dict.fromkeys(answer["text"] for answer in asked["answers"])),
                    gold=(part["context"],),
                    near=near,
                )
                for asked in part["qas"]
                if not asked["is_impossible"]
            ]
    return tuple(found)


@functools.cache
def _hotpotqa() -> tuple[_Question, ...]:
    """The questions whose supporting paragraphs are all on the task side, in file order."""
    found = []
    task = set(corpora.documents("hotpotqa", "task"))
    for row in json.loads(corpus("hotpotqa").read_text(encoding="utf-8")):
        supporting = {title for title, _ in row["supporting_facts"]}
        own = {f"{title}\n{''.join(sentences)}": title in supporting for title, sentences in row["context"]}
        gold = tuple(paragraph for paragraph, supports in own.items() if supports)
        if task.issuperset(gold):
            near = tuple(paragraph for paragraph, supports in own.items() if not supports and paragraph in task)
            cluster = f"hotpotqa-{row['_id']}"
            found.append(_Question(row["_id"], cluster, row["question"], (row["answer"],), gold, near))
    return tuple(found)


@functools.cache
def _squad_paragraphs() -> tuple[str, ...]:
    return tuple(dict.fromkeys(paragraph for question in _squad() for paragraph in question.gold + question.near))


def _paragraphs(question: _Question, name: str, draw: random.Random) -> Iterator[str]:
    """The question's own, then those near them, then any: each once. HotpotQA's where SQuAD has no more."""
    seen = set(question.gold)
    yield from question.gold
    for source in ("near", "squad", "hotpotqa") if name == "qa_1" else ("near", "hotpotqa"):
        if source == "near":
            paragraphs = question.near
        else:
            paragraphs = _squad_paragraphs() if source == "squad" else corpora.documents("hotpotqa", "task")
        for paragraph in draw.sample(paragraphs, len(paragraphs)):
            if paragraph not in seen:
                seen.add(paragraph)
                yield paragraph


def qa(name: str, context: int, writer: Writer, seed: int) -> Iterator[Context]:
    """Questions in random order, all of them before one comes again."""
    questions = _squad() if name == "qa_1" else _hotpotqa()
    intro, frame = len(writer.encode(_QA.intro)), writer.overhead("", _QA.prefix)
    number = 0
    for again in itertools.count():
        for question in random.Random(f"{name}-{seed}-{again}").sample(questions, len(questions)):
            room = context - frame - token_count(writer, _QA.question.format(query=question.text))
            gold = intro + sum(token_count(writer, _document(i, text)) for i, text in enumerate(question.gold, 1))
            if gold > room:  # its own paragraphs are too long
                if context < (least := _least(name, writer)):
                    raise too_short(name, context, least)
            elif found := _ask(question, f"{name}-{seed}-{number:05d}", context, room, writer):
                number += 1
                yield found


@functools.lru_cache(maxsize=4)
def _least(name: str, writer: Writer) -> int:
    """Tokens of the shortest prompt with a question's own paragraphs alone."""
    questions = _squad() if name == "qa_1" else _hotpotqa()
    asked = writer.encode_all([_QA.question.format(query=question.text) for question in questions])
    read = writer.encode_all(
        [_QA.intro + "".join(itertools.starmap(_document, enumerate(q.gold, 1))) for q in questions]
    )
    return writer.overhead("", _QA.prefix) + min(len(a) + len(b) for a, b in zip(asked, read, strict=True))


def _ask(question: _Question, name: str, context: int, room: int, writer: Writer) -> Context | None:
    draw = random.Random(name)
    candidates = _paragraphs(question, name.partition("-")[0], draw)
    chosen: list[str] = []
    used = len(writer.encode(_QA.intro))
    guess = 0
    # A little more than fits: with its neighbours a document may have fewer tokens.
    while used <= room + room // 64:
        if not (paragraph := next(candidates, "")):
            raise UsageError(
                f"task.context={context} is longer than all documents: use {context - room + used} or less"
            )
        chosen.append(paragraph)
        used += token_count(writer, _document(len(chosen), paragraph))
        guess = len(chosen) if used <= room else guess

    def order(number: int) -> list[int]:
        return random.Random(f"{name}-{number}").sample(range(number), number)

    def text(number: int) -> str:
        return _QA.intro + "".join(_document(place, chosen[i]) for place, i in enumerate(order(number), 1))

    fitted = fit(writer, text, guess, len(question.gold), len(chosen), room)
    if fitted is None:
        return None
    number, ids = fitted
    places = [order(number).index(i) for i in range(len(question.gold))]
    depths = [round(place / max(1, number - 1), 4) for place in places]
    asked = _QA.question.format(query=question.text)
    made = make_context(
        name, ids, asked, _QA.prefix, question.answers, context, question=question.id, documents=number, depths=depths
    )
    return replace(made, cluster_id=question.cluster)


def _document(number: int, text: str) -> str:
    return f"\n\nDocument {number}:\n{text}"
