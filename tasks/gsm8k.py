import enum
import functools
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources

from kvbench.errors import UsageError
from kvbench.prompt import Writer
from kvbench.task import Context, Example, Task


class Match(enum.Enum):
    """Where the answer's number is looked for: lm-eval's two filters of gsm8k_cot."""

    flexible = "the last number"
    strict = 'the one after "The answer is"'


_STRICT = re.compile(r"The answer is (-?[0-9.,]+)")
_FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
_CALCULATION = re.compile(r"<<.*?>>")


@dataclass(frozen=True)
class GSM8K(Task):
    """Grade-school maths (arXiv:2110.14168) with the 8 chain-of-thought examples of arXiv:2201.11903 as the context.

    Score: exact match of the number, without `,`, `$` and a final full stop. Generation ends at the model's end of
    turn; what a model writes from a next "Q:" on, where lm-eval would have stopped it, is not scored.
    Differs from lm-eval 0.4.13's gsm8k_cot: one line end before "A:", as in the paper; the examples are in one user's
    message; a strict answer may end with its number (there, without a full stop its last digit is lost); the order of
    the rows is drawn from the seed; 256 new tokens.
    """

    score_name = "exact_match"
    hub = True

    data: str = "hub:openai/gsm8k@740312add88f781978c0658806c59bc2815b9866:main"  # or a .jsonl or .parquet file
    match: Match = Match.flexible
    max_new_tokens: int = 256

    def contexts(self, writer: Writer, seed: int) -> Iterator[Context]:
        """As many as there are rows. Their context is the same, but each is a cluster of its own."""
        from kvbench.hub import rows

        found = list(rows(self.data, "test"))
        if not all("####" in str(row.get("answer")) and "question" in row for row in found):
            raise UsageError(f"{self.data} is not GSM8K: a row has `question`, and `answer` that ends in #### <number>")
        order = random.Random(seed).sample(range(len(found)), len(found))
        shots = writer.encode(_shots())
        for place in order:
            number = found[place].get("index", place)  # in the original file
            example = self._example(f"gsm8k-{number:05d}", found[place]["question"], found[place]["answer"])
            yield Context(id=example.id, cluster_id=example.id, ids=shots, examples=(example,))

    def score(self, example: Example, answer: str) -> float:
        answer = answer.partition("Q:")[0]
        found = _STRICT.findall(answer)[:1] if self.match is Match.strict else _FLEXIBLE.findall(answer)[-1:]
        return float(bool(found) and _plain(found[0]) == _plain(example.references[0]))

    def data_hash(self) -> str:
        from kvbench.hub import data_hash

        return data_hash([self.data], "test")

    def _example(self, name: str, question: str, answer: str) -> Example:
        solution, _, number = answer.rpartition("####")
        reasoning = " ".join(_CALCULATION.sub("", solution).split())
        return Example(
            id=name,
            question=f"\n\nQ: {question}\nA:",
            references=(number.strip(),),
            target=f"{reasoning} The answer is {number.strip()}.",
            max_new_tokens=self.max_new_tokens,
            stop=("Q:",),
        )


def _plain(number: str) -> str:
    return number.replace(",", "").replace("$", "").removesuffix(".")


@functools.cache
def _shots() -> str:
    text = (resources.files("kvbench.toolbox") / "gsm8k_cot.json").read_text(encoding="utf-8")
    return "\n\n".join(f"Q: {shot['question']}\nA: {shot['target']}" for shot in json.loads(text)["exemplars"])
