import functools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

from kvbench.errors import UsageError
from kvbench.prompt import Writer
from kvbench.task import Context, Example, Task
from kvbench.toolbox import sessions


@dataclass(frozen=True)
class KV(Task):
    """Key-value retrieval from a JSON object of random UUIDs (arXiv:2307.03172; SCBench's Retr.KV, arXiv:2412.10319).

    Score: whether the answer contains the value. Several questions ask for keys of as many equal bands of depth.
    Differs from nelson-liu/lost-in-the-middle@c7a5f7b and microsoft/MInference@fb56c91: the object has as many pairs as
    fit into `context` tokens; the answer begins with the key and a colon, without which small models name a key.
    """

    score_name = "value contained"

    context: int = 2048  # tokens of the whole prompt, at most: one more pair would not fit
    questions: int = 1  # of one context, each asked of the same compressed cache
    short: bool = False  # keys and values of 8 hexadecimal digits instead of UUIDs

    def __post_init__(self) -> None:
        if self.questions < 1:
            raise UsageError(f"task.questions={self.questions}: ask at least 1")

    def contexts(self, writer: Writer, seed: int) -> Iterator[Context]:
        """Endless."""
        return map(functools.partial(self._draw, writer, seed), count())

    def score(self, example: Example, answer: str) -> float:
        return float(example.references[0] in answer)

    def _draw(self, writer: Writer, seed: int, index: int) -> Context:
        draft = sessions.key_values(random.Random(f"{seed}-{index}"), self.questions, self.short)
        room = self.context - sessions.overhead(writer, draft.questions)
        ids, depths = sessions.fill(writer, draft, room)
        name = f"kv-{seed}-{index:05d}"
        examples = tuple(
            Example(
                id=f"{name}-{i}",
                question="\n\n" + question.input,
                references=question.references,
                target=question.target,
                answer_prefix=question.prefix,
                max_new_tokens=question.max_new_tokens,
                info={"depth": depth, "context": self.context},
            )
            for i, (question, depth) in enumerate(zip(draft.questions, depths, strict=True))
        )
        return Context(id=name, cluster_id=name, ids=ids, examples=examples)
