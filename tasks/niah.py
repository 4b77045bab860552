import functools
import itertools
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from itertools import count

import numpy as np

from kvbench import corpora
from kvbench.errors import UsageError
from kvbench.prompt import Writer
from kvbench.task import Context, Example, Task

_INTRO = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the numbers afterwards.\n"
)
_NEEDLE = "One of the special magic numbers for {key} is: {value}."
_QUESTION = "\nWhat are all the special magic numbers for {query} mentioned in the provided text?"
_PREFIX = " The special magic numbers for {query} mentioned in the provided text are"
_SINGULAR = {  # where one number is asked
    _INTRO: (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.\n"
    ),
    _QUESTION: "\nWhat is the special magic number for {query} mentioned in the provided text?",
    _PREFIX: " The special magic number for {query} mentioned in the provided text is",
}
_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_DEPTHS = [round(100 * i / 39) / 100 for i in range(40)]
_LEAST_HAYSTACK = 32  # tokens
# The blank after the end of a sentence and before a capital, but not after initials, Mr., Mrs. and the like.
_SENTENCE_END = re.compile(
    r"(?:(?<=[.!?])|(?<=[.!?][\"')]))(?<!\b[A-Z]\.)(?<!\b[A-Z][a-z]\.)(?<!\bMrs\.) (?=[\"'(\[_]?[A-Z0-9])"
)


@dataclass(frozen=True)
class NIAH(Task):
    """Needles in a haystack: RULER's niah with key words and number values (arXiv:2404.06654), in its wording.

    Score: the share of the asked numbers that the answer contains (RULER's string_match_all). RULER's niah_single_1 is
    `haystack=noise`, _single_2 the default, _multikey_1 `needles=4 ask=1`, _multiquery `needles=4`.
    Differs from NVIDIA/RULER@c3f5e3b: `context` counts the prompt alone and is met exactly; each example's haystack
    starts at another random sentence; a quarter of the texts is left to calibration; no two needles share a key or a
    number, and their order is drawn anew for each example; sentences are found by a pattern, not by punkt.
    """

    score_name = "string_match_all"

    context: int = 2048  # tokens of the whole prompt: template, haystack with needles, question, answer prefix
    needles: int = 1
    ask: int = 0  # ask for this many of the needles; 0: for all
    haystack: str = "essays"  # essays, squad, hotpotqa, a .txt file or folder, or noise (RULER's five short sentences)
    # Where the needles are, in [0, 1], taken in turn, on from one example to the next. Empty: drawn as RULER does, from
    # 40 evenly spaced depths without repetition; in noise, from all.
    depths: list[float] = field(default_factory=list)
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        if self.needles < 1 or not 0 <= self.ask <= self.needles:
            raise UsageError(f"task.needles={self.needles} task.ask={self.ask}: hide at least 1, ask for at most all")
        if not all(0 <= depth <= 1 for depth in self.depths):
            raise UsageError(f"task.depths={self.depths}: a depth is from 0 (the beginning) to 1 (the end)")
        if not self.depths and self.haystack != "noise" and self.needles > len(_DEPTHS):
            raise UsageError(f"task.needles={self.needles}: more than {len(_DEPTHS)} need task.depths")

    def contexts(self, writer: Writer, seed: int) -> Iterator[Context]:
        """Endless. The first one takes seconds longer: the whole haystack is tokenised."""
        if self.context < (least := self._least(writer)):
            raise UsageError(f"task.context={self.context} is too short for this prompt: use {least} or more")
        return map(functools.partial(self._draw, writer, seed), count())

    def score(self, example: Example, answer: str) -> float:
        return sum(value.lower() in answer.lower() for value in example.references) / len(example.references)

    def data_hash(self) -> str:
        return corpora.text_hash(_documents(self.haystack))

    @property
    def _asked(self) -> int:
        return self.ask or self.needles

    def _word(self, template: str, keys: list[str]) -> str:
        return (_SINGULAR[template] if self._asked == 1 else template).format(query=_listing(keys))

    def _least(self, writer: Writer) -> int:
        """Tokens of a prompt with hardly any haystack, whatever the keys."""
        key = _longest_key(writer)
        question, prefix = self._word(_QUESTION, [key] * self._asked), self._word(_PREFIX, [key] * self._asked)
        needle = writer.encode(_joint(self.haystack) + _NEEDLE.format(key=key, value="7777777"))
        intro = writer.encode(self._word(_INTRO, []))
        return writer.overhead(question, prefix) + len(intro) + self.needles * len(needle) + _LEAST_HAYSTACK

    def _draw(self, writer: Writer, seed: int, index: int) -> Context:
        draw = random.Random(f"{seed}-{index}")  # the same example however many are drawn
        adjectives, nouns = _words()
        pairs = draw.sample(range(len(adjectives) * len(nouns)), self.needles)
        keys = [f"{adjectives[pair // len(nouns)]}-{nouns[pair % len(nouns)]}" for pair in pairs]
        values = [str(value) for value in draw.sample(range(10**6, 10**7), self.needles)]
        asked = draw.sample(range(self.needles), self._asked)
        query = [keys[i] for i in asked]
        references = tuple(values[i] for i in asked)
        if self.depths:
            depths = [self.depths[(index * self.needles + i) % len(self.depths)] for i in range(self.needles)]
        elif self.haystack == "noise":
            depths = [draw.random() for _ in keys]
        else:
            depths = draw.sample(_DEPTHS, self.needles)

        haystack = _haystack(self.haystack, writer)
        first = draw.randrange(len(haystack.sentences))
        question, prefix = self._word(_QUESTION, query), self._word(_PREFIX, query)
        intro = writer.encode(self._word(_INTRO, []))
        order = sorted(range(self.needles), key=depths.__getitem__)
        needles = [_NEEDLE.format(key=keys[i], value=values[i]) for i in order]
        length = self.context - writer.overhead(question, prefix) - len(intro)
        ids, found = _hide(writer, haystack, first, length, needles, [depths[i] for i in order])

        name = f"niah-{seed}-{index:05d}"
        example = Example(
            id=name,
            question=question,
            references=references,
            target=f" {_listing(references)}.",
            answer_prefix=prefix,
            max_new_tokens=self.max_new_tokens,
            info={
                "haystack": self.haystack,
                "context": self.context,
                "depths": [found[order.index(i)] for i in asked],
            },
        )
        # Noise is the same everywhere: what differs between two examples is drawn for each.
        cluster = name if self.haystack == "noise" else f"{self.haystack}-{haystack.documents[first]}"
        return Context(id=name, cluster_id=cluster, ids=(*intro, *ids), examples=(example,))


@dataclass(frozen=True, eq=False)
class _Haystack:
    """Sentences and their tokens, one after another, each with `joint` before it."""

    joint: str
    sentences: tuple[str, ...]
    documents: tuple[int, ...]  # which document each sentence is of
    ids: np.ndarray
    starts: np.ndarray  # of the sentences in `ids`

    def read(self, first: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """`length` tokens from a sentence on, from the beginning again after the last; and where sentences start."""
        start, total = self.starts[first], len(self.ids)
        ids = self.ids.take(np.arange(start, start + length), mode="wrap")
        once = (np.roll(self.starts, -first) - start) % total
        starts = (np.arange(-(-length // total))[:, None] * total + once).ravel()
        return ids, starts[starts < length]


@functools.lru_cache(maxsize=4)
def _haystack(source: str, writer: Writer) -> _Haystack:
    split = [[text] if source == "noise" else _SENTENCE_END.split(text) for text in _documents(source)]
    sentences = tuple(sentence for document in split for sentence in document)
    tokens = writer.encode_all([_joint(source) + sentence for sentence in sentences])
    ends = np.cumsum([len(ids) for ids in tokens])
    return _Haystack(
        joint=_joint(source),
        sentences=sentences,
        documents=tuple(number for number, document in enumerate(split) for _ in document),
        ids=np.fromiter(itertools.chain.from_iterable(tokens), np.int64, ends[-1]),
        starts=np.concatenate([[0], ends[:-1]]),
    )


def _documents(source: str) -> tuple[str, ...]:
    if source == "noise":
        return (_NOISE,)
    return tuple(" ".join(document.split()) for document in corpora.documents(source, "task"))


def _joint(source: str) -> str:
    return "\n" if source == "noise" else " "


def _hide(
    writer: Writer, haystack: _Haystack, first: int, length: int, needles: list[str], depths: list[float]
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
def _words() -> tuple[list[str], list[str]]:
    """Adjectives and nouns of the keys: the lists that RULER takes, without repetitions."""
    lists = (resources.files("wonderwords") / "assets" / f"{kind}list.txt" for kind in ("adjective", "noun"))
    adjectives, nouns = (sorted(set(words.read_text(encoding="utf-8").split("\n")) - {""}) for words in lists)
    return adjectives, nouns


@functools.lru_cache(maxsize=2)
def _longest_key(writer: Writer) -> str:
    return "-".join(max(zip(map(len, writer.encode_all(words)), words, strict=True))[1] for words in _words())


def _listing(words: Sequence[str]) -> str:
    """`a`, `a, and b`, `a, b, and c`: with RULER's commas."""
    return ", ".join(words[:-1]) + ", and " + words[-1] if len(words) > 1 else "".join(words)
