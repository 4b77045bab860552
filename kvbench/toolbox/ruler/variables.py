"""Variable tracking: vt."""

from __future__ import annotations

import itertools
import random
import string

from kvbench.prompt import Writer
from kvbench.task import Context
from kvbench.toolbox.needles import LEAST_HAYSTACK, NOISE, haystack, hide
from kvbench.toolbox.ruler.shared import Wording, make_context, target

_HOPS = 4
_VT = Wording(
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n",
    "\nQuestion: Find all variables that are assigned the value {query} in the text above.",
    " Answer: According to the chain(s) of variable assignment in the text above, {number} variables are assigned the "
    "value {query}, they are: ",
)


def _chain(draw: random.Random, letters: int) -> tuple[str, list[str], list[str]]:
    """A value, the variables that have it, and the lines that say so."""
    names: list[str] = []
    while len(names) <= _HOPS:
        new = "".join(draw.choices(string.ascii_uppercase, k=letters))
        names += [new] if new not in names else []
    value = str(draw.randrange(10_000, 99_999))
    return value, names, _assignments(value, names)


def _assignments(value: str, names: list[str]) -> list[str]:
    return [f"VAR {names[0]} = {value}"] + [f"VAR {b} = VAR {a} " for a, b in itertools.pairwise(names)]


def _ask(value: str) -> tuple[str, str]:
    return _VT.question.format(query=value), _VT.prefix.format(query=value, number=_HOPS + 1)


def _solved(value: str, names: list[str], lines: list[str]) -> str:
    return _VT.intro + "\n".join(lines) + "".join(_ask(value)) + target("vt", names) + "\n\n"


def vt(name: str, context: int, writer: Writer) -> Context:
    draw = random.Random(name)
    value, names, lines = _chain(draw, letters=3)
    # Up to RULER's 500 tokens, or a quarter of a short prompt.
    spare = min(500, context // 4) - len(writer.encode(_solved(value, names, lines)))
    for _ in range(spare // len(writer.encode("\n" + NOISE))):
        lines.insert(draw.randrange(len(lines) + 1), NOISE)
    head = _before_word(writer, _solved(value, names, lines) + _VT.intro)
    value, names, lines = _chain(draw, letters=5)
    question, prefix = _ask(value)
    depths = sorted(draw.random() for _ in lines)
    length = context - writer.overhead(question, prefix) - len(head)
    ids, found = hide(writer, haystack("noise", writer), 0, length, lines, depths)
    return make_context(name, (*head, *ids), question, prefix, names, context, depths=found)


def vt_least(writer: Writer) -> int:
    short, long = ["QXZ"] * (_HOPS + 1), ["QXZJV"] * (_HOPS + 1)  # names that few tokenizers know parts of
    head = _before_word(writer, _solved("77777", short, _assignments("77777", short)) + _VT.intro)
    lines = writer.encode_all(["\n" + line for line in _assignments("77777", long)])
    return writer.overhead(*_ask("77777")) + len(head) + sum(map(len, lines)) + LEAST_HAYSTACK


def _before_word(writer: Writer, text: str) -> tuple[int, ...]:
    """Token ids of a text that a capital letter follows: its line ends may be other tokens than at a text's end."""
    word = writer.encode("The")
    ids = writer.encode(text + "The")
    return ids[: -len(word)] if ids[-len(word) :] == word else writer.encode(text)
