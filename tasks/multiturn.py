import enum
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvbench.errors import UsageError
from kvbench.prompt import Writer
from kvbench.task import Context, Example, Task
from kvbench.toolbox import sessions


class Mode(enum.Enum):
    """How the questions about one context are asked."""

    shared = "each on a fork of the compressed context (SCBench's multi-request)"
    turns = "one after another in one conversation (its multi-turn)"


class History(enum.Enum):
    """The answers that later turns find in the conversation."""

    golden = "the reference answers, so that errors do not add up"
    own = "the model's"


class Metric(enum.Enum):
    """How the answer to a turn of `data` is scored."""

    auto = "as SCBench scores the set"
    contains = "an accepted answer occurs, whatever its case"
    share = "the share of the required answers that occur, whatever their case"
    exact = "it is an accepted answer, but for blanks around it"
    f1 = "the words' F1 with the accepted answer that is nearest"


@dataclass(frozen=True)
class _Rows:
    """How SCBench asks and scores a set of its row format."""

    metric: Metric
    max_new_tokens: int
    head: str = ""
    question: str = "{}"


_ROWS = {
    "kv": _Rows(Metric.contains, 150, sessions.KV_HEAD),
    "prefix_suffix": _Rows(Metric.contains, 150),
    "vt": _Rows(Metric.share, 30),
    "many_shot": _Rows(Metric.contains, 10),
    "qa": _Rows(
        Metric.contains,
        40,
        "Read the book and answer the question. Be very concise in your answer.\n\n",
        "Question: {}\nAnswer:",
    ),
}
_MIX = "kv+many_shot"


@dataclass(frozen=True)
class MultiTurn(Task):
    """Several questions about one compressed context (SCBench, arXiv:2412.10319), each alone or in one conversation.

    Generated sets: kv, prefix_suffix, vt (variable tracing), many_shot, mix (kv and many_shot in turns; `a+b` mixes any
    two); they take turns from context to context. Score: whether the answer contains the reference, in any case; of vt,
    the share of the variables that it contains. Each turn is an example, with its place in `info`.
    Differs from microsoft/MInference@fb56c91: contexts are generated, as large as `context` allows; the answer's
    beginning ("Label:") is in the model's turn, not in the user's; the asked places are in equal bands of depth; vt may
    take 48 tokens, not 30; mix has no summaries or code; rows are never cut, and the order of `data` is drawn.
    """

    score_name = "answers contained"

    sets: tuple[str, ...] = ("kv", "prefix_suffix", "vt", "many_shot", "mix")
    mode: Mode = Mode.shared
    history: History = History.golden  # in mode=turns
    turns: int = 5  # questions of one context; of `data`, at most so many
    context: int = 2048  # tokens of the whole prompt of a first turn, at most; of no effect on `data`
    # Sessions in SCBench's row format {id, context, multi_turns: [{input, answer}]}, in an order drawn from the seed: a
    # .jsonl or .parquet file, a folder, or hub:<id>@<revision>[:<config>]. `sets` says what they are: kv,
    # prefix_suffix, vt, many_shot or qa. Rows of one document can say so with an equal `cluster_id`.
    data: str = ""
    metric: Metric = Metric.auto  # of `data`

    def __post_init__(self) -> None:
        if self.turns < 1 or not self.sets:
            raise UsageError(f"task.turns={self.turns} task.sets={list(self.sets)}: ask at least one question")
        if self.history is History.own and self.mode is Mode.shared:
            raise UsageError("task.history=own is about conversations: add task.mode=turns")
        if self.metric is not Metric.auto and not self.data:
            raise UsageError(f"task.metric={self.metric.name} is for task.data only: generated sets have their own")
        if self.data and (len(self.sets) != 1 or self.sets[0] not in _ROWS):
            raise UsageError(f"task.data needs task.sets=[<what it is>], one of {', '.join(_ROWS)}")
        for name in self.sets:
            if unknown := set(_parts(name)) - set(sessions.KINDS) - (set(_ROWS) if self.data else set()):
                known = ", ".join([*sessions.KINDS, "mix", "or two joined by +"])
                raise UsageError(f"unknown set {unknown.pop()} in task.sets; known: {known}")
            if self.turns < len(_parts(name)):
                raise UsageError(f"task.turns={self.turns} are too few to mix {name}")

    def contexts(self, writer: Writer, seed: int) -> Iterator[Context]:
        """Endless; of `data`, as many as there are rows."""
        if self.data:
            return self._read(writer, seed)
        sets = len(self.sets)
        return (self._draw(writer, seed, self.sets[i % sets], i // sets) for i in itertools.count())

    def score(self, example: Example, answer: str) -> float:
        return _score(Metric[example.info["metric"]], answer, example.references)

    def data_hash(self) -> str:
        if not self.data:
            return ""
        from kvbench.hub import data_hash

        return data_hash([self.data], "test")

    def _draw(self, writer: Writer, seed: int, name: str, index: int) -> Context:
        draw = random.Random(f"{seed}-{name}-{index}")
        parts = _parts(name)
        # Turn i is of part i % 2 of a mix.
        drafts = [sessions.KINDS[part](draw, len(range(i, self.turns, len(parts)))) for i, part in enumerate(parts)]
        room = self.context - sessions.overhead(writer, [q for draft in drafts for q in draft.questions])
        ids: tuple[int, ...] = ()
        asked: list[Example] = []
        for i, (part, draft) in enumerate(zip(parts, drafts, strict=True)):
            if ids:
                draft = sessions.after_another(draft)
            more, depths = sessions.fill(writer, draft, (room - len(ids)) // (len(parts) - i))
            ids += more
            for number, question in enumerate(draft.questions):
                info: dict[str, Any] = {"metric": _ROWS[part].metric.name, "turn": i + number * len(parts)}
                if len(parts) > 1:
                    info["part"] = part
                if depths:
                    info["depth"] = depths[number]
                asked.append(
                    Example(
                        id="",
                        question=question.input,
                        references=question.references,
                        target=question.target,
                        answer_prefix=question.prefix,
                        max_new_tokens=question.max_new_tokens,
                        info=info,
                    )
                )
        asked.sort(key=lambda example: example.info["turn"])
        context = f"multiturn-{name}-{seed}-{index:05d}"
        return Context(context, context, ids, self._ask(context, asked, {"set": name, "context": self.context}))

    def _read(self, writer: Writer, seed: int) -> Iterator[Context]:
        from kvbench.hub import rows

        name = self.sets[0]
        kind = _ROWS[name]
        metric = kind.metric if self.metric is Metric.auto else self.metric
        found = list(rows(self.data, "test"))
        if not all({"context", "multi_turns"} <= row.keys() for row in found):
            raise UsageError(f"{self.data} is not in SCBench's row format: id, context, multi_turns")
        for place in random.Random(seed).sample(range(len(found)), len(found)):
            row = found[place]
            asked = []
            for turn, question in enumerate(row["multi_turns"][: self.turns]):
                references = _references(question)
                asked.append(
                    Example(
                        id="",
                        question=kind.question.format(question["input"]),
                        references=references,
                        target=", ".join(references) if metric is Metric.share else references[0],
                        max_new_tokens=kind.max_new_tokens,
                        info={"metric": metric.name, "turn": turn},
                    )
                )
            context, about = f"multiturn-{name}-{place:05d}", {"set": name, "row": row.get("id", place)}
            yield Context(
                id=context,
                cluster_id=str(row.get("cluster_id", context)),
                ids=writer.encode(kind.head + row["context"]),
                examples=self._ask(context, asked, about),
            )

    def _ask(self, context: str, asked: Sequence[Example], about: dict[str, Any]) -> tuple[Example, ...]:
        """The questions of a context, with names, and in a conversation each after the one before."""
        found: list[Example] = []
        for i, example in enumerate(asked):
            example = replace(example, id=f"{context}-{i}", info=about | example.info)
            if self.mode is Mode.shared or not found:
                example = replace(example, question=f"\n\n{example.question}")
            if self.mode is Mode.turns:
                golden = example.target if self.history is History.golden else None
                example = replace(example, follows=found[-1].id if found else None, history=golden)
            found.append(example)
        return tuple(found)


def _parts(name: str) -> list[str]:
    return (_MIX if name == "mix" else name).split("+")


def _references(question: dict[str, Any]) -> tuple[str, ...]:
    if not {"input", "answer"} <= question.keys() or question["answer"] in (None, "", []):
        raise UsageError("a turn of task.data has no `input` or `answer`")
    answer = question["answer"]
    return tuple(map(str, answer)) if isinstance(answer, list | tuple) else (str(answer),)


def _score(metric: Metric, answer: str, references: Sequence[str]) -> float:
    if metric is Metric.exact:
        return float(answer.strip() in [reference.strip() for reference in references])
    if metric is Metric.f1:
        from kvbench.toolbox.answers import qa_f1

        return max(qa_f1(answer, reference) for reference in references)
    found = [reference.lower() in answer.lower() for reference in references]
    return sum(found) / len(found) if metric is Metric.share else float(any(found))
