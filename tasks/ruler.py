import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from kvbench import corpora, plugins
from kvbench.errors import UsageError
from kvbench.prompt import Writer
from kvbench.task import Context, Example, Task
from kvbench.toolbox import ruler

_COLUMNS = ("context", "question", "answer_prefix", "answer", "max_new_tokens", "task")


@dataclass(frozen=True)
class RULER(Task):
    """RULER: 13 sets on retrieval, tracing, aggregation and question answering (arXiv:2404.06654), in its wording.

    Score: the share of the references that the answer contains (string_match_all), for qa whether it contains one
    (string_match_part). The examples are of each set in turn. RULER's score is the mean over the sets, each of 500.
    `context` counts the prompt alone, RULER's lengths also the tokens to generate: its 4096 is, for its niah,
    `context=3968` (4096 - 128; vt 30, cwe 120, fwe 50, qa 32). niah, vt and fwe meet it exactly; cwe and qa take as
    many words and documents as fit.
    Differs from NVIDIA/RULER@c3f5e3b: nothing is shuffled with the same generator in every sample, so that what is
    asked for is never at one fixed place; a quarter of the texts is left to calibration (of HotpotQA's questions those
    remain whose supporting paragraphs do; its other paragraphs that do not are left out), and questions are drawn in
    random order; a haystack starts at a random sentence and ends where the length is reached; the line ends before a
    question are part of it, so under `blind` they are not compressed. Short prompts: vt's solved example has at most a
    quarter of them; a question whose own paragraphs do not fit is passed over. Long ones: cwe goes on with
    adjective-noun pairs, qa_1 with HotpotQA's paragraphs. fwe fills up with its noise word, `...`.
    """

    score_name = "string_match"

    sets: tuple[str, ...] = ruler.SETS
    context: int = 4096  # tokens of the whole prompt, at most; of no effect on `data`
    # Instead of generated examples, rows of kvpress's published form (context, question, answer_prefix, answer,
    # max_new_tokens, task), in file order whatever the seed: of a .parquet or .jsonl file, of a folder, or of
    # hub:<id>@<revision>[:<config>]
    data: str = ""
    max_new_tokens: int = 0  # 0: what the authors allow each set (niah 128, vt 30, cwe 120, fwe 50, qa 32)

    def __post_init__(self) -> None:
        for name in self.sets:
            plugins.known("set", name, ruler.SETS)
        if not self.sets or len(set(self.sets)) < len(self.sets):
            raise UsageError(f"task.sets=[{','.join(self.sets)}]: name each set once, and at least one")
        if self.max_new_tokens < 0:
            raise UsageError(f"task.max_new_tokens={self.max_new_tokens}: give a number from 1, or 0 for the authors'")

    def contexts(self, writer: Writer, seed: int) -> Iterator[Context]:
        """Endless, but for `data`. The first ones take seconds longer: the essays are tokenised whole."""
        if self.data:
            rows = self._rows()
            streams = [map(functools.partial(_read, writer, name), count(), rows[name]) for name in rows]
        else:
            streams = [ruler.stream(name, self.context, writer, seed) for name in self.sets]
            # The first of each is drawn at once: too short a prompt is refused before anything is run.
            streams = [itertools.chain([next(stream)], stream) for stream in streams]
        turns = itertools.chain.from_iterable(itertools.zip_longest(*streams))
        return (self._limited(context) for context in turns if context)

    def score(self, example: Example, answer: str) -> float:
        return ruler.score(example.info["set"], example.references, answer)

    def data_hash(self) -> str:
        if self.data:
            from kvbench import hub

            return hub.data_hash([self._source])
        return corpora.text_hash(corpora.text_hash(ruler.data(name)) for name in self.sets)

    def _limited(self, context: Context) -> Context:
        """With answers of at most `max_new_tokens`, if that is given."""
        examples = (replace(e, max_new_tokens=self.max_new_tokens or e.max_new_tokens) for e in context.examples)
        return replace(context, examples=tuple(examples))

    @property
    def _source(self) -> str:
        """`data`; the `hub:` before an id may be left out."""
        hub_id = "@" in self.data and not self.data.startswith("hub:") and not Path(self.data).expanduser().exists()
        return f"hub:{self.data}" if hub_id else self.data

    def _rows(self) -> dict[str, list[dict[str, Any]]]:
        """The rows of each set. All sets are asked for unless some are named; of those, none may be missing."""
        from kvbench import hub

        found: dict[str, list[dict[str, Any]]] = {name: [] for name in self.sets}
        for row in hub.rows(self._source):
            if missing := [column for column in _COLUMNS if column not in row]:
                raise UsageError(f"task.data={self.data}: a row has no {', '.join(missing)}: see kvpress's RULER sets")
            if row["task"] in found:
                found[row["task"]].append(row)
        lacking = [name for name in found if not found[name]]
        if lacking and (self.sets != ruler.SETS or len(lacking) == len(found)):
            raise UsageError(f"task.data={self.data} has no rows of {', '.join(lacking)}: choose other task.sets")
        return {name: rows for name, rows in found.items() if rows}


def _read(writer: Writer, name: str, index: int, row: dict[str, Any]) -> Context:
    """A row as it is: its parts are those that kvpress compresses, and feeds."""
    ids = writer.encode(row["context"])
    answers = (row["answer"],) if isinstance(row["answer"], str) else tuple(map(str, row["answer"]))
    length = len(ids) + writer.overhead(row["question"], row["answer_prefix"])
    example = Example(
        id=f"{name}-{index:05d}",
        question=row["question"],
        references=answers,
        target=ruler.target(name, answers),
        answer_prefix=row["answer_prefix"],
        max_new_tokens=int(row["max_new_tokens"]),
        info={"set": name, "context": length},
    )
    return Context(id=example.id, cluster_id=example.id, ids=ids, examples=(example,))
