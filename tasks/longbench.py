import functools
import hashlib
import itertools
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from kvbench import hub
from kvbench.errors import UsageError
from kvbench.plugins import known
from kvbench.prompt import Writer
from kvbench.task import Context, Example, Task
from kvbench.toolbox import answers

_SETS: dict[str, dict[str, Any]] = json.loads(
    (resources.files("kvbench") / "toolbox" / "longbench.json").read_text(encoding="utf-8")
)["sets"]
_ENGLISH = tuple(name for name, facts in _SETS.items() if not facts["chinese"])
_GROUPS = {"all": tuple(_SETS), "en": _ENGLISH, "zh": tuple(name for name in _SETS if name not in _ENGLISH)}
_LEAST = 64  # tokens of context and question
_NO_LIMIT = 10**9  # tokenizers that know no longest text say 10**30


@dataclass(frozen=True)
class LongBench(Task):
    """LongBench v1: question answering, summaries, few-shot, synthetic and code, 21 sets (arXiv:2308.14508).

    Prompts, answer lengths and metrics are those of THUDM/LongBench@2e00731; score: the set's own metric, the best over
    the accepted answers. The compressed context is each prompt up to the end of {context}, few-shot examples and the
    cross-file code of repobench-p included; the question is all that follows, the words that repeat the instruction and
    "Answer:" too. trec, triviaqa, samsum, lsht, lcc and repobench-p are plain text without the chat template.
    Sets take turns, each in an order drawn by `seed`. Differs: a prompt that is too long loses its middle, but as
    tokens, not by decoding and encoding again, and the template counts; a question of more than half a prompt loses its
    beginning; samsum goes on after a line end, and its first line is scored, as there.
    """

    score_name = "LongBench"
    hub = True

    # Names of sets, or en (16 English and code sets), zh (5 Chinese ones), all.
    sets: tuple[str, ...] = ("en",)
    # The hub's parquet copy, or a folder with the authors' <set>.jsonl (data.zip of THUDM/LongBench), or such a copy.
    data: str = "hub:Xnhyacinth/LongBench@2e9ade51ebf45d98942056c0716234f9d5d257d5"
    context: int = 0  # tokens of the whole prompt at most; 0: what the model reads, less the answer

    def __post_init__(self) -> None:
        for name in self.sets:
            known("set", name, [*_SETS, *_GROUPS])
        if not self.sets:
            raise UsageError("task.sets=[] leaves no example")
        if self.context < 0:
            raise UsageError(f"task.context={self.context} is below 0")

    def contexts(self, writer: Writer, seed: int) -> Iterator[Context]:
        """Sets are read when their turn comes; that they are there, and Chinese words are known, is told at once."""
        names = self._names()
        if any(_SETS[name]["metric"].endswith("_zh") for name in names):
            answers.segmenter()
        for name in names:
            hub.files(self._source(name))
        for name in names:
            if self._limit(writer, name) < (least := _LEAST + writer.overhead("")):
                raise UsageError(f"task.context={self.context} is too short: use {least} or more")
        turns = itertools.zip_longest(*(self._set(writer, name, seed) for name in names))
        return (context for turn in turns for context in turn if context)

    def score(self, example: Example, answer: str) -> float:
        facts = _SETS[example.info["set"]]
        metric = getattr(answers, facts["metric"])
        if "classes" in example.info:
            metric = functools.partial(metric, classes=example.info["classes"])
        if facts["first_line"]:
            answer = answers.first_line(answer)
        return max(metric(answer, reference) for reference in example.references)

    def data_hash(self) -> str:
        return hub.data_hash(map(self._source, self._names()))

    def _names(self) -> tuple[str, ...]:
        """The chosen sets, groups spelt out, each once."""
        return tuple(dict.fromkeys(name for chosen in self.sets for name in _GROUPS.get(chosen, (chosen,))))

    def _source(self, name: str) -> str:
        if self.data.startswith("hub:"):
            return f"{self.data}:{name}"
        folder = Path(self.data).expanduser()
        places = (folder / f"{name}.jsonl", folder / f"{name}.parquet", folder / name)
        for place in places:
            if place.exists():
                return str(place)
        raise UsageError(f"task.data={self.data} has no {name}.jsonl: name LongBench's folder, or choose task.sets")

    def _limit(self, writer: Writer, name: str) -> int:
        """Tokens of the longest prompt."""
        longest = writer.tokenizer.model_max_length
        return self.context or (longest - _SETS[name]["max_new_tokens"] if longest < _NO_LIMIT else _NO_LIMIT)

    def _set(self, writer: Writer, name: str, seed: int) -> Iterator[Context]:
        found = [_published(row, name) for row in hub.rows(self._source(name))]
        random.Random(f"{seed}-{name}").shuffle(found)
        for row in found:
            yield self._context(writer, name, row)

    def _context(self, writer: Writer, name: str, row: dict[str, Any]) -> Context:
        facts = _SETS[name]
        head, _, after = facts["prompt"].partition("{context}")
        question = after.replace("{input}", row["input"])
        ids = writer.encode(head + row["context"])
        whole = len(ids) + len(writer.prompt((), question, chat=facts["chat"]))
        ids, question = _cut(writer, ids, question, facts["chat"], self._limit(writer, name))
        left = len(ids) + len(writer.prompt((), question, chat=facts["chat"]))

        info = {"set": name, "cut": whole - left} | ({"rebuilt": True} if row.get("rebuilt") else {})
        if facts["metric"] == "classification":
            info["classes"] = list(row["all_classes"])
        identity = f"{name}-{row['_id']}"
        example = Example(
            id=identity,
            question=question,
            references=tuple(row["answers"]),
            target=_joint(row) + row["answers"][0] if facts["first_line"] else row["answers"][0],
            max_new_tokens=facts["max_new_tokens"],
            info=info,
        )
        cluster = hashlib.sha256(row["context"].encode()).hexdigest()[:16]
        return Context(id=identity, cluster_id=cluster, ids=ids, examples=(example,), chat=facts["chat"])


def _cut(writer: Writer, ids: tuple[int, ...], question: str, chat: bool, limit: int) -> tuple[tuple[int, ...], str]:
    """A context and question of `limit` tokens as a prompt: the first half and the last half of the text are left."""
    asked, prompt = writer.encode(question), len(writer.prompt((), question, chat=chat))
    if len(ids) + prompt <= limit:
        return ids, question
    text = limit - (prompt - len(asked))
    half = text // 2
    if len(asked) > (most := max(half, text - len(ids))):
        question = writer.decode(asked[-most:])
    room = max(limit - len(writer.prompt((), question, chat=chat)), 0)
    front = min(room, half)
    return ids[:front] + ids[len(ids) - (room - front) :], question


def _joint(row: dict[str, Any]) -> str:
    """What stands between "Answer:" and an answer in the examples of a few-shot prompt: the target has it too."""
    cue = row["input"].rpartition("\n")[2]
    found = re.findall(rf"^{re.escape(cue)}(\s*)\S", row["context"], flags=re.MULTILINE)
    return found[-1] if found else ""


def _published(row: dict[str, Any], name: str) -> dict[str, Any]:
    """The row as the authors published it. The hub's parquet copy, made for kvpress, has the prompt's words in it.

    There `context` has the prompt up to some place between {context} and {input}; `question`, `answer_prefix` the rest.
    """
    if "input" in row:
        return row
    head, _, after = _SETS[name]["prompt"].partition("{context}")
    before, _, end = after.partition("{input}") if "{input}" in after else (after, "", "")
    rest, prefix = row["question"], row["answer_prefix"]
    if not prefix or not rest.rstrip().endswith(prefix):  # samsum's, followed by a blank, was left in the question
        rest += prefix
    for place in range(len(before), -1, -1):
        ours, theirs = before[:place], before[place:]
        fits = row["context"].startswith(head) and row["context"].endswith(ours)
        if fits and rest.startswith(theirs) and rest.endswith(end) and ("{input}" in after or rest == theirs):
            context = row["context"][len(head) : len(row["context"]) - len(ours)]
            return row | {"context": context, "input": rest[len(theirs) : len(rest) - len(end)]}
    raise UsageError(f"a row of {name} is neither LongBench's nor in kvpress's form: take LongBench's .jsonl files")
