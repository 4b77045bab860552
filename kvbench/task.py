"""The interface of a task: data, prompt, score. One file in tasks/ per task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from kvbench.prompt import Writer


@dataclass(frozen=True)
class Example:
    """One question about a context."""

    id: str  # stable: the same for every run that uses the same data and seed
    question: str  # the rest of the user's message, after the context
    references: tuple[str, ...]  # accepted or required answers, as the task's score reads them
    target: str  # the reference text whose NLL is measured, as it would follow the answer prefix
    answer_prefix: str = ""  # put into the assistant's turn, before the answer
    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()  # texts that end an answer, beside the model's end of turn; `score` sees them
    info: dict[str, Any] = field(default_factory=dict)  # goes into the record as it is (depth, sub-task, ...)
    choices: tuple[str, ...] = ()  # continuations to weigh instead of a free answer: see `Task.score_choices`
    follows: str | None = None  # id of the example of this context whose turn comes before: a conversation goes on
    history: str | None = None  # what follow-up turns see as this turn's answer; None: the model's own


@dataclass(frozen=True)
class Context:
    """What is compressed, and the questions asked about it. `ids` are the context's own tokens, no template."""

    id: str
    cluster_id: str  # the source document, for honest intervals
    ids: tuple[int, ...]
    examples: tuple[Example, ...]
    chat: bool = True  # False: plain text that goes on; no template, and the last token is fed after compression


class Task(ABC):
    """A frozen dataclass; its fields are the options `task.<field>=` and part of a cell's identity."""

    #: What the score is, in the words of the task's authors.
    score_name: ClassVar[str] = "score"
    #: False: there is no free answer to score; only `answer_nll` and the distance to the full cache count.
    generates: ClassVar[bool] = True
    #: True: the data come from the hub unless an option names a local copy.
    hub: ClassVar[bool] = False

    @abstractmethod
    def contexts(self, writer: Writer, seed: int) -> Iterator[Context]:
        """The contexts, endless or not, lazily and in a fixed order: the i-th never depends on how many are drawn.

        `writer` turns text into the model's tokens and knows the template's overhead. Raises UsageError when the
        data is missing (say the command that gets it) or the options make no prompt.
        """

    @abstractmethod
    def score(self, example: Example, answer: str) -> float:
        """The quality of an answer, in [0, 1]."""

    def score_choices(self, example: Example, logprobs: Sequence[float], greedy: Sequence[bool]) -> float:
        """The quality, in [0, 1], of the summed log-probabilities (nats) of `example.choices`.

        `greedy`: whether each token of a choice was the likeliest one.
        """
        raise NotImplementedError

    def data_hash(self) -> str:
        """What identifies the data behind the examples; goes into the header."""
        return ""
