"""Sessions: one context of many lines, and questions that each need a few of them (SCBench's shapes, arXiv:2412.10319).

A kind of session draws its questions first, so that their length is known; `fill` then adds lines that nobody asks for
until the prompt is full. Lines are encoded apart, each cut where no tokenizer we know merges.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TypeVar
from uuid import UUID

from kvbench.errors import UsageError
from kvbench.prompt import Writer

T = TypeVar("T")

KV_HEAD = "Extract the value corresponding to the specified key in the JSON object below.\n\n"
_STRINGS = "The following is a list of random strings.\n\n"
_CHAINS = "Memorize and track the chains of variable assignment hidden in the following text.\n\n"
_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_SHOTS = "Each phrase has a label that depends on its last word. Learn the labels from these examples.\n\n"
_HOPS = 4
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_CAPITALS = _LETTERS.upper()
_SIZES, _COLOURS = (
    words.split()
    for words in (
        "big broad heavy huge little narrow short small tall tiny",
        "black blue brown green grey orange purple red white yellow",
    )
)
_KINDS = [
    nouns.split()
    for nouns in (
        "badger camel dolphin eagle giraffe hedgehog lizard otter panda rabbit salmon tiger",
        "anvil chisel drill file hammer ladle pliers saw screwdriver shovel spanner wrench",
        "apple banana carrot cherry lemon lettuce mango onion peach potato tomato turnip",
        "apron blouse cardigan coat dress glove hat jacket scarf shirt skirt sock",
        "bicycle bus canoe ferry lorry scooter sledge taxi tractor train tram wagon",
        "banjo bugle cello clarinet drum flute guitar harp piano trombone trumpet violin",
        "armchair bed bench bookcase cabinet cupboard desk dresser sofa stool table wardrobe",
        "barn castle chapel cottage factory garage hotel library museum palace school tower",
    )
]


@dataclass(frozen=True)
class Question:
    """One question of a session, as the user asks it (`input`) and as the answer begins (`prefix`)."""

    input: str
    prefix: str
    references: tuple[str, ...]
    target: str
    max_new_tokens: int


@dataclass(frozen=True)
class Draft:
    """Questions, and a context of any size for them.

    `lay(n)` gives the pieces of a context with n lines, and per question how deep in [0, 1] its answer is.
    """

    questions: tuple[Question, ...]
    lay: Callable[[int], tuple[list[str], list[float]]]
    least: int  # lines


def fill(writer: Writer, draft: Draft, room: int) -> tuple[tuple[int, ...], list[float]]:
    """The tokens of the context with the most lines that fit into `room` tokens, and the depths of the answers."""
    known: dict[str, tuple[int, ...]] = {}

    def encode(lines: int) -> tuple[int, ...]:
        pieces, _ = draft.lay(lines)
        new = [piece for piece in dict.fromkeys(pieces) if piece not in known]
        known.update(zip(new, writer.encode_all(new), strict=True))
        return tuple(chain.from_iterable(known[piece] for piece in pieces))

    missing = len(encode(draft.least)) - room
    if missing > 0:
        raise UsageError(f"a prompt is {missing} tokens too short for its questions: raise task.context")
    low, high = draft.least, 2 * draft.least + 8
    while len(encode(high)) <= room:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if len(encode(middle)) <= room else (low, middle)
    return encode(low), draft.lay(low)[1]


def overhead(writer: Writer, questions: Sequence[Question]) -> int:
    """Tokens that the longest of the questions adds to a context."""
    return max(writer.overhead("\n\n" + question.input, question.prefix) for question in questions)


def after_another(draft: Draft) -> Draft:
    """The same, to follow other context."""

    def lay(lines: int) -> tuple[list[str], list[float]]:
        pieces, depths = draft.lay(lines)
        return ["\n\n" + pieces[0], *pieces[1:]], depths

    return replace(draft, lay=lay)


def key_values(draw: random.Random, questions: int, short: bool = False) -> Draft:
    """A JSON object of random UUIDs (`short`: 8 hexadecimal digits): which value has a key? After arXiv:2307.03172."""
    seen: set[str] = set()

    def new() -> str:
        return _unlike(
            seen, lambda: f"{draw.getrandbits(32):08x}" if short else str(UUID(int=draw.getrandbits(128), version=4))
        )

    asked = [(new(), new()) for _ in range(questions)]
    places, others = _bands(draw, questions), _stock(lambda: (new(), new()))

    def lay(lines: int) -> tuple[list[str], list[float]]:
        at = places(lines)
        pairs = [f'"{key}": "{value}"' for key, value in _weave(asked, others(lines - questions), at)]
        pieces = [f" {pair},\n" for pair in pairs]
        pieces[-1] = f" {pairs[-1]}}}"
        pieces[0] = f"{KV_HEAD}{{{pieces[0][1:]}"
        return pieces, _depths(at, lines)

    found = (
        Question(f'Key: "{key}"\nCorresponding value:', f'"{key}":', (value,), f' "{value}"', len(value) + 12)
        for key, value in asked
    )
    return Draft(tuple(found), lay, least=questions)


def prefix_suffix(draw: random.Random, questions: int) -> Draft:
    """A list of random strings of 14 letters: which one begins and ends so? No two share beginning and end."""
    seen: set[str] = set()

    def new() -> str:
        ends = _unlike(seen, lambda: "".join(draw.choices(_LETTERS, k=8)))
        return ends[:4] + "".join(draw.choices(_LETTERS, k=6)) + ends[4:]

    asked = [new() for _ in range(questions)]
    places, others = _bands(draw, questions), _stock(new)

    def lay(lines: int) -> tuple[list[str], list[float]]:
        at = places(lines)
        return _list(_STRINGS, _weave(asked, others(lines - questions), at)), _depths(at, lines)

    ask = 'Find the string in the list that starts with "{}" and ends with "{}". Answer with the whole string only.'
    found = (Question(ask.format(s[:4], s[-4:]), "Answer:", (s,), f" {s}", 24) for s in asked)
    return Draft(tuple(found), lay, least=questions)


def variable_chains(draw: random.Random, questions: int) -> Draft:
    """RULER's variable tracing (arXiv:2404.06654), a chain of four hops a question: which variables have a value?"""
    seen: set[str] = set()
    values = [str(value) for value in draw.sample(range(10_000, 100_000), questions)]
    names = [[_unlike(seen, lambda: "".join(draw.choices(_CAPITALS, k=5))) for _ in range(_HOPS + 1)] for _ in values]
    places = [sorted(draw.random() for _ in range(_HOPS + 1)) for _ in values]  # in a chain's order
    hidden = sorted(
        (place, f"VAR {name} = {source}")
        for value, chained, where in zip(values, names, places, strict=True)
        for name, source, place in zip(chained, [value, *(f"VAR {name}" for name in chained[:-1])], where, strict=True)
    )

    def lay(lines: int) -> tuple[list[str], list[float]]:
        noise = lines - len(hidden)
        found: list[str] = []
        done = 0
        for place, line in hidden:
            upto = int(place * (noise + 1))
            found += [_NOISE] * (upto - done) + [line]
            done = upto
        found += [_NOISE] * (noise - done)
        return _list(_CHAINS, found), [round(sum(place) / len(place), 4) for place in places]

    ask = "Find all variables that are assigned the value {} in the text above."
    found = (
        Question(ask.format(value), "Answer: the variables are", tuple(chained), f" {', '.join(chained)}.", 48)
        for value, chained in zip(values, names, strict=True)
    )
    return Draft(tuple(found), lay, least=len(hidden))


def many_shot(draw: random.Random, questions: int) -> Draft:
    """Labelled phrases; the labels are words invented for the session, one for each of eight kinds of things.

    The asked phrases are not among the examples. A label that is always given scores 1/8. There is no depth: every
    example of the asked kind helps.
    """
    seen: set[str] = set()
    labels = [_unlike(seen, lambda: _syllable(draw) + _syllable(draw)) for _ in _KINDS]
    asked: set[str] = set()

    def phrase() -> tuple[str, str]:
        kind = draw.randrange(len(_KINDS))
        return f"{draw.choice(_SIZES)} {draw.choice(_COLOURS)} {draw.choice(_KINDS[kind])}", labels[kind]

    def other() -> tuple[str, str]:
        while (found := phrase())[0] in asked:
            pass
        return found

    chosen: list[tuple[str, str]] = []
    for _ in range(questions):
        chosen.append(other())
        asked.add(chosen[-1][0])
    others = _stock(other)

    def lay(lines: int) -> tuple[list[str], list[float]]:
        return _list(_SHOTS, [f"Phrase: {text}\nLabel: {label}" for text, label in others(lines)]), []

    found = (Question(f"Phrase: {text}", "Label:", (label,), f" {label}", 10) for text, label in chosen)
    return Draft(tuple(found), lay, least=len(_KINDS))


KINDS: dict[str, Callable[[random.Random, int], Draft]] = {
    "kv": key_values,
    "prefix_suffix": prefix_suffix,
    "vt": variable_chains,
    "many_shot": many_shot,
}


def _syllable(draw: random.Random) -> str:
    return draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") + draw.choice("bdgklmnprst")


def _unlike(seen: set[str], new: Callable[[], str]) -> str:
    """A new text that is not among those seen, and is from now on."""
    while (text := new()) in seen:
        pass
    seen.add(text)
    return text


def _stock(new: Callable[[], T]) -> Callable[[int], list[T]]:
    """The first n of an endless row of things, the same at every call."""
    held: list[T] = []

    def take(number: int) -> list[T]:
        while len(held) < number:
            held.append(new())
        return held[:number]

    return take


def _bands(draw: random.Random, number: int) -> Callable[[int], list[int]]:
    """Places among n lines: one in each of `number` equal bands of depth, in random order."""
    bands, within = draw.sample(range(number), number), [draw.random() for _ in range(number)]

    def places(lines: int) -> list[int]:
        edges = [band * lines // number for band in range(number + 1)]
        return [edges[b] + int(w * (edges[b + 1] - edges[b])) for b, w in zip(bands, within, strict=True)]

    return places


def _weave(asked: Sequence[T], others: Sequence[T], places: Sequence[int]) -> list[T]:
    """All of them in one row; `places` are those of `asked` in it."""
    at = dict(zip(places, asked, strict=True))
    rest: Iterator[T] = iter(others)
    return [at[i] if i in at else next(rest) for i in range(len(asked) + len(others))]


def _depths(places: Sequence[int], lines: int) -> list[float]:
    return [round(place / max(lines - 1, 1), 4) for place in places]


def _list(head: str, lines: Sequence[str]) -> list[str]:
    """Lines as pieces that end with the line, the first with a heading, the last without a line end."""
    pieces = [f"{line}\n" for line in lines[:-1]] + [lines[-1]]
    return [head + pieces[0], *pieces[1:]]
