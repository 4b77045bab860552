import functools
import itertools
import random
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvbench import corpora
from kvbench.errors import UsageError
from kvbench.prompt import Writer
from kvbench.task import Context, Example, Task

# The blanks after the end of a sentence and before a capital, but not after initials, Mr., Mrs. and the like.
_SENTENCE_END = re.compile(
    r"(?:(?<=[.!?])|(?<=[.!?][\"')]))(?<!\b[A-Z]\.)(?<!\b[A-Z][a-z]\.)(?<!\bMrs\.)\s+(?=[\"'(]?[A-Z])"
)
_EDGE = 16  # tokens before the end of a piece of text that may differ from those of the whole text


@dataclass(frozen=True)
class LM(Task):
    """Language modelling: the NLL of a text's continuation after its beginning was compressed. Nothing is scored.

    An example is a stretch of one document, from its beginning or from a sentence on; plain text, no chat template.
    Documents that are too short are joined with their neighbours in the source. Every document, or group of them,
    gives one stretch before any gives a second one, and no two overlap until there is no other.
    """

    generates = False

    text: str = "essays"  # essays, squad, hotpotqa, or the path of a .txt file or folder (cut at 8,000 characters)
    context: int = 2048  # tokens of the compressed text, exactly
    continuation: int = 128  # tokens
    max_new_tokens: int = 32  # of the full cache's own continuation, along which `kl_full` is measured

    def __post_init__(self) -> None:
        if self.continuation < 1:
            raise UsageError(f"task.continuation={self.continuation}: a continuation has at least 1 token")

    def contexts(self, writer: Writer, seed: int) -> Iterator[Context]:
        """Endless, but for a text that has no other stretch left."""
        start = len(writer.prompt((0,), "", chat=False)) - 1  # the model's start token, if it has one
        if self.context < start + 2:
            raise UsageError(f"task.context={self.context} leaves no text: use {start + 2} or more")
        return self._draw(writer, seed, self.context - start)

    def score(self, example: Example, answer: str) -> float:
        raise NotImplementedError("a continuation has no score, only its NLL")

    def data_hash(self) -> str:
        return corpora.text_hash(corpora.documents(self.text, "task"))

    def _draw(self, writer: Writer, seed: int, length: int) -> Iterator[Context]:
        for number, stretch in enumerate(self._stretches(writer, seed, length)):
            name = f"lm-{seed}-{number:05d}"
            example = Example(
                id=name,
                question="",
                references=(),
                target=stretch.target,
                max_new_tokens=self.max_new_tokens,
                info={"text": self.text, "context": self.context, "documents": stretch.documents},
            )
            cluster = f"{self.text}-{stretch.document}"
            yield Context(id=name, cluster_id=cluster, ids=stretch.ids, examples=(example,), chat=False)

    def _stretches(self, writer: Writer, seed: int, length: int) -> Iterator["_Stretch"]:
        """Laps through the documents in random order; in a lap, no two stretches overlap."""
        texts = corpora.documents(self.text, "task")
        cutter = _Cutter(writer, length, self.continuation)
        given: set[tuple[int, int]] = set()
        for lap in itertools.count():
            before = len(given)
            for stretch in _lap(texts, cutter, f"{seed}-{lap}"):
                if stretch.start not in given:
                    given.add(stretch.start)
                    yield stretch
            if len(given) == before:
                break
        if not given:
            need = length + self.continuation
            raise UsageError(f"{self.text} has no stretch of {need} tokens: lower task.context or task.continuation")


@dataclass(frozen=True)
class _Stretch:
    document: int
    offset: int  # characters
    documents: int  # how many are joined
    ids: tuple[int, ...]
    target: str

    @property
    def start(self) -> tuple[int, int]:
        return self.document, self.offset


@dataclass(frozen=True)
class _Cutter:
    writer: Writer
    length: int
    continuation: int

    @property
    def need(self) -> int:
        return self.length + self.continuation

    def cut(
        self, text: str, document: int, documents: int = 1, draw: random.Random | None = None
    ) -> Iterator[_Stretch]:
        """Stretches of a text, one after another; the first at its beginning or, with `draw`, at a random sentence."""
        if len(text.encode()) < self.need:  # there are no more tokens than bytes
            return
        if (tokens := _size(self.writer, text)) < self.need:
            return
        starts = [0, *(match.end() for match in _SENTENCE_END.finditer(text))]
        at = 0
        if draw:  # anywhere, as long as there is place for as many stretches as there could be
            spare = tokens % self.need / tokens * len(text)
            at = draw.choice(starts[: max(1, bisect_left(starts, spare))])
        enough = 2 * self.need * len(text) // tokens  # characters
        for start in starts:
            if start < at:
                continue
            ids = self.writer.encode(text[start : start + enough])
            if len(ids) < self.need + _EDGE:
                ids = self.writer.encode(text[start:])
            ids = ids[: self.need]
            if len(ids) < self.need:
                return
            before, whole = (self.writer.decode(part) for part in (ids[: self.length], ids))
            target = whole[len(before) :]
            # A cut within a word or a character may not be met again when the target's text is encoded.
            if self.writer.encode(target) == ids[self.length :]:
                yield _Stretch(document, start, documents, ids[: self.length], target)
                at = start + len(whole)


@functools.lru_cache(maxsize=100_000)
def _size(writer: Writer, text: str) -> int:
    return len(writer.encode(text))


def _lap(texts: Sequence[str], cutter: _Cutter, seed: str) -> Iterator[_Stretch]:
    draw = random.Random(seed)
    order = draw.sample(range(len(texts)), len(texts))
    waiting = {i: cutter.cut(texts[i], i, draw=random.Random(f"{seed}-{i}")) for i in order}
    short = []
    first = True
    while waiting:
        for i in list(waiting):
            if stretch := next(waiting[i], None):
                yield stretch
            else:
                del waiting[i]
                if first:
                    short.append(i)
        if first:
            yield from _joined(texts, cutter, short)
        first = False


def _joined(texts: Sequence[str], cutter: _Cutter, order: Sequence[int]) -> Iterator[_Stretch]:
    """Stretches over several documents, none in two of them: from each on, in this order, while neighbours are left."""
    neighbours = sorted(order)
    place = {document: i for i, document in enumerate(neighbours)}
    taken: set[int] = set()
    for document in order:
        members: list[int] = []
        tokens = 0
        for member in itertools.takewhile(lambda other: other not in taken, neighbours[place[document] :]):
            members.append(member)
            tokens += _size(cutter.writer, texts[member])
            if tokens >= cutter.need:
                text = "\n\n".join(texts[i] for i in members)
                stretch = next(cutter.cut(text, document, len(members)), None)
                if stretch and stretch.offset < len(texts[document]):
                    taken.update(members)
                    yield stretch
                    break
