"""The loop: context -> one prefill -> every cell: plan, pack -> every question: fork, answer, score -> one record.

Cells of one call share the model, the task, the protocol and the seed, and so every prefill; a record is the same
whether its cell is alone or in company.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kvbench import tracker
from kvbench.artefact import Artefact, load_or_fit
from kvbench.budget import Allowance
from kvbench.cache.fork import Fork
from kvbench.cache.packed import CompressedCache
from kvbench.cell import Cell
from kvbench.decode import feed, greedy
from kvbench.errors import UsageError
from kvbench.measure.clock import Stopwatch
from kvbench.measure.progress import progress
from kvbench.method import Axis, Method
from kvbench.model import Model, load_model
from kvbench.plan import Infeasible, keep_all, plan_rows
from kvbench.prefill import Reader, Seen, read_exactly
from kvbench.report.summary import print_summary
from kvbench.store import CellStore, is_done
from kvbench.task import Context, Example


def run_cells(
    cells: Sequence[Cell], results: Path, limit: int | None, redo: bool, tracker_mode: str, tracker_project: str
) -> None:
    """Brings the cells' records up to `limit` examples (None: all the task has) and prints a summary.

    Raises UsageError for what can't be run; nothing is written then.
    """
    missing = [cell for cell in cells if redo or not is_done(cell, results, limit)]
    if missing:
        model = load_model(missing[0].model)
        with torch.inference_mode(), ExitStack() as stack:
            runs = [_Run(cell, model, results, limit, redo, stack) for cell in missing]
            exhausted = _evaluate(runs, model, limit)
            for run in runs:
                run.open().finish(exhausted)
        for cell in missing:
            tracker_mode = tracker.mirror(cell.folder(results), results, tracker_mode, tracker_project)
    print_summary([cell.folder(results) for cell in cells], new=len(missing))


@dataclass
class _Run:
    """A cell being evaluated. Its store is opened with its first record, so that a refused cell leaves no trace."""

    cell: Cell
    model: Model
    results: Path
    limit: int | None
    redo: bool
    stack: ExitStack
    store: CellStore | None = None
    artefact: Artefact | None = field(init=False)

    def __post_init__(self) -> None:
        calibration = self.method.calibration
        self.artefact = load_or_fit(calibration, self.model) if calibration else None
        self.full_bytes = self.model.network.row_bytes()

    @property
    def method(self) -> Method:
        return self.cell.method

    def open(self) -> CellStore:
        if self.store is None:
            about = {
                "model": {k: v for k, v in self.model.facts.items() if k not in ("device", "torch_threads")},
                "data": self.cell.task.data_hash(),
                "artefact": self.artefact.digest if self.artefact else None,
                "storage": "decoded",  # quality runs keep decoded rows between steps; bytes are those of the packed store
                "hardware": {k: self.model.facts[k] for k in ("device", "torch_threads")},
            }
            opened = CellStore.open(self.cell, self.results, about, self.limit, self.redo)
            self.store = self.stack.enter_context(opened)
        return self.store

    def compress(self, seen: Seen) -> tuple[CompressedCache, dict[str, Any]]:
        """The compressed context, and what a record says of it. Raises Infeasible."""
        full = self.full_bytes * len(seen.token_ids)
        allowance = self.cell.budget.allow(full, len(seen.token_ids))
        watch = Stopwatch(self.model.network.device)
        try:
            with watch:
                plan = self.method.plan(replace(seen, artefact=self.artefact), allowance)
                cache = CompressedCache.pack(plan, seen)
        except Infeasible as error:
            raise UsageError(_too_small(self.cell, error, full)) from error
        self._check(cache, allowance)
        rows = plan_rows(plan)
        return cache, {
            "bytes_held": cache.nbytes,
            "bytes_full": full,
            "bytes_budget": allowance.limit,
            "bytes_payload": cache.planned.payload,
            "bytes_metadata": cache.planned.metadata,
            "bytes_shared": cache.shared_bytes,
            "tokens_context": len(seen.token_ids),
            "tokens_kept": sum(rows.values()),
            "tiers": rows,
            "compress_s": watch.seconds + sum(seen.seconds[need] for need in self.method.needs),
        }

    def _check(self, cache: CompressedCache, allowance: Allowance) -> None:
        bounded = self.method.budgeted and self.method.axis is Axis.HELD and not allowance.nominal
        if bounded and cache.nbytes > allowance.limit:
            raise RuntimeError(f"{self.cell.label} holds {cache.nbytes} bytes, its budget is {allowance.limit}")


def _too_small(cell: Cell, error: Infeasible, full: int) -> str:
    share = error.smallest / full
    return (
        f"budget={cell.budget} is below the smallest plan of {cell.label}: {error.smallest:,} bytes "
        f"(budget={share:.4f}) for this context of {full:,}; the budget allows {error.limit:,}"
    )


def _evaluate(runs: Sequence[_Run], model: Model, limit: int | None) -> bool:
    """Runs every example that some cell lacks. Returns whether the task had no more of them."""
    cell = runs[0].cell
    done = 0
    with progress() as bar:
        job = bar.add_task(f"{len(runs)} cells" if len(runs) > 1 else cell.label, total=limit)
        for context in cell.task.contexts(model.writer, cell.seed):
            if limit is not None and done >= limit:
                return False
            examples = context.examples if limit is None else context.examples[: limit - done]
            for ids, group in _units(context, examples, cell.protocol, model):
                lacking = [run for run in runs if any(e.id not in _ids(run) for e in group)]
                if lacking:
                    _evaluate_unit(lacking, model, context, ids, group)
                bar.advance(job, len(group))
            done += len(examples)
    return True


def _ids(run: _Run) -> set[str]:
    """The examples a cell has; a folder with records is opened at once, an empty one when there is a record for it."""
    if run.store is None and not run.redo and run.cell.folder(run.results).exists():
        run.open()
    return run.store.done if run.store else set()


@dataclass(frozen=True)
class _Question:
    """An example, the tokens fed for it after compression, and what the full cache does with it."""

    example: Example
    fed: Tensor
    answer: list[int]
    logprobs: Float[Tensor, "answer vocabulary"]  # teacher-forced on `answer`


def _units(
    context: Context, examples: Sequence[Example], protocol: str, model: Model
) -> Iterator[tuple[tuple[int, ...], list[Example]]]:
    """What is compressed, and the questions asked of it: the context once if blind, with each question if aware."""
    prompts = [model.writer.prompt(context.ids, e.question, e.answer_prefix) for e in examples]
    for example, prompt in zip(examples, prompts, strict=True):
        need, most = len(prompt) + example.max_new_tokens, model.network.max_positions
        if need > most:
            raise UsageError(
                f"{example.id} needs {need:,} tokens with its answer; {model.config.name} reads {most:,}: "
                "choose a shorter context"
            )
    if protocol == "aware":
        for example, prompt in zip(examples, prompts, strict=True):
            yield prompt.split(protocol)[0], [example]
    elif prompts:
        yield prompts[0].split(protocol)[0], list(examples)


def _evaluate_unit(
    runs: Sequence[_Run], model: Model, context: Context, ids: tuple[int, ...], examples: Sequence[Example]
) -> None:
    """One compressed context: prefill once, then every cell and every question."""
    network, protocol = model.network, runs[0].cell.protocol
    tokens = torch.tensor(ids, device=network.device)
    seed = f"{context.id}|{examples[0].id}" if protocol == "aware" else context.id
    watch = Stopwatch(network.device)
    needs = {need for run in runs for need in run.method.needs}
    with watch:
        seen = read_exactly(network, tokens, needs, seed, model.config.prefill_chunk)
    prefill = watch.seconds - sum(seen.seconds.values())
    full = CompressedCache.pack(keep_all(seen), seen)
    questions = [_ask_full(model, full, context, e, protocol) for e in examples]
    for run in runs:
        own, seconds = seen, prefill
        if run.method.own_prefill:
            watch = Stopwatch(network.device)
            with watch:
                own = run.method.read(Reader(network, tokens, run.method.needs, seed))
            seconds = watch.seconds - sum(own.seconds.values())
        cache, facts = run.compress(own)
        store = run.open()
        for question in questions:
            if question.example.id not in store.done:
                answered = _answer(run, model, cache, question)
                times = {"prefill_s": seconds, "ttft_s": seconds + facts["compress_s"] + answered.pop("feed_s")}
                ids_ = {"id": question.example.id, "context_id": context.id, "cluster_id": context.cluster_id}
                store.append(ids_ | answered | facts | times | {"info": question.example.info})


def _ask_full(model: Model, full: CompressedCache, context: Context, example: Example, protocol: str) -> _Question:
    """The full cache's greedy answer to an example, and its teacher-forced log-probabilities."""
    prompt = model.writer.prompt(context.ids, example.question, example.answer_prefix)
    fed = torch.tensor(prompt.split(protocol)[1], device=model.network.device)
    fork = Fork(full, Method())
    first = feed(model.network, [fork], fed[None], last_only=True)[0, -1]
    answer = greedy(model.network, fork.fork(), first, model.stop, example.max_new_tokens)
    return _Question(example, fed, answer, _teacher_forced(model, fork, first, answer))


def _teacher_forced(
    model: Model, fork: Fork, first: Float[Tensor, " vocabulary"], ids: Sequence[int]
) -> Float[Tensor, "ids vocabulary"]:
    """Log-probabilities, in float32, of each token of a continuation; `first` are the logits of its first token."""
    logits = first[None]
    if len(ids) > 1:
        before = torch.tensor([ids[:-1]], device=first.device)
        logits = torch.cat([logits, feed(model.network, [fork.fork()], before)[0]])
    return logits.float().log_softmax(-1)


def _answer(run: _Run, model: Model, cache: CompressedCache, question: _Question) -> dict[str, Any]:
    """What the compressed cache makes of a question: its part of the record."""
    network, example = model.network, question.example
    feeding, decoding = Stopwatch(network.device), Stopwatch(network.device)
    with feeding:
        fork = Fork(cache, run.method)
        first = feed(network, [fork], question.fed[None], last_only=True)[0, -1]
    target = model.writer.encode(example.target)
    nll = -_teacher_forced(model, fork, first, target)[range(len(target)), list(target)].mean()
    mine, full = _teacher_forced(model, fork, first, question.answer), question.logprobs
    record: dict[str, Any] = {
        "answer_nll": float(nll),
        "kl_full": float((full.exp() * (full - mine)).sum(-1).mean()),
        "agree_full": float((full.argmax(-1) == mine.argmax(-1)).float().mean()),
        "tokens_target": len(target),
        "tokens_out_full": len(question.answer),
        "feed_s": feeding.seconds,
        "bytes_tail": fork.tail_bytes,
    }
    if run.cell.generate:
        with decoding:
            ids = greedy(network, fork, first, model.stop, example.max_new_tokens)
        text = model.writer.decode(ids)
        record |= {"score": run.cell.task.score(example, text), "answer": text, "tokens_out": len(ids)}
        record |= {"decode_s": decoding.seconds}
    return record
