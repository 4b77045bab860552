import difflib
import hashlib
import importlib.util
import json
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvbench.errors import UsageError
from kvbench.prompt import Writer
from kvbench.task import Context, Example, Task

_WAY_OUT = "`python -m kvbench.lm_eval_model` runs it in lm-eval's own loop"
_SOURCES = ("context", "passage", "article", "story")  # fields that hold a document with several questions


@dataclass(frozen=True)
class LMEval(Task):
    """Any task of EleutherAI's lm-eval (0.4.13, `pip install kvbench[lm-eval]`) with its prompts, shots and scores.

    lm-eval has one string before the answer, and no context and question. Its last line is taken for the question,
    fed after compression under `protocol=blind`; or all from the line on in which the document's field `question` is
    last found. A string of one line is all context. `aware` compresses all of it. What is fed last is the task's
    answer prefix (`gen_prefix`), or the last token. Note: a document that ends with "Answer:" has its query compressed.
    Score: the metric that `info.metric` names, as the task computes it for one document.
    Differs from lm-eval: a text's parts are tokenised apart, where a cut allows it so that the tokens are the same;
    `chat=true` puts description, shots and document into one user's message. Refused: perplexity of a whole text,
    choices that differ in their contexts, sampled answers, images and audio, code that would be run.
    """

    score_name = "lm-eval metric"
    hub = True

    name: str = ""  # a task, not a group of them: `python -m lm_eval ls subtasks` lists 14,000
    include: str = ""  # a folder with task files (.yaml) of your own, looked through first
    shots: int | None = None  # examples shown before; null: as many as the task says
    chat: bool = False  # wrap in the model's chat template
    question: str = ""  # the document's field that holds the question; empty: the last line is the question
    metric: str = ""  # `acc_norm`, or with one of the task's filters `exact_match,flexible-extract`; empty: the first
    context: int = 0  # a longer prompt loses its beginning, as in lm-eval; 0: nothing is cut
    metadata: dict[str, Any] = field(default_factory=dict)  # for tasks made on the spot: max_seq_lengths=[2048]

    def __post_init__(self) -> None:
        if self.shots is not None and self.shots < 0:
            raise UsageError(f"task.shots={self.shots} is below 0")

    def contexts(self, writer: Writer, seed: int) -> Iterator[Context]:
        """A context for each document, in the task's order. `seed` draws the shots; 0 draws those of lm-eval."""
        if not self.name:
            raise UsageError("say which task of lm-eval: task.name=arc_easy")
        task = self._load(writer.tokenizer.name_or_path, seed)
        return (self._draw(writer, task, seed, i) for i in range(len(task.task_docs)))

    def score(self, example: Example, answer: str) -> float:
        task, document = self._document(example)
        for stop in filter(None, _options(task)["until"]):
            answer = answer.partition(stop)[0]
        return self._metrics(task, document, [answer])[example.info["metric"]]

    def score_choices(self, example: Example, logprobs: Sequence[float], greedy: Sequence[bool]) -> float:
        task, document = self._document(example)
        return self._metrics(task, document, list(zip(logprobs, greedy, strict=True)))[example.info["metric"]]

    def data_hash(self) -> str:
        import lm_eval

        task = self._loaded()
        made = hashlib.sha256(lm_eval.__version__.encode())
        for text in (task.config.doc_to_text, task.config.doc_to_target, task.config.doc_to_choice):
            made.update(str(text if isinstance(text, str | list) else "").encode())
        for document in task.task_docs:
            made.update(json.dumps(document, sort_keys=True, default=str).encode())
        return made.hexdigest()

    def _loaded(self) -> Any:
        return vars(self)["loaded"]

    def _document(self, example: Example) -> tuple[Any, Any]:
        task = self._loaded()
        return task, task.task_docs[example.info["document"]]

    def _load(self, tokenizer: str, seed: int) -> Any:
        """lm-eval's object. Raises UsageError for what it does not have and what can't run here."""
        if not importlib.util.find_spec("lm_eval"):
            raise UsageError("task=lm_eval needs lm-eval: pip install 'kvbench[lm-eval]'")
        import numpy as np

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        before = random.getstate(), np.random.get_state()
        random.seed(seed)  # as lm-eval does: some tasks are made with the interpreter's own generator
        np.random.seed(1234 + seed)
        try:
            task = self._build({"tokenizer": tokenizer} | self.metadata)
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
        self._check(task)
        if self.shots is not None:
            task.set_config("num_fewshot", self.shots)
        task.set_fewshot_seed(1234 + seed)
        vars(self)["loaded"] = task  # for the scores; no option, so no field
        return task

    def _build(self, metadata: dict[str, Any]) -> Any:
        from lm_eval.tasks import TaskManager

        folder = Path(self.include).expanduser()
        if self.include and not folder.is_dir():
            raise UsageError(f"task.include={self.include} is no folder")
        if self.include and next(folder.glob("**/pyvenv.cfg"), None):
            raise UsageError(f"task.include={self.include} holds a virtual environment: name a folder of task files")
        # Looking through lm-eval's own 14,000 files takes seconds.
        manager = TaskManager(include_path=folder if self.include else None, include_defaults=False, metadata=metadata)
        if self.name not in manager.all_tasks:
            manager = TaskManager(include_path=folder if self.include else None, metadata=metadata)
        if self.name not in manager.all_subtasks:
            raise UsageError(_unknown(manager, self.name))
        try:
            return manager.load(self.name)["tasks"][self.name]
        except (OSError, ImportError, RuntimeError, ValueError, AssertionError) as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise UsageError(f"lm-eval can't make {self.name}: {reason}") from error

    def _check(self, task: Any) -> None:
        from lm_eval.api.task import ConfigurableTask

        refused = {
            "is defined by a class of its own": not isinstance(task, ConfigurableTask),
            "has images or audio": getattr(task, "MULTIMODAL", False),
            "runs code that a model wrote": getattr(task, "UNSAFE_CODE", False),
        }
        for reason, found in refused.items():
            if found:
                raise UsageError(f"{self.name} {reason}, which task=lm_eval can't run")
        if task.OUTPUT_TYPE == "loglikelihood_rolling":
            raise UsageError(
                f"{self.name} is the perplexity of a whole text, without a context to compress: use task=lm"
            )
        if task.OUTPUT_TYPE == "generate_until" and _options(task)["do_sample"]:
            raise UsageError(f"{self.name} samples its answers, and kvbench decodes greedily")
        if self.shots and task.config.num_fewshot == 0:
            raise UsageError(f"{self.name} is without shots by its own definition: leave task.shots out")

    def _draw(self, writer: Writer, task: Any, seed: int, i: int) -> Context:
        document = task.task_docs[i]
        prefix = task.doc_to_prefix(document) or ""
        prompt = task.fewshot_context(document, num_fewshot=task.config.num_fewshot or 0, gen_prefix=prefix)
        requests = task.construct_requests(
            document, prompt, apply_chat_template=self.chat, metadata=(self.name, i, task.config.repeats)
        )
        requests = [request.args for request in (requests if isinstance(requests, list) else [requests])]
        if any(request[0] != requests[0][0] for request in requests):
            raise UsageError(f"{self.name} compares contexts, not continuations of one; {_WAY_OUT}")
        choices = () if task.OUTPUT_TYPE == "generate_until" else tuple(request[1] for request in requests)
        text, prefix, blanks = self._ending(requests[0][0], prefix, bool(choices))
        choices = tuple(blanks + choice for choice in choices)
        context, question = self._cut(writer, document, text)
        ids = writer.encode(context)
        if self.context:
            room = self.context - len(writer.prompt((), question, prefix, self.chat))
            ids = ids[max(0, len(ids) - room) :] if room > 0 else ()
        name = f"{self.name}-{seed}-{i:06d}"
        if len(ids) < 2:
            raise UsageError(f"{name} has no context that could be compressed; {_WAY_OUT}")
        references, target = self._answers(task, document, prefix, choices)
        longest = max((len(writer.encode(choice)) for choice in choices), default=0)
        example = Example(
            id=name,
            question=question,
            references=references,
            target=target,
            answer_prefix=prefix,
            max_new_tokens=longest or _options(task)["max_gen_toks"],
            stop=() if choices else tuple(filter(None, _options(task)["until"])),
            info={"document": i, "metric": self._metric(task, document, len(choices))},
            choices=choices,
        )
        source = next((document[key] for key in _SOURCES if isinstance(document.get(key), str)), None)
        cluster = hashlib.sha256(source.encode()).hexdigest()[:12] if source else name
        return Context(name, cluster, ids, (example,), self.chat)

    def _ending(self, prompt: str, prefix: str, choices: bool) -> tuple[str, str, str]:
        """The text before the answer prefix, the prefix, and the blanks that lm-eval moves into the choices."""
        end = prompt.rstrip() if choices and not self.chat else prompt
        blanks = prompt[len(end) :]
        prefix = prefix.rstrip() if blanks else prefix
        text = end.removesuffix(prefix)
        if not prefix or self.chat:
            return text, prefix, blanks
        start = text.rstrip(" ")
        return start, text[len(start) :] + prefix, blanks

    def _answers(self, task: Any, document: Any, prefix: str, choices: tuple[str, ...]) -> tuple[tuple[str, ...], str]:
        """The right answers, and the first of them as it would go on after the prompt."""
        right = task.doc_to_target(document)
        names = task.doc_to_choice(document) if task.config.doc_to_choice else []
        right = [
            names[x] if names and isinstance(x, int) else str(x)
            for x in (right if isinstance(right, list) else [right])
        ]
        first = right[0] if right else ""
        if choices:
            return tuple(right), choices[names.index(first) if first in names else 0]
        delimiter = "" if self.chat or prefix.endswith(" ") else task.config.target_delimiter
        delimiter = " " if prefix and not prefix.endswith(" ") else delimiter
        return tuple(right), delimiter + first or "\n"  # a reference has at least one token

    def _cut(self, writer: Writer, document: Any, text: str) -> tuple[str, str]:
        """The context, and the question: from the line on in which the document's question is, or the last line."""
        asked = text.rstrip().rpartition("\n")[2]
        if self.question:
            if self.question not in document:
                raise UsageError(f"task.question={self.question}: the document has {', '.join(document)}")
            asked = str(document[self.question]).strip()
        found = text.rfind(asked)
        if found < 0:
            raise UsageError(f"task.question={self.question}: the prompt does not contain this field")
        after = text.rfind("\n", 0, found) + 1
        if not after:
            return text, ""
        before = len(text[:after].rstrip("\n"))
        # Line ends are merged with what is before them by some tokenizers, by others with one another.
        whole = writer.encode(text)
        cuts = [
            cut for cut in (after, before) if cut and writer.encode(text[:cut]) + writer.encode(text[cut:]) == whole
        ]
        cut = next(iter(cuts), after)
        return text[:cut], text[cut:]

    def _metric(self, task: Any, document: Any, choices: int) -> str:
        """The metric of a document, found by scoring an empty answer: some tasks have another for each length."""
        values = self._metrics(task, document, [(-1.0 - i, False) for i in range(choices)] or [""])
        names = [key for key, value in values.items() if not self.metric or self.metric in (key, key.partition(",")[0])]
        if not names:
            usable = ", ".join(values) or "none"
            raise UsageError(
                f"{self.name} has no metric '{self.metric}' that scores one document in [0, 1]; it has {usable}"
            )
        return names[0]

    def _metrics(self, task: Any, document: Any, answers: list[Any]) -> dict[str, float]:
        """`<metric>,<filter>` -> value, of all metrics that are a score: in [0, 1], and the higher the better."""
        from lm_eval.api.instance import Instance

        better, found = task.higher_is_better(), {}
        for ensemble in task._filters:
            instances = [
                Instance("", document, (), i, resps=[given] * task.config.repeats) for i, given in enumerate(answers)
            ]
            ensemble.apply(instances)
            filtered = [instance.filtered_resps[ensemble.name] for instance in instances]
            for metric, value in task.process_results(document, filtered).items():
                if _is_score(value) and better.get(metric, True):
                    found[f"{metric},{ensemble.name}"] = float(value)
        return found


def _is_score(value: Any) -> bool:
    """RULER's tasks give -1 to the lengths that a document does not have."""
    try:
        return not isinstance(value, str | tuple | list | dict) and 0 <= float(value) <= 1
    except (TypeError, ValueError):
        return False


def _options(task: Any) -> dict[str, Any]:
    """How the task wants its answers: `until`, `max_gen_toks`, `do_sample`."""
    from lm_eval.models.utils import normalize_gen_kwargs

    return dict(normalize_gen_kwargs(task.config.generation_kwargs or {}))


def _unknown(manager: Any, name: str) -> str:
    if name in manager.all_tasks:
        return f"{name} is a group of lm-eval's tasks: name one of them, or sweep with -m task.name=<one>,<other>"
    close = difflib.get_close_matches(name, manager.all_subtasks, 5)
    return f"lm-eval has no task '{name}'" + (f"; close: {', '.join(close)}" if close else "")
