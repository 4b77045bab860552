"""Needles in a haystack, of exact length, in the wording of RULER's niah (arXiv:2404.06654)."""

from __future__ import annotations

import functools
import itertools
import random
import re
import uuid
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np

from kvbench import corpora
from kvbench.errors import UsageError
from kvbench.prompt import Writer
from kvbench.task import Context, Example

_INTRO = (
    "Some special magic {kind}s are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind}s afterwards.\n"
)
_NEEDLE = "One of the special magic {kind}s for {key} is: {value}."
_QUESTION = "\nWhat are all the special magic {kind}s for {query} mentioned in the provided text?"
_PREFIX = " The special magic {kind}s for {query} mentioned in the provided text are"
_SINGULAR = {  # where one value is asked
    _INTRO: (
        "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the {kind} afterwards.\n"
    ),
    _QUESTION: "\nWhat is the special magic {kind} for {query} mentioned in the provided text?",
    _PREFIX: " The special magic {kind} for {query} mentioned in the provided text is",
}
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
LINES = ("noise", "needles")  # haystacks made of lines rather than of texts
DEPTHS = [round(100 * i / 39) / 100 for i in range(40)]
LEAST_HAYSTACK = 32  # tokens
# Each character of it is a token of its own, as good as always: no UUID has more.
_LONGEST_UUID = "0a0a0a0a-0a0a-4a0a-8a0a-0a0a0a0a0a0a"
# The blank after the end of a sentence and before a capital, but not after initials, Mr., Mrs. and the like.
_SENTENCE_END = re.compile(
    r"(?:(?<=[.!?])|(?<=[.!?][\"')]))(?<!\b[A-Z]\.)(?<!\b[A-Z][a-z]\.)(?<!\bMrs\.) (?=[\"'(\[_]?[A-Z0-9])"
)


@dataclass(frozen=True)
class Hunt:
    """What is hidden where, and what is asked."""

    context: int  # tokens of the whole prompt
    haystack: str = "essays"  # a source of `corpora`, noise, or needles: lines like the hidden ones, of other keys
    keys: int = 1
    values: int = 1  # of each key
    ask: int = 1  # keys
    uuid_keys: bool = False  # otherwise words
    value: str = "number"  # or uuid
    depths: tuple[float, ...] = ()  # of the needles in turn, on from one example to the next; none: drawn
    max_new_tokens: int = 128

    def least(self, writer: Writer) -> int:
        """Tokens of a prompt with hardly any haystack, whatever the keys."""
        key = _LONGEST_UUID if self.uuid_keys else _longest_key(writer)
        value = _LONGEST_UUID if self.value == "uuid" else "7777777"
        question, prefix = self._word(_QUESTION, [key] * self.ask), self._word(_PREFIX, [key] * self.ask)
        needle = writer.encode(joint(self.haystack) + self._needle(key, value))
        intro = writer.encode(self._word(_INTRO, []))
        needles = self.keys * self.values * len(needle)
        return writer.overhead(question, prefix) + len(intro) + needles + LEAST_HAYSTACK

    def draw(self, writer: Writer, name: str, seed: int, index: int) -> Context:
        """The example called `name`; `index` says where in `depths` it goes on, and which document is its turn."""
        draw = random.Random(name)
        keys = self._keys(draw)
        values = self._values(draw, self.keys * self.values)
        asked_keys = draw.sample(range(self.keys), self.ask)
        query = [keys[i] for i in asked_keys]
        asked = [i * self.values + j for i in asked_keys for j in range(self.values)]
        references = tuple(values[i] for i in asked)
        number = len(values)
        if self.depths:
            depths = [self.depths[(index * number + i) % len(self.depths)] for i in range(number)]
        elif self.haystack in LINES:
            depths = [draw.random() for _ in values]
        else:
            depths = draw.sample(DEPTHS, number)

        question, prefix = self._word(_QUESTION, query), self._word(_PREFIX, query)
        intro = writer.encode(self._word(_INTRO, []))
        length = self.context - writer.overhead(question, prefix) - len(intro)
        if self.haystack == "needles":
            hay, first = self._distractors(writer, draw, length, {*keys, *values}), 0
        else:
            hay = haystack(self.haystack, writer)
            first = hay.first(draw, seed, index)
        order = sorted(range(number), key=depths.__getitem__)
        needles = [self._needle(keys[i // self.values], values[i]) for i in order]
        ids, found = hide(writer, hay, first, length, needles, [depths[i] for i in order])

        example = Example(
            id=name,
            question=question,
            references=references,
            target=f" {listing(references)}.",
            answer_prefix=prefix,
            max_new_tokens=self.max_new_tokens,
            info={
                "haystack": self.haystack,
                "context": self.context,
                "depths": [found[order.index(i)] for i in asked],
            },
        )
        # Lines are the same everywhere: what differs between two examples is drawn for each.
        cluster = name if self.haystack in LINES else f"{self.haystack}-{hay.documents[first]}"
        return Context(id=name, cluster_id=cluster, ids=(*intro, *ids), examples=(example,))

    def _word(self, template: str, keys: list[str]) -> str:
        template = _SINGULAR[template] if self.ask * self.values == 1 else template
        return template.format(kind=self.value, query=listing(keys))

    def _needle(self, key: str, value: str) -> str:
        return _NEEDLE.format(kind=self.value, key=key, value=value)

    def _keys(self, draw: random.Random) -> list[str]:
        if self.uuid_keys:
            return [_uuid(draw) for _ in range(self.keys)]
        adjectives, nouns = wordlist("adjective"), wordlist("noun")
        return [_key(pair) for pair in draw.sample(range(len(adjectives) * len(nouns)), self.keys)]

    def _values(self, draw: random.Random, number: int) -> list[str]:
        if self.value == "uuid":
            return [_uuid(draw) for _ in range(number)]
        return [str(value) for value in draw.sample(range(10**6, 10**7), number)]

    def _distractors(self, writer: Writer, draw: random.Random, length: int, taken: set[str]) -> Haystack:
        """At least `length` tokens of needle lines that have nothing in common with the hidden ones."""
        lines: list[str] = []
        tokens: list[tuple[int, ...]] = []
        single = Hunt(0, uuid_keys=self.uuid_keys, value=self.value)
        while (missing := length - sum(map(len, tokens))) > 0:
            for _ in range(missing // 32 + 1):
                (key,), (value,) = single._keys(draw), single._values(draw, 1)
                if not {key, value} & taken:
                    lines.append(self._needle(key, value))
            tokens += writer.encode_all([joint("needles") + line for line in lines[len(tokens) :]])
        return Haystack.of(joint("needles"), lines, [0] * len(lines), tokens)


@dataclass(frozen=True, eq=False)
class Haystack:
    """Sentences and their tokens, one after another, each with `joint` before it."""

    joint: str
    sentences: tuple[str, ...]
    documents: tuple[int, ...]  # which document each sentence is of
    ids: np.ndarray
    starts: np.ndarray  # of the sentences in `ids`

    @staticmethod
    def of(joint: str, sentences: Iterable[str], documents: Iterable[int], tokens: list[tuple[int, ...]]) -> Haystack:
        ends = np.cumsum([len(ids) for ids in tokens])
        ids = np.fromiter(itertools.chain.from_iterable(tokens), np.int64, ends[-1])
        return Haystack(joint, tuple(sentences), tuple(documents), ids, np.concatenate([[0], ends[:-1]]))

    def first(self, draw: random.Random, seed: int, index: int) -> int:
        """A random sentence of the document whose turn it is: none comes twice before each has come once."""
        lap, place = divmod(index, self.documents[-1] + 1)
        document = _order(self.documents[-1] + 1, f"{seed}-{lap}")[place]
        return draw.randrange(bisect_left(self.documents, document), bisect_right(self.documents, document))

    def read(self, first: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """`length` tokens from a sentence on, from the beginning again after the last; and where sentences start."""
        start, total = self.starts[first], len(self.ids)
        ids = self.ids.take(np.arange(start, start + length), mode="wrap")
        once = (np.roll(self.starts, -first) - start) % total
        starts = (np.arange(-(-length // total))[:, None] * total + once).ravel()
        return ids, starts[starts < length]


@functools.lru_cache(maxsize=4)
def _order(number: int, seed: str) -> list[int]:
    return random.Random(seed).sample(range(number), number)


@functools.lru_cache(maxsize=4)
def haystack(source: str, writer: Writer) -> Haystack:
    """All of a source, or noise. Takes seconds for the essays: it is tokenised whole."""
    split = [[text] if source == "noise" else _SENTENCE_END.split(text) for text in documents(source)]
    sentences = [sentence for document in split for sentence in document]
    numbers = [number for number, document in enumerate(split) for _ in document]
    tokens = writer.encode_all([joint(source) + sentence for sentence in sentences])
    return Haystack.of(joint(source), sentences, numbers, tokens)


def documents(source: str) -> tuple[str, ...]:
    """The texts that a haystack is cut from; of needles, which are drawn, none."""
    if source in LINES:
        return (NOISE,) if source == "noise" else ()
    return tuple(" ".join(document.split()) for document in corpora.documents(source, "task"))


def joint(source: str) -> str:
    """What stands between two sentences of a haystack."""
    return "\n" if source in LINES else " "


def hide(
    writer: Writer, haystack: Haystack, first: int, length: int, needles: list[str], depths: list[float]
) -> tuple[list[int], list[float]]:
    """`length` tokens of haystack with needles before some of its sentences, and the depths where they really are.

    `depths` increase. The haystack's end is cut off wherever `length` is reached.
    """
    pieces = [np.array(ids) for ids in writer.encode_all([haystack.joint + needle for needle in needles])]
    ids, starts = haystack.read(first, length)
    sentences = int((starts < length - sum(map(len, pieces))).sum())
    before = [int(depth * sentences) for depth in depths]

    # What comes first follows the introduction's line end: it has no joint.
    if before[0] == 0:
        pieces[0] = np.array(writer.encode(needles[0]))
    else:
        opening = np.array(writer.encode(haystack.sentences[first]))
        joined = starts[1] if len(starts) > 1 else length
        ids = np.concatenate([opening, ids[joined:]])
        starts = np.maximum(starts + len(opening) - joined, 0)
    room = length - sum(map(len, pieces))
    if room < 1:
        raise UsageError(f"a prompt is {1 - room} tokens too short for its needles: raise task.context")

    places = [min(int(starts[i]), room) if i < sentences else room for i in before]
    parts = np.split(ids[:room], places)
    woven = [part for pair in itertools.zip_longest(parts, pieces, fillvalue=()) for part in pair]
    return np.concatenate(woven).astype(int).tolist(), [round(place / room, 4) for place in places]


@functools.cache
def wordlist(kind: str) -> list[str]:
    """The words that RULER takes, sorted, without repetitions: `adjective`, `noun` or `verb`."""
    text = (resources.files("wonderwords") / "assets" / f"{kind}list.txt").read_text(encoding="utf-8")
    return sorted(set(text.split("\n")) - {""})


def word_pairs(draw: random.Random, seen: set[str]) -> Iterator[str]:
    """Different `adjective-noun`, in random order, that are not in `seen`."""
    while True:
        pair = _key(draw.randrange(len(wordlist("adjective")) * len(wordlist("noun"))))
        if pair not in seen:
            seen.add(pair)
            yield pair


def _key(pair: int) -> str:
    nouns = wordlist("noun")
    return f"{wordlist('adjective')[pair // len(nouns)]}-{nouns[pair % len(nouns)]}"


def _uuid(draw: random.Random) -> str:
    return str(uuid.UUID(int=draw.getrandbits(128), version=4))


@functools.lru_cache(maxsize=2)
def _longest_key(writer: Writer) -> str:
    kinds = (wordlist("adjective"), wordlist("noun"))
    return "-".join(max(zip(map(len, writer.encode_all(words)), words, strict=True))[1] for words in kinds)


def listing(words: Sequence[str]) -> str:
    """`a`, `a, and b`, `a, b, and c`: with RULER's commas."""
    return ", ".join(words[:-1]) + ", and " + words[-1] if len(words) > 1 else "".join(words)
