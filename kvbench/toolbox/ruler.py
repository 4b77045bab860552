"""The 13 sets of RULER (arXiv:2404.06654), generated with the model's own tokenizer. What differs: tasks/ruler.py.

A stream is endless and random: its i-th example depends on the set, the length, the seed and i only.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import random
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from kvbench import corpora
from kvbench.errors import UsageError
from kvbench.fetch import corpus
from kvbench.prompt import Writer
from kvbench.task import Context, Example
from kvbench.toolbox.needles import (
    LEAST_HAYSTACK,
    NOISE,
    Hunt,
    documents,
    haystack,
    hide,
    listing,
    word_pairs,
    wordlist,
)

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
_NEW_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
_HOPS = 4
_COMMON = 10  # words that cwe asks for
_LEAST_UNCOMMON = 10


class _Wording(NamedTuple):
    """What stands before and after what is read. Where RULER has a line end before the question, it is part of it."""

    intro: str
    question: str
    prefix: str


_VT = _Wording(
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n",
    "\nQuestion: Find all variables that are assigned the value {query} in the text above.",
    " Answer: According to the chain(s) of variable assignment in the text above, {number} variables are assigned the "
    "value {query}, they are: ",
)
_CWE = _Wording(
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n",
    "\nQuestion: What are the 10 most common words in the above list?",
    " Answer: The top 10 words that appear most often in the list are:",
)
_FWE = _Wording(
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words.",
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
    "appeared words in the above coded text?",
    " Answer: According to the coded text above, the three most frequently appeared words are:",
)
_TASK = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
)
_QA = _Wording(
    f"{_TASK}The following are given documents.",
    f"\n\n{_TASK}Question: {{query}}",
    " Answer:",
)


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
            return " " + _numbered(references)
        case "qa":
            return f" {references[0]}"
        case _:
            return f" {listing(references)}."


def score(name: str, references: Sequence[str], answer: str) -> float:
    """string_match_part for qa: is one reference in the answer? Otherwise string_match_all: the share that is."""
    found = [reference.lower() in answer.lower() for reference in references]
    return float(any(found)) if family(name) == "qa" else sum(found) / len(found)


def data(name: str) -> tuple[str, ...]:
    """The texts that a set is drawn from."""
    match family(name):
        case "niah":
            return documents(Hunt(0, **_HUNTS[name]).haystack)
        case "qa":
            return corpora.documents("squad" if name == "qa_1" else "hotpotqa", "task")
        case _:
            return (NOISE,) if name == "vt" else _words() if name == "cwe" else ()


def stream(name: str, context: int, writer: Writer, seed: int) -> Iterator[Context]:
    """A set's examples with prompts of at most `context` tokens. Raises UsageError if the shortest is longer."""
    if family(name) == "qa":
        return _qa(name, context, writer, seed)
    draw: Callable[[str, int, Writer], Context]
    if name in _HUNTS:
        hunt = Hunt(context, **_HUNTS[name])
        least, draw = hunt.least(writer), functools.partial(_niah, hunt)
    elif name == "cwe":
        least, draw = _cwe_least(writer, _FEW), _cwe
    else:
        least, draw = (_vt_least(writer), _vt) if name == "vt" else (_fwe_least(writer), _fwe)
    if context < least:
        raise _too_short(name, context, least)
    return (draw(f"{name}-{seed}-{i:05d}", context, writer) for i in itertools.count())


def _too_short(name: str, context: int, least: int) -> UsageError:
    return UsageError(f"task.context={context} is too short for {name}: use {least} or more")


def _context(
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


def _niah(hunt: Hunt, name: str, context: int, writer: Writer) -> Context:
    found = hunt.draw(writer, name, random.Random(name), 0)
    (example,) = found.examples
    info = {"set": name.partition("-")[0], "context": context, "depths": example.info["depths"]}
    return replace(found, examples=(replace(example, info=info),))


# Variable tracking


def _chain(draw: random.Random, letters: int) -> tuple[str, list[str], list[str]]:
    """A value, the variables that have it, and the lines that say so."""
    names: list[str] = []
    while len(names) <= _HOPS:
        new = "".join(draw.choices(string.ascii_uppercase, k=letters))
        names += [new] if new not in names else []
    value = str(draw.randrange(10_000, 99_999))
    return value, names, _assignments(value, names)


def _assignments(value: str, names: list[str]) -> list[str]:
    return [f"VAR {names[0]} = {value}"] + [f"VAR {b} = VAR {a} " for a, b in itertools.pairwise(names)]


def _vt_ask(value: str) -> tuple[str, str]:
    return _VT.question.format(query=value), _VT.prefix.format(query=value, number=_HOPS + 1)


def _vt_solved(value: str, names: list[str], lines: list[str]) -> str:
    return _VT.intro + "\n".join(lines) + "".join(_vt_ask(value)) + target("vt", names) + "\n\n"


def _vt(name: str, context: int, writer: Writer) -> Context:
    draw = random.Random(name)
    value, names, lines = _chain(draw, letters=3)
    # Up to RULER's 500 tokens, or a quarter of a short prompt.
    spare = min(500, context // 4) - len(writer.encode(_vt_solved(value, names, lines)))
    for _ in range(spare // len(writer.encode("\n" + NOISE))):
        lines.insert(draw.randrange(len(lines) + 1), NOISE)
    head = _before_word(writer, _vt_solved(value, names, lines) + _VT.intro)
    value, names, lines = _chain(draw, letters=5)
    question, prefix = _vt_ask(value)
    depths = sorted(draw.random() for _ in lines)
    length = context - writer.overhead(question, prefix) - len(head)
    ids, found = hide(writer, haystack("noise", writer), 0, length, lines, depths)
    return _context(name, (*head, *ids), question, prefix, names, context, depths=found)


def _vt_least(writer: Writer) -> int:
    short, long = ["QXZ"] * (_HOPS + 1), ["QXZJV"] * (_HOPS + 1)  # names that few tokenizers know parts of
    head = _before_word(writer, _vt_solved("77777", short, _assignments("77777", short)) + _VT.intro)
    lines = writer.encode_all(["\n" + line for line in _assignments("77777", long)])
    return writer.overhead(*_vt_ask("77777")) + len(head) + sum(map(len, lines)) + LEAST_HAYSTACK


def _before_word(writer: Writer, text: str) -> tuple[int, ...]:
    """Token ids of a text that a capital letter follows: its line ends may be other tokens than at a text's end."""
    word = writer.encode("The")
    ids = writer.encode(text + "The")
    return ids[: -len(word)] if ids[-len(word) :] == word else writer.encode(text)


# Common words


@functools.cache
def _words() -> tuple[str, ...]:
    return tuple(sorted({word for kind in ("noun", "adjective", "verb") for word in wordlist(kind)}))


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


class _Times(NamedTuple):
    """How often words stand in cwe's list, and in its solved example."""

    common: int
    uncommon: int
    solved_words: int
    solved_common: int
    solved_uncommon: int


_MANY, _FEW = _Times(30, 3, 40, 10, 3), _Times(6, 1, 20, 3, 1)


def _cwe_solved(words: list[str], times: _Times, draw: random.Random) -> str:
    listed = words[:_COMMON] * times.solved_common + words[_COMMON:] * times.solved_uncommon
    draw.shuffle(listed)
    return _CWE.intro + _numbered(listed) + _CWE.question + _CWE.prefix + target("cwe", words[:_COMMON]) + "\n"


def _cwe(name: str, context: int, writer: Writer) -> Context:
    draw = random.Random(name)
    # RULER decides by the length with the answer. Where a token is less than half a word, many do not fit.
    many = context + new_tokens("cwe") >= 4096 and context >= _cwe_least(writer, _MANY)
    times = _MANY if many else _FEW
    room = context - writer.overhead(_CWE.question, _CWE.prefix)
    fitted = None
    while fitted is None:  # a draw of long words may not fit into the shortest prompts
        head = _cwe_solved(draw.sample(_words(), times.solved_words), times, draw) + _CWE.intro
        left = room - len(writer.encode(head))
        words = draw.sample(_words(), len(_words()))
        sizes = _cwe_sizes(writer, words, times)
        if sizes[-1] <= left:  # above 120,000 tokens or so
            words += itertools.islice(word_pairs(draw, set(words)), left // (4 * times.uncommon))
            sizes = _cwe_sizes(writer, words, times)
        text = functools.partial(_cwe_text, name, head, words, times)
        guess = int(np.searchsorted(sizes, left, side="right"))
        fitted = _fit(writer, text, guess, _LEAST_UNCOMMON, len(words) - _COMMON, room)
    return _context(name, fitted[1], _CWE.question, _CWE.prefix, words[:_COMMON], context)


def _cwe_text(name: str, head: str, words: list[str], times: _Times, uncommon: int) -> str:
    listed = words[:_COMMON] * times.common + words[_COMMON : _COMMON + uncommon] * times.uncommon
    random.Random(f"{name}-{uncommon}").shuffle(listed)
    return head + _numbered(listed)


def _cwe_sizes(writer: Writer, words: list[str], times: _Times) -> np.ndarray:
    """Tokens of a list with 1, 2, ... uncommon words."""
    lengths = [_length(writer, " " + word) for word in words]
    listed = times.common * _COMMON + times.uncommon * np.arange(1, len(words) - _COMMON + 1)
    sizes = times.common * sum(lengths[:_COMMON]) + times.uncommon * np.cumsum(lengths[_COMMON:])
    return sizes + _numbers(writer, int(listed[-1]))[listed - 1]


@functools.lru_cache(maxsize=4)
def _cwe_least(writer: Writer, times: _Times) -> int:
    """Tokens that most draws need; `_cwe` passes over the others."""
    words = sorted(_words(), key=lambda word: _length(writer, " " + word))
    usual = words[len(words) * 3 // 4]
    head = _cwe_solved([usual] * times.solved_words, times, random.Random()) + _CWE.intro
    text = _cwe_text("", head, [usual] * (_COMMON + _LEAST_UNCOMMON), times, _LEAST_UNCOMMON)
    return writer.overhead(_CWE.question, _CWE.prefix) + len(writer.encode(text))


@functools.lru_cache(maxsize=4)
def _numbers(writer: Writer, most: int) -> np.ndarray:
    """Tokens of the first 1, 2, ..., `most` numbers of a list."""
    return np.cumsum([len(ids) for ids in writer.encode_all([f" {number}." for number in range(1, most + 1)])])


# Frequent words


def _fwe_counts(number: int, ranks: np.ndarray) -> np.ndarray:
    """How often words of these ranks stand among `number` words: Zipf's law with exponent 2."""
    return (number / ranks**2 / (math.pi**2 / 6)).astype(int)


def _fwe(name: str, context: int, writer: Writer) -> Context:
    draw = random.Random(name)
    vocabulary = ["..."]
    while len(vocabulary) < max(5, context // 50):
        new = "".join(draw.choices(string.ascii_lowercase, k=6))
        vocabulary += [new] if new not in vocabulary else []
    intro = writer.encode(_FWE.intro)
    room = context - writer.overhead(_FWE.question, _FWE.prefix) - len(intro)
    tokens = writer.encode_all([" " + word for word in vocabulary])
    lengths, ranks = np.array([len(ids) for ids in tokens]), np.arange(1, len(vocabulary) + 1)

    def fits(number: int) -> bool:
        return bool(_fwe_counts(number, ranks) @ lengths <= room)

    number, above = _FWE_LEAST, 2 * room + 2 * _FWE_LEAST
    while above - number > 1:
        middle = (number + above) // 2
        number, above = (middle, above) if fits(middle) else (number, middle)
    while (counts := _fwe_counts(number, ranks))[3] == counts[
        4
    ]:  # the third to be found is no more frequent than others
        number -= 1
    # Filled up with the noise word; the last one is cut.
    counts[0] += -(-(room - counts @ lengths) // lengths[0])
    listed = [ids for ids, times in zip(tokens, counts, strict=True) for _ in range(times)][1:]
    draw.shuffle(listed)
    ids = list(itertools.chain(intro, *listed, tokens[0]))[: len(intro) + room]
    return _context(name, ids, _FWE.question, _FWE.prefix, vocabulary[1:4], context)


_FWE_LEAST = 27  # words: with fewer, there is no third one


def _fwe_least(writer: Writer) -> int:
    noise, *others = _fwe_counts(_FWE_LEAST, np.arange(1, 6))
    words = noise * len(writer.encode(" ...")) + sum(others) * len(" qxzjvk")  # a letter is a token at most
    return writer.overhead(_FWE.question, _FWE.prefix) + len(writer.encode(_FWE.intro)) + int(words)


# Question answering


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


def _qa(name: str, context: int, writer: Writer, seed: int) -> Iterator[Context]:
    """Questions in random order, all of them before one comes again."""
    questions = _squad() if name == "qa_1" else _hotpotqa()
    intro, frame = len(writer.encode(_QA.intro)), writer.overhead("", _QA.prefix)
    number = 0
    for again in itertools.count():
        for question in random.Random(f"{name}-{seed}-{again}").sample(questions, len(questions)):
            room = context - frame - _length(writer, _QA.question.format(query=question.text))
            gold = intro + sum(_length(writer, _document(i, text)) for i, text in enumerate(question.gold, 1))
            if gold > room:  # its own paragraphs are too long
                if context < (least := _qa_least(name, writer)):
                    raise _too_short(name, context, least)
            elif found := _ask(question, f"{name}-{seed}-{number:05d}", context, room, writer):
                number += 1
                yield found


@functools.lru_cache(maxsize=4)
def _qa_least(name: str, writer: Writer) -> int:
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
        used += _length(writer, _document(len(chosen), paragraph))
        guess = len(chosen) if used <= room else guess

    def order(number: int) -> list[int]:
        return random.Random(f"{name}-{number}").sample(range(number), number)

    def text(number: int) -> str:
        return _QA.intro + "".join(_document(place, chosen[i]) for place, i in enumerate(order(number), 1))

    fitted = _fit(writer, text, guess, len(question.gold), len(chosen), room)
    if fitted is None:
        return None
    number, ids = fitted
    places = [order(number).index(i) for i in range(len(question.gold))]
    depths = [round(place / max(1, number - 1), 4) for place in places]
    asked = _QA.question.format(query=question.text)
    made = _context(
        name, ids, asked, _QA.prefix, question.answers, context, question=question.id, documents=number, depths=depths
    )
    return replace(made, cluster_id=question.cluster)


def _document(number: int, text: str) -> str:
    return f"\n\nDocument {number}:\n{text}"


@functools.lru_cache(maxsize=2**17)
def _length(writer: Writer, text: str) -> int:
    return len(writer.encode(text))


def _fit(
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
