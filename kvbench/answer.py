"""Asking the questions of one compressed context: forks, turns, answers, and their distance to the full cache's."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kvbench.cache.fork import Fork, Usage
from kvbench.cache.packed import CompressedCache
from kvbench.cell import Cell
from kvbench.decode import Branch, feed, follow, follow_each, greedy
from kvbench.errors import UsageError
from kvbench.method import Axis, Base, Method
from kvbench.model import Model
from kvbench.task import Context, Example


@dataclass(frozen=True)
class Turn:
    """An example and the tokens fed for it after compression (for a follow-up: after the answer before it)."""

    example: Example
    fed: tuple[int, ...]


@dataclass(frozen=True)
class Unit:
    """What is compressed at once, and the turns that use it, each after the one it follows."""

    id: str  # seeds what a method draws
    ids: tuple[int, ...]
    turns: tuple[Turn, ...]

    @property
    def followed(self) -> set[str]:
        return {turn.example.follows for turn in self.turns if turn.example.follows}


def units(context: Context, examples: Sequence[Example], protocol: str, model: Model) -> list[Unit]:
    """Blind: the context once, for all questions. Aware: with each first question of a conversation.

    Raises UsageError if a conversation is longer than the model reads.
    """
    found: dict[str, tuple[tuple[int, ...], list[Turn]]] = {}  # unit id -> what is compressed, its turns
    unit_of: dict[str, str] = {}  # example id -> unit id
    ends: dict[str, int] = {}  # example id -> tokens of its conversation so far
    for example in examples:
        if example.follows is None:
            prompt = model.writer.prompt(context.ids, example.question, example.answer_prefix, context.chat)
            compressed, fed = prompt.split(protocol)
            alike = protocol == "blind" and found.get(context.id, (compressed, []))[0] == compressed
            unit = unit_of[example.id] = context.id if alike else f"{context.id}|{example.id}"
            found.setdefault(unit, (compressed, []))
            before = len(compressed)
        else:
            fed = model.writer.follow_up(example.question, example.answer_prefix)
            unit = unit_of[example.id] = unit_of[example.follows]
            before = ends[example.follows]
        found[unit][1].append(Turn(example, fed))
        ends[example.id] = before + len(fed) + example.max_new_tokens
        if ends[example.id] > model.network.max_positions:
            raise UsageError(
                f"{example.id} needs {ends[example.id]:,} tokens with its answer; {model.config.name} reads "
                f"{model.network.max_positions:,}: choose a shorter context"
            )
    return [Unit(name, compressed, tuple(turns)) for name, (compressed, turns) in found.items()]


@dataclass(frozen=True)
class FullAnswer:
    """What the full cache does with a question."""

    ids: tuple[int, ...]  # its greedy answer, the end of turn included
    logprobs: Float[Tensor, "answer vocabulary"]  # teacher-forced on it


class _Conversations:
    """The forks of one cache: a first question starts one, a follow-up continues the one of the turn before it."""

    def __init__(self, model: Model, cache: CompressedCache, method: Method, unit: Unit) -> None:
        self._model, self._followed = model, unit.followed
        self._start = Fork(cache, method)  # its rows are decoded once, for all questions
        self._after: dict[str, Fork] = {}

    def fork(self, turn: Turn) -> Fork:
        """A fork that has read all that goes before a turn's question."""
        before = turn.example.follows
        return (self._after[before] if before else self._start).fork()

    def remember(self, example: Example, fork: Fork, answer: Sequence[int]) -> None:
        """Puts the answer (or what the task has for it) into the history of the turns to come."""
        if example.id not in self._followed:
            return
        said = [token for token in answer if token not in self._model.stop]
        if example.history is not None:
            said = list(self._model.writer.encode(example.history))
        if said:
            feed(self._model.network, [fork], torch.tensor([said], device=self._model.network.device), last_only=True)
        self._after[example.id] = fork


def ask_full(model: Model, full: CompressedCache, unit: Unit) -> dict[str, FullAnswer]:
    """The full cache's greedy answers, by example id."""
    talk = _Conversations(model, full, Method(), unit)
    found = {}
    for turn in unit.turns:
        fed = torch.tensor(turn.fed, device=model.network.device)
        fork = talk.fork(turn)
        first, _ = follow(model.network, fork, fed, ())
        [ids] = greedy(
            model.network, [fork], first[None], ended_by(model, turn.example.stop), turn.example.max_new_tokens
        )
        # Asked again with the continuations that every cell is asked for: the same pass, so rounded the same way.
        fork = talk.fork(turn)
        _, branches = follow(model.network, fork, fed, _continuations(model, turn.example, ids))
        found[turn.example.id] = FullAnswer(tuple(ids), _logprobs(branches[1]))
        talk.remember(turn.example, fork, ids)
    return found


def _continuations(model: Model, example: Example, full: Sequence[int]) -> list[Sequence[int]]:
    """What is teacher-forced after a question: the reference text, the full cache's answer, the choices."""
    texts = [model.writer.encode(text) for text in (example.target, *example.choices)]
    return [texts[0], full, *texts[1:]]


@dataclass(frozen=True)
class Asked:
    """A cell's compressed context that is asked a unit's questions, and the examples that the cell has already."""

    cell: Cell
    cache: CompressedCache
    done: Collection[str]


def answers(
    model: Model, asked: Sequence[Asked], unit: Unit, full: Mapping[str, FullAnswer]
) -> Iterator[tuple[int, Example, dict[str, Any]]]:
    """What each cell's cache (by its place in `asked`) makes of each example that the cell lacks: its part of a record.

    The cells' free answers to a question advance together, as do cells whose method reads token by token.
    """
    talks = [_Conversations(model, one.cache, one.cell.method, unit) for one in asked]
    for turn in unit.turns:
        example = turn.example
        listening = [i for i, one in enumerate(asked) if example.id not in one.done or example.id in unit.followed]
        continuations = _continuations(model, example, full[example.id].ids)
        fed = torch.tensor(turn.fed, device=model.network.device)
        forks = {i: talks[i].fork(turn) for i in listening}
        followed = follow_each(model.network, list(forks.values()), fed, continuations, model.rows)
        firsts, records = {}, {}
        for i, (first, branches) in zip(listening, followed, strict=True):
            firsts[i] = first
            logprobs = [_logprobs(branch) for branch in branches]
            records[i] = _fidelity(continuations[0], logprobs[0], full[example.id], logprobs[1])
            records[i] |= {"bytes_tail": forks[i].tail_bytes} | usage_fields(branches[1].usage)
            _check(asked[i], unit, forks[i], branches[1].usage, model.network.row_bytes())
            if example.choices:
                records[i] |= _choose(asked[i].cell, example, continuations[2:], logprobs[2:])
        writing = [i for i in listening if not example.choices and asked[i].cell.generate]
        writing = [i for i in writing if asked[i].cell.task.generates]
        said: dict[int, list[int]] = {i: [] for i in listening}
        # An answer goes into a fork of its own only where a follow-up will need the one before it.
        answering = [forks[i].fork() if example.id in unit.followed else forks[i] for i in writing]
        greedily = _greedy(model, answering, [firsts[i] for i in writing], example)
        for i, ids in zip(writing, greedily, strict=True):
            text = model.writer.decode(ids)
            score = asked[i].cell.task.score(example, text)
            shift = len(ids) - len(full[example.id].ids)
            records[i] |= {"score": score, "answer": text, "tokens_out": len(ids), "length_shift": shift}
            said[i] = ids
        for i in listening:
            talks[i].remember(example, forks[i], said[i])
            if example.id not in asked[i].done:
                yield i, example, records[i]


def ended_by(model: Model, stop: Sequence[str]) -> Callable[[Sequence[int]], bool]:
    """Whether an answer has ended: with the model's end of turn, or with a text of `stop` in it."""
    texts = [text for text in stop if text]
    recent = 4 * max(map(len, texts), default=0)  # a character may take up to four tokens

    def ended(ids: Sequence[int]) -> bool:
        if ids[-1] in model.stop:
            return True
        return bool(texts) and any(text in model.writer.decode(ids[-recent:]) for text in texts)

    return ended


def _greedy(
    model: Model, forks: Sequence[Fork], firsts: Sequence[Float[Tensor, " vocabulary"]], example: Example
) -> list[list[int]]:
    if not forks:
        return []
    ended = ended_by(model, example.stop)
    return greedy(model.network, forks, torch.stack(list(firsts)), ended, example.max_new_tokens, model.rows)


def _logprobs(branch: Branch) -> Float[Tensor, "tokens vocabulary"]:
    return branch.logits.float().log_softmax(-1)


def usage_fields(usage: Usage) -> dict[str, Any]:
    """What the cache held, read and moved per token, by the names of docs/metrics.md."""
    read, moved = ([int(x) for x in part] for part in (usage.read, usage.moved))
    return {
        "bytes_decode": round(fmean(usage.held)),
        "bytes_decode_peak": max(usage.held),
        "bytes_read": round(fmean(read)),
        "bytes_moved": round(fmean(moved)),
    }


def _check(asked: Asked, unit: Unit, fork: Fork, usage: Usage, row_bytes: int) -> None:
    """Raises RuntimeError if a method that acts in time goes over its budget at any step."""
    method, context = asked.cell.method, len(unit.ids)
    if not fork.one_by_one or not method.budgeted:
        return
    after = fork.next_position - asked.cache.next_position if method.budget_base is Base.seen else 0
    for i, used in enumerate(usage.read if method.axis is Axis.READ else usage.held):
        tokens = context + (after + i if method.budget_base is Base.seen else 0)
        allowance = asked.cell.bound.allow(row_bytes * tokens, tokens)
        if int(used) > allowance.limit and not allowance.nominal:
            raise RuntimeError(f"{asked.cell.label} uses {int(used)} bytes at a step, its budget is {allowance.limit}")


def _fidelity(
    target: Sequence[int],
    logprobs: Float[Tensor, "target vocabulary"],
    full: FullAnswer,
    mine: Float[Tensor, "answer vocabulary"],
) -> dict[str, Any]:
    """NLL of the reference text; KL divergence and top-1 agreement to the full cache, along its greedy answer."""
    agrees = full.logprobs.argmax(-1) == mine.argmax(-1)
    return {
        "answer_nll": -float(logprobs[range(len(target)), list(target)].mean()),
        "kl_full": float((full.logprobs.exp() * (full.logprobs - mine)).sum(-1).mean()),
        "agree_full": float(agrees.float().mean()),
        "diverges_at": None if agrees.all() else int(agrees.int().argmin()),
        "tokens_target": len(target),
        "tokens_out_full": len(full.ids),
    }


def _choose(
    cell: Cell,
    example: Example,
    choices: Sequence[Sequence[int]],
    logprobs: Sequence[Float[Tensor, "_ vocabulary"]],
) -> dict[str, Any]:
    """The log-probabilities of given continuations, and the score that the task makes of them."""
    sums = [float(x[range(len(ids)), list(ids)].sum()) for ids, x in zip(choices, logprobs, strict=True)]
    greedy_all = [x.argmax(-1).tolist() == list(ids) for ids, x in zip(choices, logprobs, strict=True)]
    best = example.choices[max(range(len(sums)), key=sums.__getitem__)]
    score = cell.task.score_choices(example, sums, greedy_all)
    return {"score": score, "answer": best, "choice_logprobs": sums, "choice_greedy": greedy_all}
